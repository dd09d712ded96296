"""Many callers, or few descriptors, before the Unix listener: the honest are served, and it comes back by itself."""

import asyncio
import json
import resource
import socket
import subprocess
import sys
import time
from pathlib import Path

import grpc
import grpc.aio
import pytest

from broker._proto.service import Stub
from broker.transport.acceptor import RESERVED_FDS, connection_room
from broker.transport.flood import RESET_BURST
from broker.transport.unix_listener import FDS_PER_CONNECTION
from tests.unit.transport.services import WORKLOAD
from tests.unit.transport.unix_house import ASK, SOURCES, connect, house


@pytest.mark.alone("how long others wait is measured")
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
        async with asyncio.timeout(30):
            try:
                while await reader.read(65536):
                    pass
            except ConnectionError:
                pass
        await one.until(lambda: "http2_flood" in one.refusals)
        assert slowest < 20  # it is the very process that attacks; others are looked at in tests/attacks/workload_api
        writer.close()


@pytest.mark.alone("how long others wait is measured")
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
                assert time.monotonic() - began < 20
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
from tests.unit.transport import unix_house as t
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
        assert (await stub.FetchJWTSVID(ASK, timeout=30)).svids  # the one connected before is still served
        for sock in idle:
            sock.close()
    began = time.monotonic()
    async with grpc.aio.insecure_channel(f"unix:{path}") as channel:
        while True:
            try:
                await Stub(channel, WORKLOAD).FetchJWTSVID(ASK, timeout=2, wait_for_ready=True)
                break
            except grpc.aio.AioRpcError:
                assert time.monotonic() - began < 30
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
