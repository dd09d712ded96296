"""The identifying Unix listener with a real gRPC server behind it and real processes before it."""

import asyncio
import json
import os
import resource
import socket
import subprocess
import sys
import time
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
from broker.errors import BrokerError, Misconfigured, Refused
from broker.transport import unix_listener as module
from broker.transport.acceptor import RESERVED_FDS, connection_room
from broker.transport.callers import CallerIndex
from broker.transport.flood import RESET_BURST
from broker.transport.grpc_server import CallGuard, PrivateGrpcServer
from broker.transport.peercred import KernelPeer
from broker.transport.unix_listener import FDS_PER_CONNECTION, UnixListener
from tests.unit.transport.services import STREAM, UNARY, WORKLOAD, WhoAmI

ASK = workload_pb2.JWTSVIDRequest(audience=["x"])
WATCH = workload_pb2.X509SVIDRequest()
SOURCES = Path(__file__).parents[3]

CLIENT = """
import grpc, os, sys
from broker._proto.service import Stub
from broker._proto.spiffe import workload_pb2
from tests.unit.transport.services import WORKLOAD
with grpc.insecure_channel("unix:" + sys.argv[1]) as channel:
    print(Stub(channel, WORKLOAD).FetchJWTSVID(workload_pb2.JWTSVIDRequest(), timeout=10).svids[0].spiffe_id)
"""


@dataclass
class House:
    path: Path
    service: WhoAmI = field(default_factory=WhoAmI)
    refusals: list[str] = field(default_factory=list)
    closed: list[int] = field(default_factory=list)
    index: CallerIndex[int] = field(default_factory=CallerIndex)
    listener: UnixListener[int] = field(init=False)

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(10):
            while not condition():
                await asyncio.sleep(0.005)

    def channel(self) -> grpc.aio.Channel:
        return grpc.aio.insecure_channel(f"unix:{self.path}", options=[("grpc.use_local_subchannel_pool", 1)])


@asynccontextmanager
async def house(
    directory: Path, admit: Callable[[KernelPeer], int] = lambda peer: peer.pid, **options: Any
) -> AsyncIterator[House]:
    """Callers are known by their pid."""
    one = House(directory / "api.sock")
    guard = CallGuard(one.index, {UNARY: lambda _: None, STREAM: lambda _: None})
    server = PrivateGrpcServer(directory / "private" / "s", [handler(WORKLOAD, one.service, guard)])
    one.listener = UnixListener(
        one.path,
        mode=0o777,
        backend=server.path,
        index=one.index,
        admit=admit,
        on_closed=one.closed.append,
        on_refusal=lambda error, _: one.refusals.append(error.reason),
        **options,
    )
    await server.start()
    await one.listener.start()
    try:
        yield one
    finally:
        await one.listener.stop()
        await server.stop(0)


async def run(*argv: str) -> str:
    process = await asyncio.create_subprocess_exec(*argv, stdout=subprocess.PIPE, cwd=SOURCES)
    out, _ = await process.communicate()
    assert process.returncode == 0
    return out.decode().strip()


async def connect(path: Path) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_unix_connection(path)


async def test_each_process_is_known_by_its_own_pid(short: Path) -> None:
    async with house(short) as one:
        script = f"import os; print(os.getpid(), flush=True)\n{CLIENT}"
        answers = await asyncio.gather(*(run(sys.executable, "-c", script, str(one.path)) for _ in range(2)))
        pids = [answer.split() for answer in answers]
        assert all(own == seen for own, seen in pids)
        assert pids[0] != pids[1]
        await one.until(lambda: not one.listener.connections)
        assert len(one.index) == 0
        assert sorted(one.closed) == sorted(int(own) for own, _ in pids)


@pytest.mark.bears("W02")
async def test_metadata_cannot_say_who_calls(short: Path) -> None:
    async with house(short) as one, one.channel() as channel:
        forged = (("x-peer-pid", "1"), ("x-spiffe-id", "spiffe://a.example/admin"), ("x-forwarded-for", "unix:1"))
        answer = await Stub(channel, WORKLOAD).FetchJWTSVID(ASK, metadata=forged)
        assert answer.svids[0].spiffe_id == str(os.getpid())


async def test_a_peer_that_died_before_accept_is_refused(short: Path) -> None:
    async with house(short) as one:
        pid = os.fork()  # the loop of this process does not turn before the child is reaped
        if pid == 0:
            with socket.socket(socket.AF_UNIX) as sock:
                sock.connect(str(one.path))
                os._exit(0)
        os.waitpid(pid, 0)
        await one.until(lambda: bool(one.refusals))
        assert one.refusals == ["peer_gone"]
        assert one.listener.connections == 0


async def test_a_connection_ends_with_its_process_though_a_child_holds_it(short: Path) -> None:
    script = (
        "import os, socket, sys\n"
        "s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1])\n"
        "if os.fork(): sys.stdin.read(1); os._exit(0)\n"
        "print('up', flush=True); \n"
        "while s.recv(1000): pass\n"
        "print(True, flush=True)\n"
    )
    async with house(short) as one:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", script, str(one.path), stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert process.stdin
        assert process.stdout
        await process.stdout.readline()
        await one.until(lambda: one.listener.connections == 1)
        process.stdin.write(b"x")  # the parent exits; its child still has the socket
        assert await process.stdout.readline() == b"True\n"
        await one.until(lambda: one.listener.connections == 0)
        assert one.closed == [process.pid]
        await process.communicate()


async def test_drop_ends_a_stream_and_stop_ends_all(short: Path) -> None:
    async with house(short) as one, one.channel() as channel:
        stream = Stub(channel, WORKLOAD).FetchX509SVID(WATCH)
        await stream.read()
        assert one.listener.drop(lambda pid: pid != os.getpid()) == 0
        assert one.listener.drop(lambda pid: pid == os.getpid()) == 1
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stream.read()
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        await one.until(lambda: one.service.streams == 0)
    async with house(short) as one, one.channel() as channel:
        again = Stub(channel, WORKLOAD).FetchX509SVID(WATCH)
        await again.read()
        await one.listener.stop()
        await one.listener.stop()
        assert one.listener.connections == 0
        assert not one.path.exists()
        with pytest.raises(grpc.aio.AioRpcError):
            await again.read()


async def test_who_is_not_admitted_is_closed_and_told_of(short: Path) -> None:
    def nobody(peer: KernelPeer) -> int:
        raise Refused("not today", code="not_today")

    async with house(short, nobody) as one:
        reader, writer = await connect(one.path)
        assert await reader.read() == b""
        writer.close()
        assert one.refusals == ["not_today"]
        assert one.closed == []


async def test_a_defect_of_admit_costs_one_connection_only(short: Path) -> None:
    turns: list[int] = []
    told: list[Any] = []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, context: told.append(context["exception"]))

    def clumsy(peer: KernelPeer) -> int:
        turns.append(peer.pid)
        if len(turns) == 1:
            raise ValueError
        return peer.pid

    async with house(short, clumsy) as one:
        reader, writer = await connect(one.path)
        assert await reader.read() == b""
        writer.close()
        async with one.channel() as channel:
            assert (await Stub(channel, WORKLOAD).FetchJWTSVID(ASK)).svids
        assert [type(error) for error in told] == [ValueError]


async def test_one_user_cannot_take_all_places(short: Path) -> None:
    async with house(short, max_connections=4) as one:
        clients = [await connect(one.path) for _ in range(4)]
        await one.until(lambda: bool(one.refusals))
        assert one.refusals == ["too_many_connections"]
        assert one.listener.connections == 3
        clients[0][1].close()
        await one.until(lambda: one.listener.connections == 2)
        clients.append(await connect(one.path))
        await one.until(lambda: one.listener.connections == 3)
        for _, writer in clients:
            writer.close()


async def test_a_full_house_leaves_callers_waiting_and_serves_them_later(short: Path) -> None:
    async with house(short, max_connections=1) as one:
        first = await connect(one.path)
        await one.until(lambda: one.listener.connections == 1)
        async with one.channel() as channel:
            call = asyncio.ensure_future(Stub(channel, WORKLOAD).FetchJWTSVID(ASK, timeout=10))
            await asyncio.sleep(0.05)
            assert not call.done()
            first[1].close()
            assert (await call).svids


@pytest.mark.bears("W12")
async def test_garbage_is_closed_without_a_word(short: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with house(short) as one:
        for garbage in (b"GET / HTTP/1.1\r\nhost: x\r\n\r\n", b"\x16\x03\x01\x02\x00\x01" * 50, bytes(65536)):
            reader, writer = await connect(one.path)
            writer.write(garbage)
            async with asyncio.timeout(5):
                with_end = await reader.read()
            assert b"workload" not in with_end
            writer.close()
        await one.until(lambda: one.listener.connections == 0)
        async with one.channel() as channel:
            assert (await Stub(channel, WORKLOAD).FetchJWTSVID(ASK)).svids
    assert [record for record in caplog.records if record.levelname not in {"DEBUG", "INFO"}] == []


@pytest.mark.bears("W07")
async def test_rapid_reset_is_cut_and_bystanders_are_served(short: Path) -> None:
    settings = b"\0\0\0\4\0\0\0\0\0"
    headers = b"\x83\x86\x84\x41\x01x"  # POST, http, /, authority x

    def reset(stream: int) -> bytes:
        number = stream.to_bytes(4, "big")
        head = len(headers).to_bytes(3, "big") + b"\x01\x04" + number + headers
        return head + b"\0\0\4\3\0" + number + b"\0\0\0\x08"

    async with house(short) as one, one.channel() as channel:
        stub = Stub(channel, WORKLOAD)
        await stub.FetchJWTSVID(ASK)
        reader, writer = await connect(one.path)
        writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + settings)
        slowest = 0.0
        for stream in range(1, 2 * 4 * RESET_BURST, 2):
            if writer.transport.is_closing():
                break
            writer.write(reset(stream))
            if stream % 401 == 0:
                began = time.monotonic()
                await stub.FetchJWTSVID(ASK)
                slowest = max(slowest, time.monotonic() - began)
        async with asyncio.timeout(10):
            try:
                while await reader.read(65536):
                    pass
            except ConnectionError:
                pass
        await one.until(lambda: "http2_flood" in one.refusals)
        assert slowest < 1  # it is the very process that attacks; others are looked at in tests/attacks/workload_api
        writer.close()


@pytest.mark.bears("W10")
async def test_a_thousand_silent_connections_do_not_keep_an_honest_caller_waiting(short: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 1000 * (FDS_PER_CONNECTION + 1) + 2 * RESERVED_FDS
    if hard < wanted:
        pytest.skip(f"needs {wanted} descriptors")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted * 2), hard))
    idle: list[socket.socket] = []
    try:
        async with house(short) as one, one.channel() as channel:
            stub = Stub(channel, WORKLOAD)
            await stub.FetchJWTSVID(ASK)
            for turn in range(1000):
                sock = socket.socket(socket.AF_UNIX)
                sock.setblocking(False)
                idle.append(sock)
                while sock.connect_ex(str(one.path)):
                    await asyncio.sleep(0.001)
                if turn % 100 == 0:
                    await asyncio.sleep(0)
            await one.until(lambda: one.listener.connections == 1001)
            times = []
            for _ in range(100):
                began = time.monotonic()
                await stub.FetchJWTSVID(ASK)
                times.append(time.monotonic() - began)
            async with one.channel() as fresh:
                began = time.monotonic()
                await Stub(fresh, WORKLOAD).FetchJWTSVID(ASK)
                assert time.monotonic() - began < 0.5
            assert sorted(times)[95] < 0.1
            for sock in idle:
                sock.close()
            await one.until(lambda: one.listener.connections <= 1)
    finally:
        for sock in idle:
            sock.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


EXHAUSTED = """
import asyncio, json, resource, sys, time
from pathlib import Path
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
from tests.unit.transport import test_unix_listener as t
from broker.transport import acceptor, unix_listener

async def main():
    if sys.argv[2] == "starved":
        # As if descriptors were taken behind the listener's back: its own count says there is room.
        unix_listener.connection_room = lambda wanted, each: wanted
    async with t.house(Path(sys.argv[1])) as one:
        print("up", flush=True)
        loop = asyncio.get_running_loop()
        while line := (await loop.run_in_executor(None, sys.stdin.readline)).strip():
            if line == "cpu":
                before = time.process_time()
                await asyncio.sleep(1)
                print(json.dumps([time.process_time() - before, one.listener.connections]), flush=True)

asyncio.run(main())
"""


@pytest.mark.bears("W11")
@pytest.mark.parametrize("how", ["counted", "starved"])
async def test_few_descriptors_neither_spin_nor_crash_and_service_comes_back(short: Path, how: str) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", EXHAUSTED, str(short), how,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=SOURCES,
    )  # fmt: skip
    assert process.stdin
    assert process.stdout
    assert await process.stdout.readline() == b"up\n"
    path = short / "api.sock"
    async with grpc.aio.insecure_channel(f"unix:{path}") as channel:
        stub = Stub(channel, WORKLOAD)
        await stub.FetchJWTSVID(ASK)
        idle = []
        for _ in range(300):
            sock = socket.socket(socket.AF_UNIX)
            sock.setblocking(False)
            sock.connect_ex(str(path))
            idle.append(sock)
        process.stdin.write(b"cpu\n")
        spent, connections = json.loads(await process.stdout.readline())
        assert spent < 0.5
        assert 0 < connections < 256
        assert (await stub.FetchJWTSVID(ASK, timeout=5)).svids  # the one connected before is still served
        for sock in idle:
            sock.close()
    began = time.monotonic()
    async with grpc.aio.insecure_channel(f"unix:{path}") as channel:
        while True:
            try:
                await Stub(channel, WORKLOAD).FetchJWTSVID(ASK, timeout=2, wait_for_ready=True)
                break
            except grpc.aio.AioRpcError:
                assert time.monotonic() - began < 5
    process.stdin.write(b"\n")
    _, errors = await process.communicate()
    assert process.returncode == 0
    assert b"Traceback" not in errors


def test_room_follows_the_limit_of_open_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (RESERVED_FDS + 40, 0))
    assert connection_room(100, 4) == 10
    assert connection_room(3, 4) == 3
    monkeypatch.setattr(resource, "getrlimit", lambda _: (10, 0))
    assert connection_room(100, 4) == 1


async def test_a_bad_place_is_refused_before_anything_listens(short: Path) -> None:
    (short / "open").mkdir()
    (short / "open").chmod(0o777)
    index: CallerIndex[int] = CallerIndex()
    listener = UnixListener(
        short / "open" / "s", mode=0o600, backend=short / "b", index=index, admit=lambda peer: peer.pid
    )
    with pytest.raises(Misconfigured):
        await listener.start()
    await listener.stop()


@pytest.mark.bears("A19", "A20")
async def test_a_socket_that_is_removed_comes_back_and_open_connections_stay(
    short: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LOOK_EVERY", 0.05)
    async with house(short) as one, one.channel() as before:
        stub = Stub(before, WORKLOAD)
        await stub.FetchJWTSVID(ASK)
        was = one.path.stat()
        one.path.unlink()
        await one.until(one.path.exists)
        assert one.path.stat().st_mode == was.st_mode
        assert (await stub.FetchJWTSVID(ASK)).svids
        async with one.channel() as after:
            assert (await Stub(after, WORKLOAD).FetchJWTSVID(ASK)).svids
        assert one.listener.connections == 2
    assert not one.path.exists()


@pytest.mark.bears("A19", "A20")
async def test_somebody_who_took_the_place_is_told_of_and_not_thrown_out(
    short: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with house(short) as one:
        one.path.unlink()
        with socket.socket(socket.AF_UNIX) as fake:
            fake.bind(str(one.path))
            fake.listen()
            theirs = one.path.stat().st_ino
            one.listener.look()
            assert "callers are led elsewhere" in caplog.text
            assert one.path.stat().st_ino == theirs
        # He is gone and his socket is dead: it is ours again.
        one.listener.look()
        async with one.channel() as channel:
            assert (await Stub(channel, WORKLOAD).FetchJWTSVID(ASK)).svids
    one.listener.look()  # after the end there is nothing to look after
    assert not one.path.exists()


async def test_nobody_behind_the_listener_closes_the_caller(short: Path) -> None:
    errors: list[BrokerError] = []
    listener = UnixListener(
        short / "s", mode=0o600, backend=short / "nobody", index=CallerIndex[int](), admit=lambda peer: peer.pid,
        on_refusal=lambda error, _: errors.append(error),
    )  # fmt: skip
    await listener.start()
    reader, writer = await connect(short / "s")
    assert await reader.read() == b""
    writer.close()
    async with asyncio.timeout(5):
        while listener.connections:
            await asyncio.sleep(0.005)
    assert [error.reason for error in errors] == ["unavailable"]
    await listener.stop()
