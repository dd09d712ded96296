"""Nodes before the real server: both in this process, set up from the files that an operator writes."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from broker._proto.broker.server.v1 import entries_pb2
from broker._proto.service import Stub
from broker._proto.spire.api.server.agent.v1 import agent_pb2
from broker._proto.spire.api.types import entry_pb2, selector_pb2, spiffeid_pb2
from broker.agent.app import Agent
from broker.agent.settings import load as load_agent
from broker.agent.upstream import AGENT
from broker.client import Bundles, Entries, Nodes, dial_socket
from broker.errors import BrokerError
from broker.server.app import server
from broker.server.settings import load as load_server
from tests.fakes.node_pki import Certified
from tests.fakes.running_agent import RunningAgent, until

NODE = "[agent.attestors.node.x509pop]\nprivate_key_path = '{key}'\ncertificate_path = '{chain}'\n"


class Fleet:
    """A real server and its agents in this process, from the files that an operator writes."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.port = 0

    @asynccontextmanager
    async def server(self, attestors: str) -> AsyncIterator[None]:
        (self.directory / "data").mkdir()
        file = self.directory / "server.toml"
        file.write_text(
            f"[server]\nbind_address = '127.0.0.1'\nbind_port = 0\ndata_dir = '{self.directory}/data'\n"
            f"runtime_dir = '{self.directory}/server'\noperations.enabled = false\nratelimit.attestation = false\n{attestors}"
        )
        settings = load_server(file, {})
        async with server(settings) as running:
            self.port = running.port
            channel = dial_socket(settings.socket_path)
            self.nodes, self.entries, self.bundles = Nodes(channel), Entries(channel), Bundles(channel)
            self.admin = Stub(channel, AGENT)
            try:
                yield
            finally:
                await channel.close()

    @asynccontextmanager
    async def agent(self, name: str, node: str) -> AsyncIterator[RunningAgent]:
        file = self.directory / f"{name}.toml"
        file.write_text(
            f"[agent]\nserver_port = {self.port}\nruntime_dir = '{self.directory}/{name}'\ninsecure_bootstrap = true\n{node}"
        )
        settings = load_agent(file, {})
        async with Agent(settings) as agent:
            running = RunningAgent(agent, settings, None)
            task = asyncio.create_task(agent.serve(running.stop))
            try:
                await until(lambda: agent.is_ready or task.done())
                if task.done():
                    await task
                yield running
            finally:
                running.stop.set()
                await asyncio.gather(task, return_exceptions=True)

    def files(self, name: str, node: Certified, *above: Certified) -> str:
        """Write a node's certificate; gives the agent's table."""
        directory = self.directory / f"{name}.pki"
        directory.mkdir(exist_ok=True)
        written = node.write(directory, *above)
        return NODE.format(key=written["private_key_path"], chain=written["certificate_path"])

    async def register(self, path: str, parent: str, *selectors: str) -> None:
        await self.entries.create(
            entries_pb2.RegisteredEntry(
                entry=entry_pb2.Entry(
                    spiffe_id=spiffeid_pb2.SPIFFEID(trust_domain="example.org", path=path),
                    parent_id=spiffeid_pb2.SPIFFEID(trust_domain="example.org", path=parent),
                    selectors=[
                        selector_pb2.Selector(type=kind, value=value)
                        for kind, _, value in (one.partition(":") for one in selectors)
                    ],
                )
            )
        )

    async def known(self) -> dict[str, agent_pb2.ListAgentsResponse]:
        found = await self.admin.ListAgents(agent_pb2.ListAgentsRequest())
        return {one.id.path: one for one in found.agents}


async def ids(agent: RunningAgent) -> list[str]:
    return [one.spiffe_id for one in (await agent.x509()).svids]


async def refused(fleet: Fleet, name: str, table: str) -> str:
    with pytest.raises((BrokerError, BaseExceptionGroup)) as why:
        async with fleet.agent(name, table):
            pass
    error = why.value
    while isinstance(error, BaseExceptionGroup):
        (error,) = error.exceptions
    assert isinstance(error, BrokerError), error
    return error.reason
