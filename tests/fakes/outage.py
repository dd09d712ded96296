"""A real server that comes and goes, agents before it, and the line between them, which a test can cut."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import grpc.aio
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from broker._proto.broker.server.v1 import entries_pb2
from broker._proto.grpc.health.v1 import health_pb2
from broker._proto.service import Stub
from broker._proto.spiffe import workload_pb2
from broker._proto.spire.api.server.agent.v1 import agent_pb2
from broker._proto.spire.api.types import entry_pb2, selector_pb2, spiffeid_pb2
from broker.agent.app import Agent
from broker.agent.estate_file import FILE
from broker.agent.listener import HEALTH, WORKLOAD
from broker.agent.settings import load as load_agent
from broker.agent.upstream import AGENT
from broker.client import Bundles, Entries, Nodes, Revocations, dial_socket
from broker.server.app import server
from broker.server.settings import load as load_server
from tests.fakes.running_agent import HEADER, ME, RunningAgent, until
from tests.fakes.sealing import key_file

SERVING = health_pb2.HealthCheckResponse.SERVING


class Line:
    """A TCP line to the server: it can be cut, and mended."""

    def __init__(self) -> None:
        self.port = self.to = 0
        self.refused: list[float] = []  # when somebody called while nobody answered
        self._is_hung_up = False
        self._listening: asyncio.Server | None = None
        self._open: set[asyncio.Transport] = set()

    async def mend(self) -> None:
        self._listening = await asyncio.start_server(self._carry, "127.0.0.1", self.port)
        self.port = self._listening.sockets[0].getsockname()[1]

    async def cut(self) -> None:
        if self._listening is None:
            return
        self._listening.close()
        self._listening = None
        for transport in list(self._open):
            transport.abort()

    async def hang_up(self) -> None:
        """End every connection, and each new one at once: somebody calls, and is heard to."""
        self._is_hung_up = True
        for transport in list(self._open):
            transport.abort()

    def answer(self) -> None:
        """Carry what comes from now on."""
        self._is_hung_up = False

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._is_hung_up:
            self.refused.append(asyncio.get_running_loop().time())
            writer.transport.abort()
            return
        self._open.add(writer.transport)
        try:
            back, forth = await asyncio.open_connection("127.0.0.1", self.to)
        except OSError:
            writer.transport.abort()
            self._open.discard(writer.transport)
            return
        self._open.add(forth.transport)

        async def pump(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
            with suppress(OSError):
                while data := await source.read(65536):
                    target.write(data)
                    await target.drain()
            target.transport.abort()

        await asyncio.gather(pump(reader, forth), pump(back, writer))
        self._open -= {writer.transport, forth.transport}


class House:
    """One server and its agents, in this process."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.line = Line()
        self.trust = directory / "bundle.pem"

    @asynccontextmanager
    async def server(self, name: str = "server", more: str = "", **settings: str) -> AsyncIterator[None]:
        """The server of this name; another name is another installation at the same address."""
        home = self.directory / name
        (home / "data").mkdir(parents=True, exist_ok=True)
        file = home / "server.toml"
        values = {"trust_domain": "example.org", "bind_address": "127.0.0.1", "bind_port": self.line.to}
        values |= {"data_dir": str(home / "data"), "runtime_dir": str(home / "run")} | settings
        lines = "".join(f"{key} = {value!r}\n" for key, value in values.items())
        store = f"[server.store]\nurl = 'sqlite://{home}/broker.db'\n"
        file.write_text(f"[server]\n{lines}operations.enabled = false\n{store}{more}")
        chosen = load_server(file, {})
        async with server(chosen) as running:
            self.line.to = running.port
            if not self.line.port:
                await self.line.mend()
            channel = dial_socket(chosen.socket_path)
            self.nodes, self.entries, self.bundles = Nodes(channel), Entries(channel), Bundles(channel)
            self.revocations = Revocations(channel)
            self.admin = Stub(channel, AGENT)
            try:
                yield
            finally:
                await channel.close()

    async def publish(self) -> None:
        """Write the server's bundle where agents look for their first trust."""
        told = await self.bundles.get()
        roots = [x509.load_der_x509_certificate(one.asn1) for one in told.x509_authorities]
        self.trust.write_bytes(b"".join(one.public_bytes(Encoding.PEM) for one in roots))

    async def settings(self, name: str = "a", node: str = "", **changed: str) -> str:
        """The text of an agent's settings: with a join token, or with the table of another node attestor; what is empty is left out."""
        if not self.trust.exists():
            await self.publish()
        values = {
            "trust_domain": "example.org",
            "server_port": self.line.port,
            "runtime_dir": str(self.directory / name),
            "trust_bundle_path": str(self.trust),
            "first_identity_wait": "1s",
            "at_rest_key_path": str(key_file(self.directory)),
        } | changed
        if not node:
            values["join_token"] = (await self.nodes.create_join_token(ttl=600)).value
        text = "[agent]\n" + "".join(f"{key} = {value!r}\n" for key, value in values.items() if value) + node
        (self.directory / f"{name}.toml").write_text(text)
        return text

    @asynccontextmanager
    async def agent(self, name: str = "a", *, ready: bool = True) -> AsyncIterator[RunningAgent]:
        """An agent with the settings that were written for it."""
        settings = load_agent(self.directory / f"{name}.toml", {})
        async with Agent(settings) as agent:
            running = RunningAgent(agent, settings, None)
            running.directory = self.directory
            running.task = asyncio.create_task(agent.serve(running.stop))
            try:
                await until(lambda: agent.is_ready or running.task.done() or not ready, 20)
                if running.task.done():
                    await running.task
                yield running
            finally:
                running.stop.set()
                await asyncio.gather(running.task, return_exceptions=True)

    async def register(self, agent_path: str, path: str = "/wl/me", selector: str = ME, *, ttl: int = 0) -> str:
        kind, _, value = selector.partition(":")
        entry = entry_pb2.Entry(
            spiffe_id=spiffeid_pb2.SPIFFEID(trust_domain="example.org", path=path),
            parent_id=spiffeid_pb2.SPIFFEID(trust_domain="example.org", path=agent_path),
            selectors=[selector_pb2.Selector(type=kind, value=value)],
            x509_svid_ttl=ttl,
        )
        return (await self.entries.create(entries_pb2.RegisteredEntry(entry=entry))).entry.id

    async def ban(self, agent_path: str) -> None:
        await self.admin.BanAgent(
            agent_pb2.BanAgentRequest(id=spiffeid_pb2.SPIFFEID(trust_domain="example.org", path=agent_path))
        )


async def part(agent: RunningAgent, name: str) -> bool:
    """Whether health says of a part of the agent that it serves."""
    async with agent.channel() as channel:
        answer = await Stub(channel, HEALTH).Check(health_pb2.HealthCheckRequest(service=name))
        return answer.status == SERVING


def kept(agent: RunningAgent) -> Path:
    """The file for a restart."""
    return agent.settings.private_dir / FILE


async def joined(agent: RunningAgent, house: House, **entry) -> Path:
    """Register this user below the agent, and wait until a restart would find a spare."""
    await house.register(agent.agent.node.id.path, **entry)
    assert (await agent.x509()).svids
    await until(lambda: agent.agent.svids.spares._held and kept(agent).exists(), 20)
    size = await held_spares(agent)
    assert size
    return kept(agent)


async def held_spares(agent: RunningAgent) -> int:
    await agent.agent.keeping.save()
    return len(agent.agent.svids.spares.kept())


async def served(socket: Path) -> workload_pb2.X509SVID | None:
    """What this process is given, None for UNAVAILABLE; waits for the socket."""
    await until(socket.exists, 40)
    async with grpc.aio.insecure_channel(f"unix:{socket}", options=(("grpc.use_local_subchannel_pool", 1),)) as channel:
        call = Stub(channel, WORKLOAD).FetchX509SVID(
            workload_pb2.X509SVIDRequest(), metadata=HEADER, timeout=30, wait_for_ready=True
        )
        try:
            return (await call.read()).svids[0]
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.UNAVAILABLE:
                raise
            return None
