"""The dialer against a plain TLS server of real certificates, with a real gRPC server behind it."""

import asyncio
import socket
import ssl
import stat
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from broker._proto.service import Stub, handler
from broker._proto.spiffe import workload_pb2
from broker.errors import Invalid, Misconfigured, Refused
from broker.spiffe import BundleSet, SpiffeId
from broker.transport import dialer as module
from broker.transport import lifetimes
from broker.transport.callers import CallerIndex
from broker.transport.dialer import SpiffeDialer
from broker.transport.grpc_server import CallGuard, PrivateGrpcServer
from broker.transport.tls import TlsIdentity, TlsPeer, roots_of, server_context
from broker.transport.tls_listener import TlsListener
from tests.unit.transport.clocks import HandClock
from tests.unit.transport.pki import HOUR, Authority
from tests.unit.transport.services import STREAM, UNARY, WORKLOAD, WhoAmI

A, B = Authority("a.example"), Authority("b.example")
SERVER_ID = SpiffeId("spiffe://a.example/spire/server")
ASK, WATCH = workload_pb2.JWTSVIDRequest(), workload_pb2.X509SVIDRequest()


@dataclass
class Server:
    clock: HandClock = field(default_factory=HandClock)
    identity: TlsIdentity = field(default_factory=lambda: A.issue("/spire/server", lifetime=24 * HOUR))
    alpn: tuple[str, ...] = ("h2",)
    port: int = 0
    connections: int = 0
    open: Callable[[], int] = lambda: 0

    def context(self) -> ssl.SSLContext:
        self.connections += 1
        return server_context(self.identity, roots_of(BundleSet.of(A.bundle, B.bundle)), alpn=self.alpn)

    def dialer(self, **options: Any) -> SpiffeDialer:
        settings: dict[str, Any] = {
            "identity": lambda: None,
            "bundles": lambda: BundleSet.of(A.bundle, B.bundle),
            "expect": SERVER_ID,
            "clock": self.clock,
        }
        return SpiffeDialer(f"127.0.0.1:{self.port}", **(settings | options))


@asynccontextmanager
async def served(directory: Path) -> AsyncIterator[Server]:
    one = Server()
    index: CallerIndex[TlsPeer] = CallerIndex()
    guard = CallGuard(index, {UNARY: lambda _: None, STREAM: lambda _: None})
    backend = PrivateGrpcServer(directory / "private" / "s", [handler(WORKLOAD, WhoAmI(), guard)])
    listener = TlsListener(
        host="127.0.0.1", port=0, context=one.context, bundles=lambda: BundleSet.of(A.bundle, B.bundle),
        clock=one.clock, index=index, grpc_backend=backend.path, http_app=None,
    )  # fmt: skip
    await backend.start()
    await listener.start()
    one.port, one.open = listener.port, lambda: listener.connections
    try:
        yield one
    finally:
        await listener.stop()
        await backend.stop(0)


async def call(channel: grpc.aio.Channel) -> workload_pb2.JWTSVIDResponse:
    answer: workload_pb2.JWTSVIDResponse = await Stub(channel, WORKLOAD).FetchJWTSVID(ASK, timeout=30)
    return answer


async def unavailable(channel: grpc.aio.Channel) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call(channel)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_calls_the_server_it_expects_and_leaves_nothing_behind(short: Path) -> None:
    async with served(short) as one:
        dialer = one.dialer(directory=short)
        async with dialer as channel:
            assert (await call(channel)).svids
            (place,) = short.glob("broker-*")
            assert stat.S_IMODE(place.stat().st_mode) == 0o700
            assert dialer.last_error is None
        assert not list(short.glob("broker-*"))


async def test_a_name_is_resolved_and_proves_nothing(short: Path) -> None:
    async with served(short) as one:
        dialer = one.dialer()
        dialer._host = "localhost"
        async with dialer as channel:
            assert (await call(channel)).svids


@pytest.mark.parametrize(
    ("identity", "words"),
    [
        (A.issue("/spire/agent"), "server_unexpected"),
        (B.issue("spiffe://a.example/spire/server"), "does not verify"),
        (B.issue("/spire/server"), "does not verify"),
        (A.issue("/spire/server", "/other"), "svid_uri_count"),
        (A.issue("/spire/server", lifetime=-HOUR, age=2 * HOUR), "expired"),
    ],
    ids=["other id", "right id of the wrong authority", "same path elsewhere", "two ids", "expired"],
)
async def test_any_other_server_is_unavailable_with_its_reason(short: Path, identity: TlsIdentity, words: str) -> None:
    async with served(short) as one:
        one.identity = identity
        dialer = one.dialer()
        async with dialer as channel:
            await unavailable(channel)
            assert words in str(dialer.last_error)
            async with asyncio.timeout(30):
                while one.open():  # it is not held on to either
                    await asyncio.sleep(0.01)


async def test_a_refused_server_is_not_dialled_in_a_hot_loop(short: Path) -> None:
    async with served(short) as one:
        one.identity = A.issue("/spire/agent")
        async with one.dialer() as channel:
            with pytest.raises(grpc.aio.AioRpcError):
                await Stub(channel, WORKLOAD).FetchJWTSVID(ASK, timeout=1, wait_for_ready=True)
        assert one.connections <= 5


async def test_a_server_without_http2_is_unavailable(short: Path) -> None:
    async with served(short) as one:
        one.alpn = ("http/1.1",)
        dialer = one.dialer()
        async with dialer as channel:
            await unavailable(channel)
            assert "protocol_not_served" in str(dialer.last_error)


async def test_nothing_is_dialled_without_a_bundle(short: Path) -> None:
    async with served(short) as one:
        dialer = one.dialer(bundles=lambda: BundleSet.of(B.bundle))
        async with dialer as channel:
            await unavailable(channel)
            assert "no_bundle" in str(dialer.last_error)
        assert one.connections == 0


async def test_first_contact_by_the_unsafe_door_only_while_there_is_no_bundle(short: Path) -> None:
    async with served(short) as one:
        seen: list[bytes] = []
        bundles = BundleSet()
        dialer = one.dialer(bundles=lambda: bundles, unsafe_accept_any_server=lambda chain: seen.append(chain[0]))
        async with dialer as channel:
            assert (await call(channel)).svids
            assert seen == [one.identity.chain_der[0]]
            bundles = BundleSet.of(A.bundle)
            # Neither another authority's server nor another workload of ours.
            for other, words in (
                (A.issue("/spire/agent"), "server_unexpected"),
                (B.issue("/spire/server"), "does not verify"),
            ):
                one.identity = other
                dialer.reconnect()
                async with asyncio.timeout(30):
                    while words not in str(dialer.last_error):
                        await unavailable(channel)
            assert len(seen) == 1


async def test_the_unsafe_door_may_refuse(short: Path) -> None:
    def never(chain: tuple[bytes, ...]) -> None:
        raise Refused("not the pinned one", code="pin")

    async with served(short) as one:
        dialer = one.dialer(bundles=BundleSet, unsafe_accept_any_server=never)
        async with dialer as channel:
            await unavailable(channel)
            assert "pin" in str(dialer.last_error)


async def test_reconnect_presents_the_identity_of_then(short: Path) -> None:
    async with served(short) as one:
        mine = A.issue("/old")
        dialer = one.dialer(identity=lambda: mine)
        async with dialer as channel:
            assert "/old" in (await call(channel)).svids[0].spiffe_id
            mine = A.issue("/new")
            assert "/old" in (await call(channel)).svids[0].spiffe_id
            dialer.reconnect()
            async with asyncio.timeout(30):
                while True:
                    try:
                        answer = await call(channel)
                        break
                    except grpc.aio.AioRpcError:  # the call met the old connection's end
                        continue
            assert "/new" in answer.svids[0].spiffe_id


async def test_a_connection_ends_with_the_servers_svid(short: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifetimes, "TICK", 0.01)
    async with served(short) as one:
        mine = HandClock()
        one.identity = A.issue("/spire/server", lifetime=HOUR)
        async with one.dialer(clock=mine) as channel:
            stream = Stub(channel, WORKLOAD).FetchX509SVID(WATCH)
            await stream.read()
            mine.step = 2 * HOUR
            with pytest.raises(grpc.aio.AioRpcError):
                await stream.read()


async def test_a_server_that_comes_later_is_found(short: Path) -> None:
    told: list[str] = []
    nobody = SpiffeDialer(
        "127.0.0.1:9", identity=lambda: None, bundles=lambda: BundleSet.of(A.bundle), expect=SERVER_ID,
        clock=HandClock(), on_failed=told.append,
    )  # fmt: skip
    async with nobody as channel:
        await unavailable(channel)
        await unavailable(channel)
        assert told == [nobody.last_error]  # once for each reason
        assert "ConnectionRefused" in str(nobody.last_error)
        async with served(short) as one:
            nobody._port = one.port  # the server came up
            assert (await Stub(channel, WORKLOAD).FetchJWTSVID(ASK, timeout=30, wait_for_ready=True)).svids
            assert nobody.last_error is None


def silent() -> socket.socket:
    """A port where the kernel takes connections and nobody ever answers."""
    return socket.create_server(("127.0.0.1", 0))


def dialled(server: socket.socket) -> SpiffeDialer:
    return SpiffeDialer(
        f"127.0.0.1:{server.getsockname()[1]}",
        identity=lambda: None,
        bundles=lambda: BundleSet.of(A.bundle),
        expect=SERVER_ID,
        clock=HandClock(),
    )


async def test_a_server_that_says_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CONNECT_DEADLINE", 0.2)
    with silent() as server:
        dialer = dialled(server)
        async with dialer as channel:
            await unavailable(channel)
            assert dialer.last_error == "no answer in time"


async def test_a_slow_network_is_not_taken_for_a_dead_server(short: Path) -> None:
    async with served(short) as one:
        relays: list[asyncio.Task[None]] = []

        async def slowly(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            relays.append(asyncio.current_task())
            await asyncio.sleep(0.6)  # longer than gRPC's first back-off
            back, there = await asyncio.open_connection("127.0.0.1", one.port)

            async def copy(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
                while chunk := await source.read(65536):
                    target.write(chunk)
                target.close()

            try:
                await asyncio.gather(copy(reader, there), copy(back, writer))
            finally:
                there.close()
                writer.close()

        proxy = await asyncio.start_server(slowly, "127.0.0.1", 0)
        target, one.port = one.port, proxy.sockets[0].getsockname()[1]
        dialer = one.dialer()
        one.port = target
        async with dialer as channel:
            assert (await call(channel)).svids
        assert one.connections == 1
        proxy.close()
        await asyncio.gather(*relays, return_exceptions=True)


async def test_another_process_cannot_borrow_our_connection(short: Path) -> None:
    script = "import socket,sys; s=socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); print(s.recv(9))"
    async with served(short) as one, one.dialer(directory=short) as channel:
        await call(channel)
        before = one.connections
        (place,) = short.glob("broker-*/s")
        process = await asyncio.create_subprocess_exec(sys.executable, "-c", script, place, stdout=subprocess.PIPE)
        out, _ = await process.communicate()
        assert out == b"b''\n"
        assert one.connections == before


async def test_closing_in_the_middle_of_a_handshake_leaves_nothing() -> None:
    def descriptors() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    with silent() as server:
        before = descriptors()
        dialer = dialled(server)
        async with dialer as channel:
            pending = asyncio.ensure_future(call(channel))
            async with asyncio.timeout(30):
                while not dialer._open:
                    await asyncio.sleep(0.001)
            await asyncio.sleep(0.02)
        with pytest.raises((grpc.aio.AioRpcError, asyncio.CancelledError, grpc.aio.UsageError)):
            await pending
        assert dialer._open == {}
        async with asyncio.timeout(30):
            while descriptors() > before:
                await asyncio.sleep(0.005)


@pytest.mark.parametrize("address", ["", "host", ":1", "host:", "host:0", "host:70000", "host:\uff11", "host:-1"])
def test_an_address_is_host_and_port(address: str) -> None:
    with pytest.raises(Invalid):
        SpiffeDialer(address, identity=lambda: None, bundles=BundleSet, expect=SERVER_ID, clock=HandClock())


async def test_a_directory_too_deep_for_a_socket_is_the_operators_business(short: Path) -> None:
    deep = short / ("x" * 100)
    deep.mkdir()
    dialer = SpiffeDialer(
        "[::1]:1", identity=lambda: None, bundles=BundleSet, expect=SERVER_ID, clock=HandClock(), directory=deep
    )
    with pytest.raises(Misconfigured):
        async with dialer:
            pass
    assert list(deep.iterdir()) == []
