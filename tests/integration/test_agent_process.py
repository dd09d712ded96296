"""The agent as a process of its own: it stops, hardens itself, and survives the races that need it stopped."""

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import grpc
import pytest

from broker._proto.service import Stub
from broker._proto.spiffe import workload_pb2
from broker.agent.listener import WORKLOAD
from tests.fakes.agent_estate import running
from tests.fakes.processes import agent_process
from tests.fakes.running_agent import HEADER


@pytest.mark.bears("W16")
async def test_it_stops_within_ten_seconds_with_streams_open_and_removes_its_socket() -> None:
    async with running() as agent, agent.channel() as channel:
        stub = Stub(channel, WORKLOAD)
        calls = [stub.FetchX509SVID(workload_pb2.X509SVIDRequest(), metadata=HEADER) for _ in range(50)]
        assert all(await asyncio.gather(*(call.read() for call in calls)))
        agent.process.send_signal(signal.SIGTERM)
        agent.process.send_signal(signal.SIGTERM)
        assert await asyncio.wait_for(agent.process.wait(), 10) == 0
        assert not agent.socket.exists()


@pytest.mark.bears("W15", "W16", "O02")
async def test_killed_and_started_again_it_serves_without_a_new_token() -> None:
    async with running() as agent:
        assert (await agent.fetch()).svids
        agent.process.kill()
        await agent.process.wait()
        assert agent.socket.exists()  # left behind, and safely replaced
        async with agent_process(agent.directory, (agent.directory / "agent.toml").read_text()) as again:
            agent.process = again
            async with agent.channel() as channel:
                call = Stub(channel, WORKLOAD).FetchX509SVID(workload_pb2.X509SVIDRequest(), metadata=HEADER)
                async with asyncio.timeout(30):
                    while True:
                        try:
                            assert (await call.read()).svids
                            break
                        except grpc.aio.AioRpcError:
                            await asyncio.sleep(0.1)
                            call = Stub(channel, WORKLOAD).FetchX509SVID(
                                workload_pb2.X509SVIDRequest(), metadata=HEADER
                            )
            assert agent.server.attestations == ["token-1"]


@pytest.mark.bears("A25")
async def test_its_memory_is_closed_to_its_own_user() -> None:
    async with running() as agent:
        directory = Path(f"/proc/{agent.process.pid}")
        limits = (directory / "limits").read_text()
        (line,) = [line for line in limits.splitlines() if line.startswith("Max core file size")]
        assert line.split()[4:6] == ["0", "0"]
        # A process that is not dumpable belongs to root in /proc.
        assert (directory / "environ").stat().st_uid == 0
        assert "token-1" not in (directory / "cmdline").read_text() if os.geteuid() == 0 else True
        agent.process.send_signal(signal.SIGABRT)
        await agent.process.wait()
        assert not list(Path.cwd().glob("core*"))


async def test_a_refused_join_is_an_error_that_ends_it() -> None:
    async with running(ready=False, join_token="wrong") as agent:
        assert await asyncio.wait_for(agent.process.wait(), 20) == 1
        said = agent.process.log.read_text()
        assert "join token does not exist or has already been used" in said
        assert "wrong" not in said


async def test_two_agents_do_not_share_a_socket() -> None:
    async with running() as agent:
        script = "import os,sys\nfrom pathlib import Path\nfrom broker.agent.program import run\nfrom broker.agent.settings import load\nrun(load(Path(sys.argv[1]), os.environ))"
        second = await asyncio.create_subprocess_exec(
            sys.executable, "-c", script, str(agent.directory / "agent.toml"), stderr=subprocess.PIPE
        )
        _, said = await asyncio.wait_for(second.communicate(), 20)
        assert second.returncode == 1
        assert b"another agent holds" in said
        assert (await agent.fetch()).svids
