"""The guard and the private server, over a real socket."""

import asyncio
import logging
import socket
import stat
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from broker._proto.service import Stub, handler
from broker._proto.spiffe import workload_pb2
from broker.errors import (
    BrokerError,
    Conflict,
    Invalid,
    InvalidToken,
    Misconfigured,
    NoIdentity,
    NotAttested,
    NotFound,
    PolicyDenied,
    Refused,
    Unavailable,
)
from broker.transport.callers import CallerIndex
from broker.transport.grpc_server import CallGuard, PrivateGrpcServer
from broker.transport.rpc_errors import from_rpc_error
from broker.transport.unix_listener import UnixListener
from tests.unit.transport.services import STREAM, UNARY, WORKLOAD, WhoAmI

OPEN: dict[str, Callable[[str], None]] = {UNARY: lambda _: None, STREAM: lambda _: None}
ASK = workload_pb2.JWTSVIDRequest(audience=["x"])


@asynccontextmanager
async def called(
    directory: Path, service: WhoAmI, *, access: dict[str, Callable[[str], None]] | None = None, **guard: Any
) -> AsyncIterator[Stub]:
    """A stub whose connection was admitted as ``tester``."""
    index: CallerIndex[str] = CallerIndex()
    wrap = CallGuard(index, OPEN if access is None else access, **guard)
    server = PrivateGrpcServer(directory / "private" / "s", [handler(WORKLOAD, service, wrap)])
    listener = UnixListener(
        directory / "front", mode=0o600, backend=server.path, index=index, admit=lambda peer: "tester"
    )
    await server.start()
    await listener.start()
    try:
        async with grpc.aio.insecure_channel(f"unix:{directory}/front") as channel:
            yield Stub(channel, WORKLOAD)
    finally:
        await server.stop(grace=0.1)
        await listener.stop()


async def failure(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


async def test_a_behaviour_gets_its_caller_unary_and_stream(short: Path) -> None:
    service = WhoAmI()
    async with called(short, service) as stub:
        assert (await stub.FetchJWTSVID(ASK)).svids[0].spiffe_id == "tester"
        stream = stub.FetchX509SVID(workload_pb2.X509SVIDRequest())
        assert (await stream.read()).svids[0].spiffe_id == "tester"
        service.gate.set()
        assert not (await stream.read()).svids
        assert await stream.read() is grpc.aio.EOF


@pytest.mark.bears("W03")
@pytest.mark.parametrize(
    ("error", "status"),
    [
        (Refused("no"), grpc.StatusCode.PERMISSION_DENIED),
        (NoIdentity("no identity issued"), grpc.StatusCode.PERMISSION_DENIED),
        (NotAttested("gone", hint="look"), grpc.StatusCode.PERMISSION_DENIED),
        (PolicyDenied("no", code="task_ended"), grpc.StatusCode.PERMISSION_DENIED),
        (Invalid("bad"), grpc.StatusCode.INVALID_ARGUMENT),
        (InvalidToken("bad"), grpc.StatusCode.INVALID_ARGUMENT),
        (NotFound("none"), grpc.StatusCode.NOT_FOUND),
        (Conflict("twice"), grpc.StatusCode.ALREADY_EXISTS),
        (Conflict("moved", code="stale_version"), grpc.StatusCode.ABORTED),
        (Unavailable("later"), grpc.StatusCode.UNAVAILABLE),
        (Misconfigured("operator"), grpc.StatusCode.INTERNAL),
    ],
)
async def test_the_table_of_errors(short: Path, error: BrokerError, status: grpc.StatusCode) -> None:
    service = WhoAmI(error)
    service.gate.set()
    async with called(short, service) as stub:
        unary = await failure(stub.FetchJWTSVID(ASK))
        stream = stub.FetchX509SVID(workload_pb2.X509SVIDRequest())
        await stream.read()
        for seen in (unary, await failure(stream.read())):
            assert seen.code() is status
            assert seen.details() == error.message
            told = from_rpc_error(seen)
            assert (told.reason, told.hint, told.message) == (error.reason, error.hint, error.message)


async def test_a_defect_shows_a_reference_and_no_text(short: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with called(short, WhoAmI(ValueError("secret-token"))) as stub:
        with caplog.at_level(logging.DEBUG):
            seen = await failure(stub.FetchJWTSVID(ASK))
    assert seen.code() is grpc.StatusCode.INTERNAL
    reference = seen.details().rpartition(" ")[2]
    assert reference in caplog.text
    assert "ValueError at" in caplog.text
    assert "secret-token" not in caplog.text + str(seen.details())


async def test_a_method_without_a_line_is_denied_to_everybody(short: Path) -> None:
    refusals: list[tuple[str, str | None, str]] = []
    async with called(
        short, WhoAmI(), access={}, on_refusal=lambda path, caller, error: refusals.append((path, caller, error.reason))
    ) as stub:
        seen = await failure(stub.FetchJWTSVID(ASK))
        assert seen.code() is grpc.StatusCode.PERMISSION_DENIED
        await failure(stub.FetchX509SVID(workload_pb2.X509SVIDRequest()).read())
    assert refusals == [(UNARY, None, "method_closed"), (STREAM, None, "method_closed")]


async def test_the_access_table_decides_by_the_caller(short: Path) -> None:
    def nobody(caller: str) -> None:
        raise Refused(f"not {caller}", code="not_admin")

    async with called(short, WhoAmI(), access={UNARY: nobody, STREAM: lambda _: None}) as stub:
        assert from_rpc_error(await failure(stub.FetchJWTSVID(ASK))).reason == "not_admin"
        await stub.FetchX509SVID(workload_pb2.X509SVIDRequest()).read()


@pytest.mark.parametrize("asked_each", [(), (STREAM,)])
async def test_the_table_is_asked_again_for_each_message_where_messages_are_requests(
    short: Path, asked_each: tuple[str, ...]
) -> None:
    asked = 0

    def once(caller: str) -> None:
        nonlocal asked
        asked += 1
        if asked > 1:
            raise Refused(f"{caller} is banned by now", code="agent_banned")

    async with called(short, WhoAmI(), access={STREAM: once}, asked_each=asked_each) as stub:
        stream = stub.FetchX509SVID(workload_pb2.X509SVIDRequest())
        if asked_each:
            assert from_rpc_error(await failure(stream.read())).reason == "agent_banned"
        else:
            assert (await stream.read()).svids


async def test_preflight_sees_metadata_before_anything_else(short: Path) -> None:
    def header(path: str, metadata: Any) -> None:
        if [value for key, value in metadata if key == "workload.spiffe.io"] != ["true"]:
            raise Invalid("security header missing from request", code="header_missing")

    async with called(short, WhoAmI(), access={UNARY: lambda _: None}, preflight=header) as stub:
        assert (await failure(stub.FetchJWTSVID(ASK))).code() is grpc.StatusCode.INVALID_ARGUMENT
        twice = (("workload.spiffe.io", "true"), ("workload.spiffe.io", "true"))
        assert (await failure(stub.FetchJWTSVID(ASK, metadata=twice))).code() is grpc.StatusCode.INVALID_ARGUMENT
        assert (await stub.FetchJWTSVID(ASK, metadata=twice[:1])).svids


async def test_whoever_comes_past_the_listener_is_refused(short: Path) -> None:
    async with called(short, WhoAmI()):
        async with grpc.aio.insecure_channel(f"unix:{short}/private/s") as channel:
            seen = await failure(Stub(channel, WORKLOAD).FetchJWTSVID(ASK))
        assert from_rpc_error(seen).reason == "peer_unknown"
        bound = socket.socket(socket.AF_UNIX)
        bound.bind("\0" + "cd" * 16)  # a well-formed name that nobody admitted
        bound.connect(str(short / "private/s"))
        bound.close()


@pytest.mark.bears("W06")
async def test_oversize_is_refused_and_the_next_call_served(short: Path) -> None:
    async with called(short, WhoAmI()) as stub:
        huge = workload_pb2.JWTSVIDRequest(audience=["x" * (4 * 1024 * 1024 + 1)])
        assert (await failure(stub.FetchJWTSVID(huge))).code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        many = tuple((f"key-{n}", "v" * 40) for n in range(1000))
        await failure(stub.FetchJWTSVID(ASK, metadata=many))
        bomb = workload_pb2.JWTSVIDRequest(audience=["\0" * (3 * 1024 * 1024)])
        packed = await failure(stub.FetchJWTSVID(bomb, compression=grpc.Compression.Gzip))
        assert packed.code() in {grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.INTERNAL}
        assert (await stub.FetchJWTSVID(ASK)).svids


async def test_its_directory_is_ours_alone_and_goes_with_it(short: Path) -> None:
    (short / "private").mkdir(mode=0o755)
    async with called(short, WhoAmI()):
        assert stat.S_IMODE((short / "private").stat().st_mode) == 0o700
    assert not (short / "private").exists()


@pytest.mark.parametrize("kind", ["file", "link"])
async def test_a_directory_that_is_none_of_ours_is_refused(short: Path, kind: str) -> None:
    place = short / "private"
    if kind == "file":
        place.write_text("")
    else:
        (short / "real").mkdir()
        place.symlink_to(short / "real")
    with pytest.raises(Misconfigured):
        await PrivateGrpcServer(place / "s", []).start()


async def test_a_socket_of_a_dead_server_is_replaced(short: Path) -> None:
    (short / "private").mkdir()
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(short / "private/s"))
    async with called(short, WhoAmI()) as stub:
        assert (await stub.FetchJWTSVID(ASK)).svids


async def test_a_caller_that_hangs_up_ends_its_stream(short: Path) -> None:
    service = WhoAmI()
    async with called(short, service) as stub:
        stream = stub.FetchX509SVID(workload_pb2.X509SVIDRequest())
        await stream.read()
        assert service.streams == 1
        stream.cancel()
        async with asyncio.timeout(30):
            while service.streams:
                await asyncio.sleep(0.005)
