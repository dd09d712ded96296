"""The identifying Unix listener with a real gRPC server behind it and real processes before it."""

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from broker._proto.service import Context, Stub
from broker._proto.spiffe import workload_pb2
from broker.errors import BrokerError, Misconfigured, Refused
from broker.transport import unix_listener as module
from broker.transport.callers import CallerIndex
from broker.transport.peercred import KernelPeer
from broker.transport.unix_listener import UnixListener
from tests.unit.transport.services import WORKLOAD, WhoAmI
from tests.unit.transport.unix_house import ASK, WATCH, connect, house, run

CLIENT = """
import grpc, os, sys
from broker._proto.service import Stub
from broker._proto.spiffe import workload_pb2
from tests.unit.transport.services import WORKLOAD
with grpc.insecure_channel("unix:" + sys.argv[1]) as channel:
    print(Stub(channel, WORKLOAD).FetchJWTSVID(workload_pb2.JWTSVIDRequest(), timeout=30).svids[0].spiffe_id)
"""


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


class Kept(WhoAmI):
    """Keeps the contexts of its calls; unary ones wait for the gate, too."""

    def __init__(self, error: Exception | None = None) -> None:
        super().__init__(error)
        self.contexts: list[Context] = []

    async def FetchJWTSVID(self, request: Any, context: Context, caller: Any) -> workload_pb2.JWTSVIDResponse:
        self.contexts.append(context)
        await self.gate.wait()
        return await super().FetchJWTSVID(request, context, caller)

    async def FetchX509SVID(
        self, request: Any, context: Context, caller: Any
    ) -> AsyncIterator[workload_pb2.X509SVIDResponse]:
        self.contexts.append(context)
        async for response in super().FetchX509SVID(request, context, caller):
            yield response


@pytest.mark.bears("A22")
@pytest.mark.parametrize("ends", [False, True], ids=["open", "ended"])
@pytest.mark.parametrize("error", [None, Refused("no")], ids=["answered", "refused"])
@pytest.mark.parametrize("method", ["FetchJWTSVID", "FetchX509SVID"])
async def test_no_status_is_sent_to_a_connection_that_has_ended(
    short: Path, method: str, error: BrokerError | None, ends: bool
) -> None:
    """What grpcio fails to send it never frees: some hundred bytes for each process that died with a call open."""
    service = Kept(error)
    async with house(short, service=service) as one, one.channel() as channel:
        call = getattr(Stub(channel, WORKLOAD), method)(ASK if method == "FetchJWTSVID" else WATCH)
        await one.until(lambda: bool(service.contexts))
        if method == "FetchX509SVID":
            await call.read()
        if ends:
            one.listener.drop(lambda _: True)
        service.gate.set()  # in the same moment: gRPC itself has not heard of the end
        with suppress(grpc.aio.AioRpcError):
            assert await (call if method == "FetchJWTSVID" else call.read())
        if ends:
            await one.until(lambda: call.done() and service.streams == 0)
            assert not service.contexts[0].done()
        else:
            await one.until(service.contexts[0].done)


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
            call = asyncio.ensure_future(Stub(channel, WORKLOAD).FetchJWTSVID(ASK, timeout=30))
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
            async with asyncio.timeout(30):
                with_end = await reader.read()
            assert b"workload" not in with_end
            writer.close()
        await one.until(lambda: one.listener.connections == 0)
        async with one.channel() as channel:
            assert (await Stub(channel, WORKLOAD).FetchJWTSVID(ASK)).svids
    assert [record for record in caplog.records if record.levelname not in {"DEBUG", "INFO"}] == []


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
    async with asyncio.timeout(30):
        while listener.connections:
            await asyncio.sleep(0.005)
    assert [error.reason for error in errors] == ["unavailable"]
    await listener.stop()
