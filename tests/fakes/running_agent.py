"""A real agent in this process, before a fake server: real sockets, real processes, real certificates."""

import asyncio
import os
import shutil
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import grpc.aio

from broker._proto.service import Stub
from broker._proto.spiffe import workload_pb2
from broker.agent.app import Agent
from broker.agent.listener import WORKLOAD
from broker.agent.settings import AgentSettings
from broker.attestation.catalogue import Catalogue
from tests.fakes.fake_server import TD, FakeServer, entry_message
from tests.fakes.sealing import key_file

HEADER = (("workload.spiffe.io", "true"),)
ME = f"unix:uid:{os.geteuid()}"


async def until(condition, seconds: float = 30.0) -> None:
    """Wait for a condition with a deadline."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        await asyncio.sleep(0.01)


class RunningAgent:
    """An agent that serves, and a channel to its socket."""

    def __init__(self, agent: Agent, settings: AgentSettings, server: FakeServer | None) -> None:
        self.agent, self.settings, self.server = agent, settings, server
        self.stop = asyncio.Event()

    @property
    def socket(self) -> Path:
        return self.settings.socket_path

    @asynccontextmanager
    async def channel(self) -> AsyncIterator[grpc.aio.Channel]:
        options = (("grpc.use_local_subchannel_pool", 1),)
        async with grpc.aio.insecure_channel(f"unix:{self.socket}", options=options) as channel:
            yield channel

    @asynccontextmanager
    async def workload(self) -> AsyncIterator[Stub]:
        async with self.channel() as channel:
            yield Stub(channel, WORKLOAD)

    async def x509(self) -> workload_pb2.X509SVIDResponse:
        async with self.workload() as stub:
            return await stub.FetchX509SVID(workload_pb2.X509SVIDRequest(), metadata=HEADER, timeout=30).read()

    async def jwt(self, *audience: str, spiffe_id: str = "") -> workload_pb2.JWTSVIDResponse:
        async with self.channel() as channel:
            return await self.jwt_by(channel, *audience, spiffe_id=spiffe_id)

    async def jwt_by(
        self, channel: grpc.aio.Channel, *audience: str, spiffe_id: str = ""
    ) -> workload_pb2.JWTSVIDResponse:
        """Fetch by a channel of one's own."""
        request = workload_pb2.JWTSVIDRequest(audience=audience, spiffe_id=spiffe_id)
        return await Stub(channel, WORKLOAD).FetchJWTSVID(request, metadata=HEADER, timeout=30)


@asynccontextmanager
async def serving(
    server: FakeServer, directory: Path, *, synced: bool = True, catalogue: Catalogue | None = None, **changed
) -> AsyncIterator[RunningAgent]:
    values = {
        "trust_domain": TD,
        "server_address": "127.0.0.1",
        "server_port": server.port or 1,
        "runtime_dir": directory / "agent",
        "join_token": "token-1",
        "first_identity_wait": "300ms",
        "at_rest_key_path": key_file(directory),
    }
    if not changed.get("insecure_bootstrap"):
        values["trust_bundle_path"] = server.trust_file()
    settings = AgentSettings(**(values | changed))
    async with serving_agent(Agent(settings, catalogue=catalogue), settings, server, synced=synced) as running:
        yield running


@asynccontextmanager
async def serving_agent(
    made: Agent, settings: AgentSettings, server: FakeServer | None = None, *, synced: bool = True
) -> AsyncIterator[RunningAgent]:
    """Run an agent, before whichever server its settings name."""
    async with made as agent:
        running = RunningAgent(agent, settings, server)
        task = asyncio.create_task(agent.serve(running.stop))
        try:
            if synced:
                ready = asyncio.create_task(until(lambda: agent.is_ready or task.done()))
                await ready
                if task.done():
                    await task
            running.task = task
            yield running
        finally:
            running.stop.set()
            with suppress(Exception, BaseExceptionGroup):
                await task


@asynccontextmanager
async def estate(*, entries=(), **changed) -> AsyncIterator[RunningAgent]:
    """A server and an agent in a short directory; by default one entry for this user."""
    directory = Path(tempfile.mkdtemp(dir="/tmp"))
    directory.chmod(0o755)
    try:
        async with FakeServer(directory) as server:
            for entry in entries or (entry_message("e1", "/wl/me", [ME]),):
                server.entries[entry.entry.id] = entry
            async with serving(server, directory, **changed) as running:
                running.directory = directory
                yield running
    finally:
        shutil.rmtree(directory)
