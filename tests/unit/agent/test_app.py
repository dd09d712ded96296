"""The agent as a whole: start, stop, and a clock that is stepped."""

import os
import shutil
import signal
import tempfile
from datetime import timedelta
from pathlib import Path

import pytest

from broker.agent import clock_watch, program
from broker.agent.app import Agent
from broker.agent.settings import AgentSettings
from broker.errors import Misconfigured, Refused
from tests.fakes.fake_server import TD, FakeServer
from tests.fakes.running_agent import estate, until


async def test_it_listens_before_it_has_joined_and_leaves_nothing_behind() -> None:
    async with estate(synced=False, server_port=1) as agent:
        assert agent.socket.exists()
        assert not agent.agent.is_ready
        directory = agent.settings.runtime_dir
        agent.stop.set()
        await agent.task
        await agent.agent.__aexit__(None, None, None)
        left = {str(path.relative_to(directory)) for path in directory.rglob("*")}
        assert left == {"public", "private", "private/.lock", "private/.admin.sock.lock", "public/.api.sock.lock"}
        await agent.agent.__aenter__()


async def test_what_cannot_start_holds_nothing(tmp_path) -> None:
    settings = AgentSettings(
        trust_domain=TD, runtime_dir=tmp_path / "a", insecure_bootstrap=True, attestors={"workload": {"nobody": {}}}
    )
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(2):
        with pytest.raises(Misconfigured) as refused:
            async with Agent(settings):
                pass
        assert refused.value.reason == "attestor_unknown"
    await until(lambda: len(os.listdir("/proc/self/fd")) <= before)


@pytest.mark.bears("C05")
async def test_a_stepped_clock_makes_every_stream_look_again(monkeypatch) -> None:
    monkeypatch.setattr(clock_watch, "CLOCK_LOOK", 0.05)
    async with estate() as agent:
        with agent.agent.cache.listening() as bell:
            while await bell.wait(0.3):
                pass
            real = agent.agent._clock
            now = real.now
            monkeypatch.setattr(type(real), "now", lambda self: now() + timedelta(hours=2))
            assert await bell.wait(2)
            assert not await bell.wait(0.3)


@pytest.fixture
def signals():
    """The process's own handlers, put back afterwards."""
    before = {number: signal.getsignal(number) for number in program.ENDING}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


async def test_run_gives_the_one_error_that_says_what_to_do(signals) -> None:
    directory = Path(tempfile.mkdtemp(dir="/tmp"))
    async with FakeServer(directory) as server:
        settings = AgentSettings(
            trust_domain=TD,
            runtime_dir=directory / "a",
            server_port=server.port,
            trust_bundle_path=server.trust_file(),
            join_token="wrong",
        )
        with pytest.raises(Refused, match="does not exist or has already been used"):
            await program._run(settings)
    shutil.rmtree(directory)
    assert all(callable(signal.getsignal(number)) for number in program.ENDING)
