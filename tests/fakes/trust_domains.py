"""Trust domains in this process: each with a real server, a real node agent and this user's processes as its workloads."""

import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc.aio

from broker._proto.broker.server.v1 import entries_pb2
from broker._proto.spire.api.types import bundle_pb2, entry_pb2, selector_pb2, spiffeid_pb2
from broker._proto.spire.api.types.federationrelationship_pb2 import FederationRelationship
from broker.agent.app import Agent
from broker.agent.settings import AgentSettings
from broker.client import Bundles, Entries, Nodes, Relationships, dial_socket
from broker.sdk import Workload
from broker.server.app import Server, server
from broker.server.settings import OperationsSettings, ServerSettings
from broker.spiffe import SpiffeId, TrustDomain
from tests.fakes.running_agent import RunningAgent, serving_agent, until


class Side:
    """One trust domain, once it runs."""

    def __init__(self, name: str, directory: Path) -> None:
        self.trust_domain = TrustDomain(name)
        self.directory = directory / name
        self.directory.mkdir(exist_ok=True)
        self.running: Server
        self.channel: grpc.aio.Channel
        self.agent: RunningAgent | None = None

    @property
    def name(self) -> str:
        return self.trust_domain.name

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.running.bundle_port}/"

    @property
    def federated(self) -> Any:
        """The server's bundles of others, as it knows them at this moment."""
        return Bundles(self.channel)

    @property
    def relationships(self) -> Relationships:
        return Relationships(self.channel)

    async def bundle(self) -> bundle_pb2.Bundle:
        return await Bundles(self.channel).get()

    async def relation_to(self, other: "Side", *, bundle: bool = True, web: bool = False) -> FederationRelationship:
        """What an operator here writes to federate with the other by https_spiffe, or by https_web."""
        made = FederationRelationship(trust_domain=other.name, bundle_endpoint_url=other.url)
        if web:
            made.https_web.SetInParent()
            return made
        made.https_spiffe.endpoint_spiffe_id = f"spiffe://{other.name}/spire/server"
        if bundle:
            made.trust_domain_bundle.CopyFrom(await other.bundle())
        return made

    async def register(self, path: str, *federates_with: "Side | str", **fields: Any) -> str:
        assert self.agent is not None
        entry = entry_pb2.Entry(
            spiffe_id=spiffeid_pb2.SPIFFEID(trust_domain=self.name, path=path),
            parent_id=spiffeid_pb2.SPIFFEID(trust_domain=self.name, path=self.agent.agent.node.id.path),
            selectors=[selector_pb2.Selector(type="unix", value=f"uid:{os.geteuid()}")],
            federates_with=[str(getattr(one, "name", one)) for one in federates_with],
            **fields,
        )
        made = await Entries(self.channel).create(entries_pb2.RegisteredEntry(entry=entry))
        return made.entry.id

    @asynccontextmanager
    async def workload(self, path: str, *federates_with: "Side | str", **fields: Any) -> AsyncIterator[Workload]:
        """This process as a workload here."""
        await self.register(path, *federates_with, **fields)
        assert self.agent is not None
        async with Workload.connect(f"unix://{self.agent.socket}") as me:
            assert (await me.identity()).id == SpiffeId.of(self.trust_domain, path)
            yield me


@asynccontextmanager
async def side(
    name: str, directory: Path, *, endpoint: dict[str, Any] | None = None, agent: bool = True, **changes: Any
) -> AsyncIterator[Side]:
    """Run one trust domain; its bundle endpoint is https_spiffe unless ``endpoint`` says otherwise."""
    made = Side(name, directory)
    federation = {
        "bundle_endpoint": {"address": "127.0.0.1", "port": 0, **(endpoint or {})},
        **changes.pop("federation", {}),
    }
    settings = ServerSettings(
        **{
            "trust_domain": name,
            "bind_address": "127.0.0.1",
            "bind_port": 0,
            "data_dir": made.directory / "data",
            "runtime_dir": made.directory / "server",
            "operations": OperationsSettings(enabled=False),
            "federation": federation,
            **changes,
        }
    )
    async with AsyncExitStack() as stack:
        made.running = await stack.enter_async_context(server(settings, environ={}))
        made.channel = dial_socket(settings.socket_path)
        stack.push_async_callback(made.channel.close)
        if agent:
            made.agent = await stack.enter_async_context(_agent(made))
        yield made


@asynccontextmanager
async def _agent(of: Side) -> AsyncIterator[RunningAgent]:
    token = (await Nodes(of.channel).create_join_token(ttl=600)).value
    settings = AgentSettings(
        trust_domain=of.name,
        server_port=of.running.port,
        runtime_dir=of.directory / "agent",
        join_token=token,
        insecure_bootstrap=True,
        first_identity_wait="10s",
    )
    async with serving_agent(Agent(settings), settings) as running:
        yield running


async def holds(me: Workload, *sides: Side) -> None:
    """Wait until a workload trusts exactly these trust domains."""
    wanted = {one.trust_domain for one in sides}
    await until(lambda: set(me.bundles) == wanted)
