"""The one TLS port with real handshakes: gRPC and HTTPS behind it, each with the peer that was verified on that socket."""

import asyncio
import datetime as dt
import json
import shutil
import ssl
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from broker._proto.service import Stub, handler
from broker._proto.spiffe import workload_pb2
from broker.errors import BrokerError, Misconfigured
from broker.spiffe import BundleSet, SpiffeId
from broker.transport import lifetimes, tls_listener
from broker.transport.callers import CallerIndex
from broker.transport.dialer import SpiffeDialer
from broker.transport.grpc_server import CallGuard, PrivateGrpcServer
from broker.transport.http import PEER_EXTENSION
from broker.transport.tls import ContextSource, SvidPeer, TlsIdentity, TlsPeer, client_context, roots_of, server_context
from broker.transport.tls_listener import TlsListener
from tests.unit.transport.clocks import HandClock
from tests.unit.transport.pki import HOUR, Authority
from tests.unit.transport.services import STREAM, UNARY, WORKLOAD, WhoAmI

A, B = Authority("a.example"), Authority("b.example")
SERVER_ID = SpiffeId("spiffe://a.example/server")
ASK, WATCH = workload_pb2.JWTSVIDRequest(), workload_pb2.X509SVIDRequest()


@pytest.fixture
def short() -> Iterator[Path]:
    directory = Path(tempfile.mkdtemp(dir="/tmp"))
    yield directory
    shutil.rmtree(directory)


@dataclass
class Port:
    clock: HandClock = field(default_factory=HandClock)
    bundles: BundleSet = field(default_factory=lambda: BundleSet.of(A.bundle, B.bundle))
    identity: TlsIdentity = field(default_factory=lambda: A.issue("/server", lifetime=24 * HOUR))
    service: WhoAmI = field(default_factory=WhoAmI)
    refusals: list[str] = field(default_factory=list)
    index: CallerIndex[TlsPeer] = field(default_factory=CallerIndex)
    app_gate: asyncio.Event = field(default_factory=asyncio.Event)
    listener: TlsListener = field(init=False)

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(30):
            while not condition():
                await asyncio.sleep(0.005)

    def context(self, identity: TlsIdentity | None, *alpn: str) -> ssl.SSLContext:
        return client_context(identity, roots_of(BundleSet.of(A.bundle)), alpn)

    def dialer(self, identity: TlsIdentity | None, **options: Any) -> SpiffeDialer:
        settings = {"bundles": lambda: BundleSet.of(A.bundle), "expect": SERVER_ID, "clock": self.clock} | options
        return SpiffeDialer(f"127.0.0.1:{self.listener.port}", identity=lambda: identity, **settings)

    async def connect(self, context: ssl.SSLContext) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection("127.0.0.1", self.listener.port, ssl=context)

    async def get(self, identity: TlsIdentity | None, *alpn: str) -> tuple[int, Any]:
        """One request; (0, None) where the connection ends without an answer."""
        reader, writer = await self.connect(self.context(identity, *alpn))
        try:
            writer.write(b"GET /who HTTP/1.1\r\nhost: x\r\n\r\n")
            return await response(reader)
        except (asyncio.IncompleteReadError, ConnectionError, ssl.SSLError):
            return 0, None
        finally:
            writer.close()

    async def app(self, scope: Any, receive: Any, send: Any) -> None:
        peer = scope["extensions"][PEER_EXTENSION]
        if scope["path"] == "/slow":
            await self.app_gate.wait()
        body = json.dumps({"peer": shown(peer), "scheme": scope["scheme"]}).encode()
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
        await send({"type": "http.response.body", "body": body})


def shown(peer: TlsPeer) -> str:
    return str(peer.svid.id) if isinstance(peer, SvidPeer) else "anonymous"


async def response(reader: asyncio.StreamReader) -> tuple[int, Any]:
    head = await reader.readuntil(b"\r\n\r\n")
    fields = dict(line.split(b": ", 1) for line in head.lower().split(b"\r\n")[1:-2])
    body = await reader.readexactly(int(fields[b"content-length"]))
    return int(head.split()[1]), json.loads(body) if body else None


@asynccontextmanager
async def port(directory: Path, **options: Any) -> AsyncIterator[Port]:
    one = Port()
    guard = CallGuard(one.index, {UNARY: lambda _: None, STREAM: lambda _: None})
    server = PrivateGrpcServer(directory / "private" / "s", [handler(WORKLOAD, Shown(one.service), guard)])
    settings: dict[str, Any] = {"grpc_backend": server.path, "http_app": one.app} | options
    one.listener = TlsListener(
        host="127.0.0.1",
        port=0,
        context=ContextSource(
            lambda: one.identity, lambda: one.bundles, lambda me, them: server_context(me, roots_of(them))
        ),
        bundles=lambda: one.bundles,
        clock=one.clock,
        index=one.index,
        on_refusal=lambda error, address: one.refusals.append(told(error, address)),
        **settings,
    )
    await server.start()
    await one.listener.start()
    try:
        yield one
    finally:
        await one.listener.stop(grace=0.2)
        await server.stop(0)


def told(error: BrokerError, address: str) -> str:
    assert address.startswith("127.0.0.1:")
    return error.reason


class Shown:
    """The service, with its caller in words."""

    def __init__(self, service: WhoAmI) -> None:
        self._service = service

    async def FetchJWTSVID(self, request: Any, context: Any, caller: TlsPeer) -> Any:
        return await self._service.FetchJWTSVID(request, context, shown(caller))

    async def FetchX509SVID(self, request: Any, context: Any, caller: TlsPeer) -> Any:
        async for one in self._service.FetchX509SVID(request, context, shown(caller)):
            yield one


async def who(channel: grpc.aio.Channel) -> str:
    answer: workload_pb2.JWTSVIDResponse = await Stub(channel, WORKLOAD).FetchJWTSVID(ASK, timeout=30)
    return answer.svids[0].spiffe_id


async def fails(call: Awaitable[Any]) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


async def test_both_protocols_know_the_peer_of_their_own_connection(short: Path) -> None:
    agent, other = A.issue("/agent"), B.issue("/friend")
    async with port(short) as one:
        async with one.dialer(agent) as first, one.dialer(other) as second, one.dialer(None) as third:
            names = await asyncio.gather(*(who(channel) for channel in (first, second, third, first)))
        assert names == [
            "spiffe://a.example/agent",
            "spiffe://b.example/friend",
            "anonymous",
            "spiffe://a.example/agent",
        ]
        assert await one.get(agent, "http/1.1") == (200, {"peer": "spiffe://a.example/agent", "scheme": "https"})
        assert await one.get(None, "http/1.1") == (200, {"peer": "anonymous", "scheme": "https"})
        await one.until(lambda: one.listener.connections == 0)
        assert len(one.index) == 0
        assert one.refusals == []


@pytest.mark.parametrize("offered", [(), ("h2", "http/1.1"), ("http/1.1", "h2")])
async def test_who_does_not_insist_on_h2_is_served_http(short: Path, offered: tuple[str, ...]) -> None:
    """As curl, Go's client and browsers: what speaks gRPC offers ``h2`` and nothing else."""
    async with port(short) as one:
        assert (await one.get(None, *offered))[0] == 200


@pytest.mark.bears("SP03")
async def test_a_leaf_of_a_signed_by_b_is_refused_at_the_port(short: Path) -> None:
    forged = B.issue("spiffe://a.example/agent")
    async with port(short) as one:
        # The same leaf name under the right authority is served: the refusal is about who signed.
        assert (await one.get(A.issue("spiffe://a.example/agent"), "http/1.1"))[0] == 200
        status, body = await one.get(forged, "http/1.1")
        assert (status, body["error"]["code"]) == (403, one.refusals[0])
        async with one.dialer(forged) as channel:
            assert (await fails(who(channel))).code() is grpc.StatusCode.UNAVAILABLE
        assert len(one.index) == 0
        await one.until(lambda: len(one.refusals) >= 2)
        assert set(one.refusals) == {"svid_untrusted"}


@pytest.mark.bears("PB15", "SP05")
@pytest.mark.parametrize(
    "identity",
    [
        A.issue("/agent", "/other"),
        A.issue("/agent", is_ca=True),
        A.issue("https://a.example/agent"),
        A.issue("spiffe://a.example"),
        A.issue("/agent", lifetime=-dt.timedelta(minutes=1)),
        A.issue("/agent", age=-dt.timedelta(minutes=50)),  # made when tests are collected: long before they run
        Authority("a.example").issue("/agent"),
        Authority("c.example").issue("/agent"),
    ],
    ids=["two uris", "ca", "no spiffe", "no path", "expired", "not yet", "another key of a", "unknown domain"],
)
async def test_bad_client_certificates_are_refused_and_told_of(short: Path, identity: TlsIdentity) -> None:
    async with port(short) as one:
        status, body = await one.get(identity, "http/1.1")
        assert status in {0, 403}
        assert body is None or "peer" not in body
        async with one.dialer(identity) as channel:
            assert (await fails(who(channel))).code() is grpc.StatusCode.UNAVAILABLE
        await one.until(lambda: len(one.refusals) >= 2)
        assert (await one.get(None, "http/1.1"))[0] == 200


async def test_the_reason_reaches_the_caller(short: Path) -> None:
    async with port(short) as one:
        status, body = await one.get(A.issue("/agent", "/other"), "http/1.1")
        assert (status, body["error"]["code"]) == (403, "svid_uri_count")
        dialer = one.dialer(A.issue("/agent", "/other"))
        async with dialer as channel:
            assert (await fails(who(channel))).code() is grpc.StatusCode.UNAVAILABLE
            await one.until(lambda: "refuse our certificate" in str(dialer.last_error))


async def test_old_tls_and_silence_are_refused(short: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with port(short, handshake_deadline=0.3) as one:
        old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
        old.maximum_version = ssl.TLSVersion.TLSv1_2
        with pytest.raises((ssl.SSLError, ConnectionError)):
            await one.connect(old)
        reader, writer = await asyncio.open_connection("127.0.0.1", one.listener.port)
        writer.write(b"\x16\x03\x01")  # the first bytes of a ClientHello that never goes on
        # Others are served while it waits for its deadline.
        assert (await one.get(None))[0] == 200
        async with asyncio.timeout(30):
            assert await reader.read() == b""
        writer.close()
        assert one.refusals == []  # nobody presented anything: nothing for the record


@pytest.mark.bears("PB13")
async def test_a_session_cannot_be_resumed(short: Path) -> None:
    async with port(short) as one:
        context = one.context(A.issue("/agent"), "http/1.1")
        reader, writer = await one.connect(context)
        writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
        assert (await response(reader))[0] == 200
        session = writer.get_extra_info("ssl_object").session
        assert session is None or not session.has_ticket
        writer.close()


@pytest.mark.bears("PB13")
async def test_a_connection_ends_with_its_svid(short: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifetimes, "TICK", 0.01)
    async with port(short) as one:
        lasting, brief = A.issue("/agent", lifetime=10 * HOUR), A.issue("/agent", lifetime=HOUR)
        # The dialer has a clock of its own here: what is measured is the server's doing.
        async with one.dialer(lasting, clock=HandClock()) as keeps, one.dialer(brief, clock=HandClock()) as loses:
            stays = Stub(keeps, WORKLOAD).FetchX509SVID(WATCH)
            ends = Stub(loses, WORKLOAD).FetchX509SVID(WATCH)
            await stays.read()
            await ends.read()
            reader, writer = await one.connect(one.context(brief, "http/1.1"))
            writer.write(b"GET / HTTP/1.1\r\nhost: x\r\n\r\n")
            assert (await response(reader))[0] == 200
            one.clock.step = 2 * HOUR
            assert (await fails(ends.read())).code() is grpc.StatusCode.UNAVAILABLE
            assert await reader.read() == b""
            writer.close()
            await one.until(lambda: one.listener.connections == 1)
            one.service.gate.set()
            await stays.read()


async def test_a_banned_peer_is_dropped_at_once(short: Path) -> None:
    async with port(short) as one, one.dialer(A.issue("/agent")) as bad, one.dialer(A.issue("/other")) as good:
        falls, stays = (Stub(channel, WORKLOAD).FetchX509SVID(WATCH) for channel in (bad, good))
        await falls.read()
        await stays.read()
        banned = SpiffeId("spiffe://a.example/agent")
        assert one.listener.drop(lambda peer: isinstance(peer, SvidPeer) and peer.svid.id == banned) == 1
        assert (await fails(falls.read())).code() is grpc.StatusCode.UNAVAILABLE
        one.service.gate.set()
        await stays.read()


async def test_a_root_that_is_gone_ends_its_connections_and_admits_no_new_ones(short: Path) -> None:
    friend = B.issue("/friend")
    async with port(short) as one, one.dialer(friend) as channel, one.dialer(A.issue("/agent")) as ours:
        stream = Stub(channel, WORKLOAD).FetchX509SVID(WATCH)
        await stream.read()
        await who(ours)
        _, stranger = await one.connect(one.context(None, "h2"))
        await one.until(lambda: len(one.index) == 3)
        one.bundles = BundleSet.of(A.bundle)
        assert one.listener.recheck() == 1  # who showed no certificate lost none
        stranger.close()
        await fails(stream.read())
        assert (await one.get(friend, "http/1.1"))[0] != 200
        one.bundles = BundleSet.of(A.bundle, B.bundle)
        assert one.listener.recheck() == 0
        assert (await one.get(friend, "http/1.1"))[0] == 200


async def test_a_new_identity_is_shown_to_new_connections(short: Path) -> None:
    async with port(short) as one:
        reader, writer = await one.connect(one.context(None))
        before = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
        one.identity = A.issue("/server")
        again_reader, again = await one.connect(one.context(None))
        after = again.get_extra_info("ssl_object").getpeercert(binary_form=True)
        assert before != after == one.identity.chain_der[0]
        for end in (writer, again):
            end.close()
        await asyncio.gather(reader.read(), again_reader.read())


async def test_when_it_is_full_the_oldest_stranger_makes_place(short: Path) -> None:
    async with port(short, max_connections=3) as one, one.dialer(A.issue("/agent")) as channel:
        await who(channel)
        # Over HTTP/2, where nothing else ends an idle one for minutes.
        strangers = [await one.connect(one.context(None, "h2")) for _ in range(2)]
        await one.until(lambda: len(one.index) == 3)
        assert (await asyncio.wait_for(one.get(None), 4))[0] == 200
        while await strangers[0][0].read(4096):
            pass
        assert len(one.index) == 2
        assert await who(channel) == "spiffe://a.example/agent"
        assert one.listener.connections <= 3
        for _, writer in strangers:
            writer.close()


async def test_a_stranger_does_not_stay_for_ever(short: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifetimes, "TICK", 0.01)
    async with port(short) as one:
        reader, writer = await one.connect(one.context(None, "h2"))
        await one.until(lambda: len(one.index) == 1)
        one.clock.step = tls_listener.ANONYMOUS_LIFETIME + dt.timedelta(seconds=1)
        while await reader.read(4096):
            pass
        await one.until(lambda: one.listener.connections == 0)
        writer.close()


@pytest.mark.parametrize("missing", ["grpc_backend", "http_app"])
async def test_a_protocol_without_a_backend_is_refused(short: Path, missing: str) -> None:
    async with port(short, **{missing: None}) as one:
        if missing == "http_app":
            assert (await one.get(None, "http/1.1"))[0] == 403
            async with one.dialer(None) as channel:
                assert await who(channel) == "anonymous"
        else:
            async with one.dialer(None) as channel:
                assert (await fails(who(channel))).code() is grpc.StatusCode.UNAVAILABLE
            assert (await one.get(None, "http/1.1"))[0] == 200
        assert set(one.refusals) == {"protocol_not_served"}


async def test_stop_lets_a_request_in_progress_end(short: Path) -> None:
    async with port(short) as one:
        reader, writer = await one.connect(one.context(None, "http/1.1"))
        idle_reader, idle = await one.connect(one.context(None, "http/1.1"))
        writer.write(b"GET /slow HTTP/1.1\r\nhost: x\r\n\r\n")
        await one.until(lambda: one.listener.connections == 2)
        await asyncio.sleep(0.02)
        stopping = asyncio.create_task(one.listener.stop(grace=5))
        assert await idle_reader.read() == b""
        one.app_gate.set()
        assert (await response(reader))[0] == 200
        await stopping
        await one.listener.stop()
        assert one.listener.connections == 0
        for end in (writer, idle):
            end.close()


async def test_a_port_that_is_taken_is_the_operators_business(short: Path) -> None:
    async with port(short) as one:
        other = TlsListener(
            host="127.0.0.1", port=one.listener.port, context=lambda: None, bundles=lambda: one.bundles,
            clock=one.clock, index=one.index, grpc_backend=None, http_app=one.app,
        )  # fmt: skip
        with pytest.raises(Misconfigured) as caught:
            await other.start()
        assert caught.value.reason == "address_unavailable"
        await other.stop()


async def test_a_server_without_an_identity_yet_closes_and_lives(short: Path) -> None:
    async with port(short) as one:
        listener_context = one.listener._context

        def nothing_yet() -> ssl.SSLContext:
            raise BrokerError("no identity yet", code="starting")

        one.listener._context = nothing_yet
        with pytest.raises((ssl.SSLError, ConnectionError)):
            await one.connect(one.context(None))
        await one.until(lambda: one.refusals == ["starting"])
        one.listener._context = listener_context
        assert (await one.get(None))[0] == 200
