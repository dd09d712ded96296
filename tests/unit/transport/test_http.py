"""HTTP/1.1 by uvicorn's protocol class on a transport of our own, with its limits."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from broker.transport import http
from broker.transport.http import MAX_BODY_BYTES, MAX_HEAD_BYTES, MAX_HEADERS, PEER_EXTENSION, HttpDoor
from broker.transport.tls import Anonymous
from tests.unit.transport.clocks import HandClock

GET = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"


class Served:
    def __init__(self) -> None:
        self.scopes: list[Any] = []
        self.bodies: list[bytes] = []
        self.disconnected = 0
        self.ended = 0
        self.gate = asyncio.Event()
        self.port = 0
        self.door: HttpDoor

    async def app(self, scope: Any, receive: Any, send: Any) -> None:
        self.scopes.append(scope)
        body = b""
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                self.disconnected += 1
                return
            body += message["body"]
            if not message["more_body"]:
                break
        self.bodies.append(body)
        if scope["path"] == "/slow":
            await self.gate.wait()
        if scope["path"] == "/broken":
            raise ValueError("secret-token")
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})

    async def ask(self, data: bytes) -> bytes:
        """All that comes back until the server closes."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(data)
        try:
            async with asyncio.timeout(30):
                return await reader.read()
        except ConnectionError:
            return b""
        finally:
            writer.close()

    def closed(self) -> None:
        self.ended += 1


@asynccontextmanager
async def served() -> AsyncIterator[Served]:
    one = Served()
    one.door = HttpDoor(one.app, HandClock())
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: one.door.protocol(Anonymous(), one.closed), "127.0.0.1", 0)
    one.port = server.sockets[0].getsockname()[1]
    try:
        yield one
    finally:
        server.close()
        await one.door.stop(grace=0.2)


def close(request: bytes) -> bytes:
    return request.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n", 1)


async def test_the_app_finds_the_peer_in_its_scope() -> None:
    async with served() as one:
        answer = await one.ask(close(GET))
        assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
        assert answer.endswith(b"ok")
        assert b"\r\ndate: " in answer
        assert b"server:" not in answer
        assert one.scopes[0]["extensions"][PEER_EXTENSION] == Anonymous()
        assert one.ended == 1


@pytest.mark.bears("PB14")
async def test_headers_cannot_say_who_the_client_is() -> None:
    async with served() as one:
        forged = b"x-forwarded-for: 1.2.3.4\r\nx-forwarded-proto: https\r\nx-forwarded-client-cert: By=spiffe://a/b\r\n"
        await one.ask(close(GET.replace(b"\r\n\r\n", b"\r\n" + forged + b"\r\n", 1)))
        scope = one.scopes[0]
        assert scope["client"][0] == "127.0.0.1"
        assert scope["scheme"] == "http"
        assert scope["extensions"][PEER_EXTENSION] == Anonymous()


async def test_many_requests_on_one_connection_and_a_body_in_pieces() -> None:
    async with served() as one:
        post = b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n"
        answer = await one.ask(GET + post + close(GET))
        assert answer.count(b"HTTP/1.1 200") == 3
        assert one.bodies == [b"", b"abcde", b""]


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET /" + b"x" * (MAX_HEAD_BYTES + 1) + b" HTTP/1.1\r\n\r\n", b"431"),
        (b"GET / HTTP/1.1\r\nx: " + b"y" * (4 * MAX_HEAD_BYTES), b"431"),
        (b"GET / HTTP/1.1\r\nx: " + b"y" * (MAX_HEAD_BYTES + 1) + b"\r\n\r\n", b"431"),
        (b"GET / HTTP/1.1\r\n" + b"x: y\r\n" * (MAX_HEADERS + 1) + b"\r\n", b"431"),
        (b"\x16\x03\x01\x00\x00garbage\r\n\r\n", b"400"),
        (b"GET / HTTP/1.1\r\ncontent-length: 3\r\ntransfer-encoding: chunked\r\n\r\n", b"400"),
        (b"GET / HTTP/1.1\r\ncontent-length: 3\r\ncontent-length: 4\r\n\r\n", b"400"),
    ],
    ids=["target", "header without end", "header", "many headers", "garbage", "two framings", "two lengths"],
)
async def test_what_is_too_large_or_no_http_is_refused(request_: bytes, status: bytes) -> None:
    async with served() as one:
        answer = await one.ask(request_)
        assert answer.split(b" ")[1:2] in ([status], [])  # [] : reset with our answer still on its way
        assert one.scopes == []
        assert (await one.ask(close(GET))).startswith(b"HTTP/1.1 200")


@pytest.mark.bears("X08")
@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"GET / HTTP/1.1\r\n", b"400"),
        (b"GET / HTTP/1.1\r\nhost: x\r\nhost: x\r\n", b"400"),
        (b"GET / HTTP/1.0\r\nhost: x\r\nhost: y\r\n", b"400"),
        (b"GET / HTTP/1.1\r\nhost: a b\r\n", b"400"),
        (b"GET / HTTP/1.1\r\nhost: user@x\r\n", b"400"),
        (b"GET / HTTP/1.1\r\nhost: x/y\r\n", b"400"),
        (b"GET / HTTP/2.0\r\nhost: x\r\n", b"505"),
        (b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: gzip, chunked\r\n", b"400"),
        (b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: identity, chunked\r\n", b"400"),
        (b"POST / HTTP/1.0\r\nhost: x\r\ntransfer-encoding: chunked\r\n", b"400"),
    ],
    ids=["no host", "two", "two, old", "space", "user", "path", "version", "two codings", "identity", "old coding"],
)
async def test_a_head_that_another_program_may_read_otherwise_is_refused(head: bytes, status: bytes) -> None:
    async with served() as one:
        answer = await one.ask(head + b"\r\n0\r\n\r\n")
        assert answer.split(b" ")[1:2] == [status]
        assert b"\r\nconnection: close\r\n" in answer
        assert one.scopes == []


@pytest.mark.parametrize(
    ("request_", "status", "error"),
    [
        (b"FROBNICATE /token HTTP/1.1\r\nhost: x\r\n\r\n", 501, "method_unknown"),
        (b"frobnicate /token HTTP/1.1\r\nhost: x\r\n\r\n", 400, "invalid_request"),
        (b"GET /token HTTP/1.1\r\n\r\n", 400, "invalid_request"),
        (b"GET / HTTP/1.1\r\nhost: x\r\n" + b"x: y\r\n" * (MAX_HEADERS + 1) + b"\r\n", 431, "head_too_large"),
        (b"GET / HTTP/2.0\r\nhost: x\r\n\r\n", 505, "http_version"),
    ],
    ids=["method", "no method", "no host", "many headers", "version"],
)
async def test_a_refusal_of_the_parser_is_one_as_any_other(request_: bytes, status: int, error: str) -> None:
    async with served() as one:
        head, _, body = (await one.ask(request_)).partition(b"\r\n\r\n")
        lines = head.lower().split(b"\r\n")
        assert lines[0].split(b" ")[1] == b"%d" % status
        assert {b"content-type: application/json", b"cache-control: no-store", b"connection: close"} <= set(lines)
        assert b"content-length: %d" % len(body) in lines
        assert any(line.startswith(b"date: ") for line in lines)
        assert json.loads(body)["error"] == error
        assert one.scopes == []


async def test_a_refused_head_has_no_body() -> None:
    async with served() as one:
        answer = await one.ask(b"HEAD / HTTP/1.1\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 400 ")
        assert answer.endswith(b"\r\n\r\n")


@pytest.mark.parametrize("host", [b"x", b"localhost:8443", b"[::1]:8443", b"10.0.0.1:", b""])
async def test_hosts_that_are_taken(host: bytes) -> None:
    async with served() as one:
        assert (await one.ask(close(GET.replace(b"x", host)))).startswith(b"HTTP/1.1 200")
        assert (await one.ask(b"GET / HTTP/1.0\r\n\r\n")).startswith(b"HTTP/1.1 200")


@pytest.mark.bears("PB14", "X08")
async def test_a_trailer_is_no_header() -> None:
    trailers = b"x-forwarded-client-cert: By=spiffe://a/b\r\nauthorization: Bearer x\r\nhost: y\r\n"
    head = b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\nconnection: close\r\n\r\n"
    async with served() as one:
        answer = await one.ask(head + b"3\r\nabc\r\n0\r\n" + trailers + b"\r\n")
        assert answer.startswith(b"HTTP/1.1 200")
        assert one.bodies == [b"abc"]
        assert {name for name, _ in one.scopes[0]["headers"]} == {b"host", b"transfer-encoding", b"connection"}
        many = b"x: " + b"y" * MAX_HEAD_BYTES + b"\r\n"
        assert (await one.ask(head + b"3\r\nabc\r\n0\r\n" + many + b"\r\n")).split(b" ")[1:2] in ([b"431"], [])


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_body_too_large_is_refused_while_it_arrives(chunked: bool) -> None:
    size = MAX_BODY_BYTES + 70_000
    framing = b"transfer-encoding: chunked" if chunked else b"content-length: %d" % (2 * size)
    head = b"POST / HTTP/1.1\r\nhost: x\r\n" + framing + b"\r\n\r\n"
    body = (b"%x\r\n" % size if chunked else b"") + bytes(size)
    async with served() as one:
        answer = await one.ask(head + body)
        assert answer.split(b" ")[1:2] in ([b"413"], [])
        async with asyncio.timeout(30):
            while not one.disconnected:
                await asyncio.sleep(0.005)
        assert one.bodies == []


async def test_a_request_that_does_not_arrive_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "REQUEST_DEADLINE", 0.1)
    async with served() as one:
        for slow in (b"", b"GET / HT", b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\nab", GET + b"GET /"):
            answer = await one.ask(slow)  # returns when the server gave up
            assert answer.count(b"HTTP/1.1") == slow.count(GET)
        async with asyncio.timeout(30):
            while one.ended < 4:
                await asyncio.sleep(0.005)


async def test_a_request_being_served_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "REQUEST_DEADLINE", 0.05)
    async with served() as one:
        asking = asyncio.create_task(one.ask(close(GET.replace(b"/ ", b"/slow ", 1))))
        await asyncio.sleep(0.15)
        one.gate.set()
        assert (await asking).startswith(b"HTTP/1.1 200")


async def test_an_idle_connection_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "KEEP_ALIVE", 0.05)
    async with served() as one:
        assert (await one.ask(GET)).endswith(b"ok")  # returns when the server closed


async def test_a_defect_is_logged_by_kind_and_place_only(caplog: pytest.LogCaptureFixture) -> None:
    async with served() as one:
        with caplog.at_level(logging.DEBUG):
            answer = await one.ask(close(GET.replace(b"/ ", b"/broken ", 1)))
        assert answer.startswith(b"HTTP/1.1 500")
        assert b"secret" not in answer
    assert "ValueError at" in caplog.text
    assert "secret-token" not in caplog.text


@pytest.mark.bears("W12")
async def test_garbage_leaves_no_line_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    async with served() as one:
        for garbage in (b"\0" * 65536, b"\x16\x03\x01\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"):
            await one.ask(garbage)
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


async def test_stop_ends_what_does_not_end_by_itself() -> None:
    async with served() as one:
        stuck = asyncio.create_task(one.ask(GET.replace(b"/ ", b"/slow ", 1)))
        async with asyncio.timeout(30):
            while not one.scopes:
                await asyncio.sleep(0.005)
        await one.door.stop(grace=0.05)
        assert await stuck == b""
        async with asyncio.timeout(30):
            while not one.ended:
                await asyncio.sleep(0.005)
