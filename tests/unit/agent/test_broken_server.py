"""A server that is reached and is broken: it hangs, lies, or signs what nobody asked for."""

import asyncio
import shutil
import tempfile
import time
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path

import grpc
import pytest

from broker.agent import bootstrap, offline, svids, sync, upstream
from broker.agent.bootstrap import Condition
from broker.transport.tls import server_context
from tests.fakes.fake_server import SERVER_ID, FakeServer, entry_message
from tests.fakes.running_agent import ME, estate, serving, until

METHODS = ("GetBundle", "RenewAgent", "BatchNewX509SVID", "NewJWTSVID", "ReportSessions")
STREAMS = ("AttestAgent", "Watch", "Subscribe")


class Silent(FakeServer):
    """It takes every call and says nothing."""


for _name in METHODS:

    async def _hang(self, request, context, peer):
        await asyncio.Event().wait()

    setattr(Silent, _name, _hang)
for _name in STREAMS:

    async def _hang_stream(self, request, context, peer):
        await asyncio.Event().wait()
        yield None

    setattr(Silent, _name, _hang_stream)


@asynccontextmanager
async def then(kind: type[FakeServer]):
    """A directory in which an agent had a good server, and now has this one at the same address."""
    directory = Path(tempfile.mkdtemp(dir="/tmp"))
    directory.chmod(0o755)
    try:
        good = FakeServer(directory)
        async with good:
            good.entries["e1"] = entry_message("e1", "/wl/me", [ME])
            async with serving(good, directory) as agent:
                assert (await agent.x509()).svids
                await until(agent.agent.svids.spares.kept)
        bad = kind(directory, good.ca)
        bad.port = good.port
        async with bad:
            yield bad, directory
    finally:
        shutil.rmtree(directory)


@pytest.mark.bears("O06")
async def test_before_a_server_that_hangs_a_restarted_agent_serves_what_it_kept(monkeypatch) -> None:
    monkeypatch.setattr(offline, "RESUME_AFTER", 0.3)
    monkeypatch.setattr(sync, "SILENCE", 1.0)
    async with then(Silent) as (server, directory), serving(server, directory) as agent:
        assert (await agent.x509()).svids[0].spiffe_id == "spiffe://example.org/wl/me"
        assert not agent.agent.sync.is_online


@pytest.mark.bears("O06")
async def test_while_every_call_hangs_the_cached_token_comes_within_a_second() -> None:
    async with estate() as agent:
        agent.server.jwt_ttl = timedelta(seconds=30)
        first = (await agent.jwt("a")).svids[0].svid
        agent.server.sign_gate.clear()
        agent.agent.svids._clock = _Ahead(agent.agent._clock, timedelta(seconds=16))  # past its half-life
        began = time.monotonic()
        assert (await agent.jwt("a")).svids[0].svid == first
        assert time.monotonic() - began < 15  # a busy machine's second
        assert svids.JWT_REFRESH < 1
        agent.server.sign_gate.set()


class _Ahead:
    def __init__(self, clock, by: timedelta) -> None:
        self._clock, self._by = clock, by

    def now(self):
        return self._clock.now() + self._by

    def monotonic(self) -> float:
        return self._clock.monotonic()


class Timing(FakeServer):
    """Remembers how long each caller would wait, by method."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.patience: dict[str, float | None] = {}


for _name in METHODS:

    async def _timed(self, request, context, peer, _name=_name):
        self.patience[_name] = context.time_remaining()
        return await getattr(FakeServer, _name)(self, request, context, peer)

    setattr(Timing, _name, _timed)


async def _attest_timed(self, requests, context, peer):
    self.patience["AttestAgent"] = context.time_remaining()
    async for answer in FakeServer.AttestAgent(self, requests, context, peer):
        yield answer


Timing.AttestAgent = _attest_timed  # type: ignore[method-assign]


@pytest.mark.bears("O06")
async def test_no_call_waits_for_more_than_half_a_minute(monkeypatch) -> None:
    assert max(upstream.RPC_TIMEOUT, sync.SILENCE) <= 30
    monkeypatch.setattr(bootstrap, "CHECK_EVERY", 0.05)
    directory = Path(tempfile.mkdtemp(dir="/tmp"))
    directory.chmod(0o755)
    try:
        async with Timing(directory) as server:
            server.entries["e1"] = entry_message("e1", "/wl/me", [ME])
            server.agent_ttl = timedelta(seconds=3)
            async with serving(server, directory, trust_bundle_path=None, insecure_bootstrap=True) as agent:
                assert (await agent.x509()).svids
                assert (await agent.jwt("a")).svids
                await until(lambda: server.patience.keys() >= {*METHODS, "AttestAgent"})
        # A deadline is rounded up on its way.
        assert all(seconds is not None and 0 < seconds <= 30.5 for seconds in server.patience.values()), server.patience
    finally:
        shutil.rmtree(directory)


@pytest.mark.bears("O06")
async def test_an_agents_own_leaf_for_ten_years_is_not_taken() -> None:
    directory = Path(tempfile.mkdtemp(dir="/tmp"))
    try:
        async with FakeServer(directory) as server:
            server.agent_ttl = timedelta(days=3650)
            async with serving(server, directory, synced=False) as agent:
                await until(agent.task.done)
                assert agent.agent.node.tls is None
                assert agent.agent.node.condition is Condition.JOINING
                error = agent.task.exception()
                while isinstance(error, BaseExceptionGroup):
                    (error,) = error.exceptions
                assert error.reason == "svid_too_long"
    finally:
        shutil.rmtree(directory)


@pytest.mark.bears("O06")
@pytest.mark.parametrize("is_inside", [False, True], ids=["in place of TLS", "in place of HTTP/2"])
async def test_garbage_is_an_outage_and_no_more(is_inside) -> None:
    async def noise(reader, writer) -> None:
        writer.write(b"\x00\xff" * 4096)
        writer.close()

    async with estate() as agent:
        assert (await agent.x509()).svids
        await until(agent.agent.svids.spares.kept)
        port = agent.server.port
        await agent.server.listener.stop()
        context = server_context(agent.server.ca.identity(SERVER_ID), [], client="none") if is_inside else None
        other = await asyncio.start_server(noise, "127.0.0.1", port, ssl=context)
        async with other:
            agent.agent._dialer.reconnect()
            await until(lambda: not agent.agent.sync.is_online)
            assert (await agent.x509()).svids
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await agent.jwt("a")
            assert refused.value.code() == grpc.StatusCode.UNAVAILABLE
