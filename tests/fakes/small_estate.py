"""Real servers and real agents in this process, over real sockets, with settings of a test's own choice."""

import asyncio
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import grpc
from cryptography import x509

from broker._proto.broker.server.v1 import entries_pb2
from broker._proto.service import ServiceBinding, Stub
from broker._proto.spire.api.server.localauthority.v1 import localauthority_pb2
from broker._proto.spire.api.types import entry_pb2, selector_pb2, spiffeid_pb2
from broker.agent.app import Agent
from broker.agent.settings import AgentSettings
from broker.client import Authorities, Bundles, Entries, Nodes, dial_socket
from broker.clock import Clock
from broker.server.app import Server, server
from broker.server.settings import OperationsSettings, RateLimitSettings, ServerSettings, StoreSettings
from broker.spiffe import TrustDomain
from broker.spiffe.certificates import split_der
from tests.fakes.running_agent import ME, RunningAgent, until

TD = TrustDomain("example.org")
LOCAL_AUTHORITY = ServiceBinding.of(localauthority_pb2.DESCRIPTOR, "LocalAuthority")


@dataclass
class RunningServer:
    """A server, and an operator's clients on its admin socket."""

    server: Server
    channel: grpc.aio.Channel
    directory: Path
    local: Stub = field(init=False)

    def __post_init__(self):
        self.entries, self.nodes = Entries(self.channel), Nodes(self.channel)
        self.authorities, self.bundles = Authorities(self.channel), Bundles(self.channel)
        self.local = Stub(self.channel, LOCAL_AUTHORITY)

    async def register(self, parent: str, path: str, selector: str = ME, **more) -> str:
        kind, _, value = selector.partition(":")
        entry = entry_pb2.Entry(
            spiffe_id=spiffeid_pb2.SPIFFEID(trust_domain=TD.name, path=path),
            parent_id=spiffeid_pb2.SPIFFEID(trust_domain=TD.name, path=parent),
            selectors=[selector_pb2.Selector(type=kind, value=value)],
            **more,
        )
        return (await self.entries.create(entries_pb2.RegisteredEntry(entry=entry))).entry.id

    async def roots(self) -> list[x509.Certificate]:
        bundle = await self.bundles.get()
        return [x509.load_der_x509_certificate(one.asn1) for one in bundle.x509_authorities]


@asynccontextmanager
async def running_server(directory: Path, name: str = "server", *, clock: Clock | None = None, **changed):
    """A server with directories of its own below ``directory``."""
    home = directory / name
    home.mkdir(exist_ok=True)
    values = {
        "trust_domain": TD,
        "bind_address": "127.0.0.1",
        "bind_port": 0,
        "data_dir": home / "data",
        "runtime_dir": home / "run",
        "store": StoreSettings(url=f"sqlite://{home}/broker.db"),
        "operations": OperationsSettings(enabled=False),
        "ratelimit": RateLimitSettings(attestation=False),  # every node has the same address
    }
    settings = ServerSettings(**(values | changed))
    async with server(settings, clock=clock) as one:
        channel = dial_socket(settings.socket_path)
        try:
            yield RunningServer(one, channel, home)
        finally:
            await channel.close()


@asynccontextmanager
async def running_agent(
    above: RunningServer, directory: Path, name: str = "agent", *, clock: Clock | None = None, **changed
):
    """An agent that has joined a server, and been told the estate."""
    token = "none" if (directory / name).exists() else (await above.nodes.create_join_token(ttl=600)).value
    values = {
        "trust_domain": TD,
        "server_address": "127.0.0.1",
        "server_port": above.server.port,
        "runtime_dir": directory / name,
        "join_token": token,
        "insecure_bootstrap": True,
        "first_identity_wait": "5s",
    }
    settings = AgentSettings(**(values | changed))
    async with AsyncExitStack() as stack:
        agent = await stack.enter_async_context(Agent(settings, clock=clock))
        running = RunningAgent(agent, settings, None)
        running.directory = directory
        task = asyncio.create_task(agent.serve(running.stop))
        running.task = task
        try:
            await until(lambda: agent.is_ready or task.done(), 30)
            if task.done():
                await task
            yield running
        finally:
            running.stop.set()
            with suppress(Exception, BaseExceptionGroup):
                await task


def leaf_of(svid) -> x509.Certificate:
    """The leaf of a Workload API's X.509-SVID."""
    return x509.load_der_x509_certificate(split_der(svid.x509_svid)[0])


def issuer_key_id(certificate: x509.Certificate) -> str:
    """Who signed a certificate, as SPIRE names authorities."""
    return certificate.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value.key_identifier.hex()
