"""The agent before the real server: join, push, sessions, tasks' vouching, ban, eviction, restart with a new authority."""

import asyncio
import shutil
import sqlite3
import tempfile
import time
from contextlib import AsyncExitStack, asynccontextmanager, closing
from pathlib import Path

import grpc
import pytest

from broker._proto.broker.server.v1 import entries_pb2
from broker._proto.service import Stub
from broker._proto.spiffe import workload_pb2
from broker._proto.spire.api.server.agent.v1 import agent_pb2
from broker._proto.spire.api.types import entry_pb2, selector_pb2, spiffeid_pb2
from broker.agent.app import Agent
from broker.agent.listener import WORKLOAD
from broker.agent.settings import AgentSettings
from broker.agent.upstream import AGENT
from broker.audit.events import Event
from broker.audit.records import Record
from broker.client import Bundles, Entries, Nodes, dial_socket
from broker.server.app import server
from broker.server.settings import OperationsSettings, RateLimitSettings, ServerSettings, StoreSettings
from broker.spiffe import TrustDomain
from broker.version import __version__
from tests.fakes.processes import held_connection
from tests.fakes.running_agent import HEADER, ME, RunningAgent, until

TD = TrustDomain("example.org")
SLEEP = str(Path(shutil.which("sleep")).resolve())


class Estate:
    """A real server and as many agents as a test starts, in this process."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.port = 0
        self.stack = AsyncExitStack()

    @asynccontextmanager
    async def server(self):
        settings = ServerSettings(
            trust_domain=TD, bind_address="127.0.0.1", bind_port=self.port, data_dir=self.directory / "data", runtime_dir=self.directory / "server",
            store=StoreSettings(url=f"sqlite://{self.directory}/broker.db"), operations=OperationsSettings(enabled=False),
            ratelimit=RateLimitSettings(attestation=False),
        )  # fmt: skip
        (self.directory / "data").mkdir(exist_ok=True)
        async with server(settings) as running:
            self.port = running.port
            channel = dial_socket(settings.socket_path)
            self.entries, self.nodes = Entries(channel), Nodes(channel)
            self.admin = Stub(channel, AGENT)
            self.bundles = Bundles(channel)
            try:
                yield running
            finally:
                await channel.close()

    @asynccontextmanager
    async def agent(self, name: str = "a", **changed):
        token = (await self.nodes.create_join_token(ttl=600)).value if not (self.directory / name).exists() else "none"
        values = {
            "trust_domain": TD,
            "server_port": self.port,
            "runtime_dir": self.directory / name,
            "join_token": token,
            "insecure_bootstrap": True,
            "first_identity_wait": "2s",
        }
        settings = AgentSettings(**(values | changed))
        async with Agent(settings) as agent:
            running = RunningAgent(agent, settings, None)
            running.directory = self.directory
            task = asyncio.create_task(agent.serve(running.stop))
            try:
                await until(lambda: agent.is_ready or task.done())
                if task.done():
                    await task
                yield running
            finally:
                running.stop.set()
                await asyncio.gather(task, return_exceptions=True)

    async def register(self, agent: RunningAgent, path: str = "/wl/me", selector: str = ME, **more) -> str:
        kind, _, value = selector.partition(":")
        entry = entry_pb2.Entry(
            spiffe_id=spiffeid_pb2.SPIFFEID(trust_domain=str(TD), path=path),
            parent_id=spiffeid_pb2.SPIFFEID(trust_domain=str(TD), path=agent.agent.node.id.path),
            selectors=[selector_pb2.Selector(type=kind, value=value)],
            x509_svid_ttl=more.pop("ttl", 0),
            additional_attributes=more.pop("attributes", None),
        )
        return (await self.entries.create(entries_pb2.RegisteredEntry(entry=entry, **more))).entry.id


@pytest.fixture
async def estate():
    directory = Path(tempfile.mkdtemp(dir="/tmp"))
    directory.chmod(0o755)
    yield Estate(directory)
    shutil.rmtree(directory)


async def opened(agent: RunningAgent, stub: Stub):
    call = stub.FetchX509SVID(workload_pb2.X509SVIDRequest(), metadata=HEADER)
    return call, await asyncio.wait_for(call.read(), 30)


async def test_from_join_to_svid_and_a_change_is_pushed(estate) -> None:
    async with estate.server(), estate.agent() as agent, agent.workload() as stub:
        await estate.register(agent)
        call, first = await opened(agent, stub)
        assert first.svids[0].spiffe_id == "spiffe://example.org/wl/me"
        began = time.monotonic()
        second = await estate.register(agent, "/wl/two")
        message = await asyncio.wait_for(call.read(), 30)
        assert {one.spiffe_id for one in message.svids} == {"spiffe://example.org/wl/me", "spiffe://example.org/wl/two"}
        assert time.monotonic() - began < 4
        await estate.entries.delete(second)
        assert len((await asyncio.wait_for(call.read(), 30)).svids) == 1
        token = (await agent.jwt("aud")).svids[0]
        answer = await stub.ValidateJWTSVID(
            workload_pb2.ValidateJWTSVIDRequest(audience="aud", svid=token.svid), metadata=HEADER
        )
        assert answer.spiffe_id == token.spiffe_id


async def test_the_server_knows_the_agents_version(estate) -> None:
    async with estate.server(), estate.agent() as agent:

        async def is_known() -> bool:
            listed = await estate.admin.ListAgents(agent_pb2.ListAgentsRequest(), timeout=30)
            return [one.agent_version for one in listed.agents] == [__version__]

        async with asyncio.timeout(30):
            while not await is_known():
                await asyncio.sleep(0.01)
        assert agent.agent.is_ready


@pytest.mark.bears("A01", "WE-09")
async def test_strangers_and_entries_of_other_agents(estate) -> None:
    async with (
        estate.server(),
        estate.agent(first_identity_wait="200ms") as mine,
        estate.agent("b", first_identity_wait="200ms") as other,
    ):
        await estate.register(mine, selector="unix:uid:4294967")
        await estate.register(other)
        assert (await other.x509()).svids
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await mine.x509()
        assert (refused.value.code(), refused.value.details()) == (
            grpc.StatusCode.PERMISSION_DENIED,
            "no identity issued",
        )


async def test_a_caller_whose_entry_is_in_flight_waits_for_it_and_no_longer_than_that(estate) -> None:
    """DESIGN §5: nobody enters a client's back-off because the entry came a moment after the process."""
    async with estate.server(), estate.agent(first_identity_wait="30s") as agent:
        waiting = [asyncio.create_task(call) for call in (agent.x509(), agent.jwt("a"))]
        await until(lambda: len(agent.agent.sessions) == 1)
        assert not any(one.done() for one in waiting)
        await estate.register(agent)
        for one in waiting:
            answer = await asyncio.wait_for(one, 30)
            assert answer.svids[0].spiffe_id == "spiffe://example.org/wl/me"
    async with estate.server(), estate.agent("b", first_identity_wait="1s") as agent:
        began = time.monotonic()
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await agent.jwt("a")
        assert refused.value.code() == grpc.StatusCode.PERMISSION_DENIED
        assert time.monotonic() - began > 0.9


async def test_an_entry_s_additional_attributes_reach_the_agent(estate) -> None:
    async with estate.server(), estate.agent() as agent:
        attributes = entry_pb2.Entry.AdditionalAttributes(disable_x509_svid_prefetch=True, jwt_svid_include_jti=True)
        entry_id = await estate.register(agent, attributes=attributes)
        assert (await agent.jwt("a")).svids[0].svid != (await agent.jwt("a")).svids[0].svid
        assert (await agent.x509()).svids
        other = await estate.register(agent, "/wl/other")
        assert len((await agent.x509()).svids) == 2
        await until(lambda: other in agent.agent.svids.spares._held)
        assert entry_id not in agent.agent.svids.spares._held


async def test_sessions_live_and_end_with_their_process(estate) -> None:
    async with estate.server(), estate.agent() as agent:
        await estate.register(agent)
        async with held_connection(agent.socket, estate.directory / "r", "exit") as held:
            async with grpc.aio.insecure_channel(f"unix:{held.relay}") as channel:
                assert (
                    await Stub(channel, WORKLOAD).FetchX509SVID(workload_pb2.X509SVIDRequest(), metadata=HEADER).read()
                ).svids
            await until(lambda: agent.agent.reports.is_settled)
            await held.act()
            await until(lambda: len(agent.agent.sessions) == 0 and agent.agent.reports.is_settled)


def ends_on_record(directory: Path) -> list[tuple[str, str]]:
    """Session and cause of every end in the chain."""
    with closing(sqlite3.connect(f"file:{directory}/broker.db?mode=ro", uri=True)) as database:
        bodies = [row[0] for row in database.execute("SELECT body FROM audit_records ORDER BY seq")]
    records = [Record.from_body(bytes(body)) for body in bodies]
    return [(one.subject, one.fields["cause"]) for one in records if one.event is Event.SESSION_ENDED]


@pytest.mark.bears("A05", "V07")
async def test_what_is_withdrawn_between_two_messages_is_on_record_with_its_cause(estate) -> None:
    async with estate.server(), estate.agent() as agent:
        await estate.register(agent)
        async with (
            held_connection(agent.socket, estate.directory / "r", "exec", SLEEP, "60") as held,
            grpc.aio.insecure_channel(f"unix:{held.relay}") as channel,
        ):
            stream = Stub(channel, WORKLOAD).FetchX509SVID(workload_pb2.X509SVIDRequest(), metadata=HEADER)
            assert (await stream.read()).svids
            await until(lambda: agent.agent.reports.is_settled)
            (session,) = (one.id for each in agent.agent.sessions for one in each.identities.values())
            await held.act()  # another program, and nothing to send to it
            await until(lambda: ends_on_record(estate.directory) == [(session, "process_changed")], 20)


@pytest.mark.bears("O04")
async def test_a_banned_agent_stops_at_once(estate) -> None:
    async with estate.server(), estate.agent() as agent, agent.workload() as stub:
        await estate.register(agent)
        call, _ = await opened(agent, stub)
        node = agent.agent.node.id
        await estate.admin.BanAgent(
            agent_pb2.BanAgentRequest(id=spiffeid_pb2.SPIFFEID(trust_domain=str(TD), path=node.path))
        )
        with pytest.raises(grpc.aio.AioRpcError) as ended:
            await asyncio.wait_for(call.read(), 30)
        assert ended.value.code() == grpc.StatusCode.PERMISSION_DENIED
        assert not (estate.directory / "a" / "private" / "identity.json").exists()


@pytest.mark.bears("K02", "W15")
async def test_a_restarted_server_with_a_new_authority_is_followed(estate) -> None:
    async with AsyncExitStack() as stack:
        first = AsyncExitStack()
        await first.enter_async_context(estate.server())
        agent = await stack.enter_async_context(estate.agent())
        stub = await stack.enter_async_context(agent.workload())
        await estate.register(agent)
        call, before = await opened(agent, stub)
        await first.aclose()
        assert (await agent.x509()).svids == before.svids  # while it is away
        async with estate.server():
            await until(lambda: agent.agent.sync.is_online, 30)
            await until(lambda: len(agent.agent.cache.own_bundle.x509_authorities) == 2, 10)
            message = await asyncio.wait_for(call.read(), 30)  # the new authority, at once
            assert len(message.svids[0].bundle) > len(before.svids[0].bundle)
            await estate.register(agent, "/wl/new")
            async with asyncio.timeout(30):
                # And its signatures: a revocation list of its own may come first.
                while {one.spiffe_id for one in message.svids} != {
                    "spiffe://example.org/wl/me",
                    "spiffe://example.org/wl/new",
                }:
                    message = await call.read()


async def test_an_agent_restarts_with_what_it_kept(estate) -> None:
    async with estate.server():
        async with estate.agent() as agent:
            await estate.register(agent)
            node = agent.agent.node.id
        async with estate.agent() as agent:
            assert agent.agent.node.id == node
            assert (await agent.x509()).svids


@pytest.mark.bears("A23")
async def test_a_crowd_of_processes_is_served_in_time(estate) -> None:
    async with estate.server(), estate.agent() as agent:
        await estate.register(agent)

        async def one(number: int) -> bytes:
            options = (("grpc.use_local_subchannel_pool", 1),)
            relay = estate.directory / f"r{number}"
            async with (
                held_connection(agent.socket, relay, "stay"),
                grpc.aio.insecure_channel(f"unix:{relay}", options=options) as channel,
            ):
                stub = Stub(channel, WORKLOAD)
                call = stub.FetchX509SVID(workload_pb2.X509SVIDRequest(), metadata=HEADER, timeout=30)
                return (await call.read()).svids[0].x509_svid

        leaves = await asyncio.gather(*(one(number) for number in range(25)))
        assert len(set(leaves)) == 25  # each process its own
