"""Each client against a real gRPC server on a real Unix socket: pages are followed, failures are our errors."""

import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import grpc.aio
import pytest

from broker._proto.broker.server.v1 import entries_pb2, tasks_pb2
from broker._proto.google.protobuf import empty_pb2
from broker._proto.grpc.health.v1 import health_pb2
from broker._proto.service import ServiceBinding, handler
from broker._proto.spire.api.server.agent.v1 import agent_pb2
from broker._proto.spire.api.server.entry.v1 import entry_pb2
from broker._proto.spire.api.types import agent_pb2 as types_agent_pb2
from broker._proto.spire.api.types import jointoken_pb2, status_pb2
from broker.client import Entries, Health, Nodes, Tasks, dial_socket
from broker.errors import Conflict, NotFound, Unavailable
from broker.spiffe import SpiffeId


class FakeEntries:
    """Holds entries in a dictionary; two to a page."""

    def __init__(self) -> None:
        self.held: dict[str, entries_pb2.RegisteredEntry] = {}

    async def BatchCreateEntry(self, request, context):
        (entry,) = request.entries
        if entry.entry.id in self.held:
            status = status_pb2.Status(code=grpc.StatusCode.ALREADY_EXISTS.value[0], message="similar")
            return entries_pb2.BatchCreateEntryResponse(
                results=[entries_pb2.BatchCreateEntryResponse.Result(status=status)]
            )
        self.held[entry.entry.id] = entry
        return entries_pb2.BatchCreateEntryResponse(results=[entries_pb2.BatchCreateEntryResponse.Result(entry=entry)])

    async def GetEntry(self, request, context):
        if request.id not in self.held:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such entry")
        return self.held[request.id]

    async def ListEntries(self, request, context):
        names = sorted(self.held)
        start = names.index(request.page_token) if request.page_token else 0
        token = names[start + 2] if len(names) > start + 2 else ""
        found = [self.held[name] for name in names[start : start + 2]]
        return entries_pb2.ListEntriesResponse(entries=found, next_page_token=token)

    async def BatchDeleteEntry(self, request, context):
        (wanted,) = request.ids
        code = grpc.StatusCode.OK if self.held.pop(wanted, None) else grpc.StatusCode.NOT_FOUND
        status = status_pb2.Status(code=code.value[0], message="no such entry")
        result = entry_pb2.BatchDeleteEntryResponse.Result(status=status, id=wanted)
        return entry_pb2.BatchDeleteEntryResponse(results=[result])


class FakeNodes:
    """Gives what it is asked for."""

    def __init__(self) -> None:
        self.banned: set[str] = set()
        self.gone: set[str] = set()

    async def CreateJoinToken(self, request, context):
        return jointoken_pb2.JoinToken(
            value=f"{request.agent_id.trust_domain}{request.agent_id.path}", expires_at=request.ttl
        )

    async def ListAgents(self, request, context):
        page = int(request.page_token or "0")
        agents = [types_agent_pb2.Agent(attestation_type=f"page-{page}")]
        assert request.filter.by_attestation_type in {"", "tpm"}
        last = 0 if request.filter.by_attestation_type else 2
        return agent_pb2.ListAgentsResponse(agents=agents, next_page_token="" if page == last else str(page + 1))

    async def CountAgents(self, request, context):
        return agent_pb2.CountAgentsResponse(count=1 if request.filter.by_banned.value else 3)

    async def GetAgent(self, request, context):
        if request.id.path in self.gone:
            await context.abort(grpc.StatusCode.NOT_FOUND, "agent not found")
        return types_agent_pb2.Agent(id=request.id, banned=request.id.path in self.banned)

    async def BanAgent(self, request, context):
        self.banned.add(request.id.path)
        return empty_pb2.Empty()

    async def DeleteAgent(self, request, context):
        self.gone.add(request.id.path)
        return empty_pb2.Empty()


class FakeTasks:
    """One task, whatever is asked."""

    async def GetTask(self, request, context):
        return tasks_pb2.Task(id=request.id, state="active")

    async def ListTasks(self, request, context):
        return tasks_pb2.ListTasksResponse(tasks=[tasks_pb2.Task(id="t", state=request.state, user=request.user)])

    async def RevokeTask(self, request, context):
        return tasks_pb2.Task(id=request.task_id, state="revoked", cause=request.reason)


class FakeHealth:
    """Says what it was made to say."""

    def __init__(self) -> None:
        self.status = health_pb2.HealthCheckResponse.SERVING

    async def Check(self, request, context):
        return health_pb2.HealthCheckResponse(status=self.status)


@pytest.fixture
async def served() -> AsyncIterator[tuple[grpc.aio.Channel, FakeHealth]]:
    health, entries = FakeHealth(), FakeEntries()
    bindings = (
        (ServiceBinding.of(entries_pb2.DESCRIPTOR, "Entries"), entries),
        (ServiceBinding.of(entry_pb2.DESCRIPTOR, "Entry"), entries),
        (ServiceBinding.of(agent_pb2.DESCRIPTOR, "Agent"), FakeNodes()),
        (ServiceBinding.of(tasks_pb2.DESCRIPTOR, "Tasks"), FakeTasks()),
        (ServiceBinding.of(health_pb2.DESCRIPTOR, "Health"), health),
    )
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:
        server = grpc.aio.server()
        server.add_generic_rpc_handlers(
            tuple(handler(binding, service, lambda _path, behaviour: behaviour) for binding, service in bindings)
        )
        server.add_insecure_port(f"unix:{directory}/s")
        await server.start()
        async with dial_socket(Path(directory) / "s") as channel:
            yield channel, health
        await server.stop(None)


async def test_entries(served: tuple[grpc.aio.Channel, FakeHealth]) -> None:
    entries = Entries(served[0], timeout=30)
    for number in range(5):
        entry = entries_pb2.RegisteredEntry(may_start_tasks=number == 3)
        entry.entry.id = f"e{number}"
        assert (await entries.create(entry)).entry.id == f"e{number}"
    assert [one.entry.id for one in await entries.list()] == ["e0", "e1", "e2", "e3", "e4"]
    assert (await entries.get("e3")).may_start_tasks
    with pytest.raises(Conflict, match="similar"):
        await entries.create(entry)
    await entries.delete("e3")
    with pytest.raises(NotFound):
        await entries.get("e3")
    with pytest.raises(NotFound, match="e3 was not deleted"):
        await entries.delete("e3")


async def test_nodes(served: tuple[grpc.aio.Channel, FakeHealth]) -> None:
    nodes = Nodes(served[0], timeout=30)
    token = await nodes.create_join_token(ttl=600, agent_id=SpiffeId("spiffe://a.test/node"))
    assert (token.value, token.expires_at) == ("a.test/node", 600)
    assert (await nodes.create_join_token(ttl=1)).value == ""
    assert [one.attestation_type for one in await nodes.list()] == ["page-0", "page-1", "page-2"]
    only = agent_pb2.ListAgentsRequest.Filter(by_attestation_type="tpm")
    assert len(await nodes.list(only)) == 1
    banned = agent_pb2.CountAgentsRequest.Filter()
    banned.by_banned.value = True
    assert (await nodes.count(), await nodes.count(banned)) == (3, 1)
    one = SpiffeId("spiffe://a.test/spire/agent/x")
    assert not (await nodes.get(one)).banned
    await nodes.ban(one)
    assert (await nodes.get(one)).banned
    await nodes.evict(one)
    with pytest.raises(NotFound, match="agent not found"):
        await nodes.get(one)


async def test_tasks(served: tuple[grpc.aio.Channel, FakeHealth]) -> None:
    tasks = Tasks(served[0], timeout=30)
    assert (await tasks.get("x")).id == "x"
    assert [(one.state, one.user) for one in await tasks.list(state="active", user="alice")] == [("active", "alice")]
    assert (await tasks.revoke("x", reason="because")).cause == "because"


async def test_health(served: tuple[grpc.aio.Channel, FakeHealth]) -> None:
    channel, fake = served
    await Health(channel).require_serving()
    fake.status = health_pb2.HealthCheckResponse.NOT_SERVING
    with pytest.raises(Unavailable, match="NOT_SERVING"):
        await Health(channel).require_serving()
