"""A server with its real ports, agents at both of its doors, operators on its admin socket, and a service that asks about tokens.

What is done to a running task is done over the wire: by the workload at HTTPS, for it by its node agent over gRPC, and by an
operator over the admin socket. The audit log is read from the store's file.
"""

import json
from collections.abc import AsyncIterator, Awaitable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc.aio

from broker._proto.broker.server.v1 import feed_pb2, sessions_pb2, tasks_pb2
from broker._proto.service import Stub
from broker._proto.spire.api.server.svid.v1 import svid_pb2
from broker.audit.records import Record
from broker.client import Tasks
from broker.errors import BrokerError
from broker.sdk.feed import FeedState
from broker.server.api.grpc import feed, sessions, svid, tasks
from broker.server.app import Server
from broker.server.task_settings import AudienceSettings, TaskSettings
from broker.spiffe import SpiffeId
from broker.spiffe.jose import parse_compact
from broker.transport.rpc_errors import from_rpc_error
from tests.attacks.tasks.policy_rig import audit_records
from tests.fakes.oidc import OidcIssuer
from tests.integration.identity_rig import DEADLINE, Estate, Node, admin_channel, attested, running
from tests.integration.test_token_endpoint import (
    DETAILS,
    ISSUER,
    SERVICE,
    TICKETS,
    Process,
    form,
    process,
    register,
    task_settings,
)

NEIGHBOUR = SpiffeId("spiffe://example.org/neighbour")
WIKI = "https://wiki.example.org"


def hop(number: int) -> SpiffeId:
    """The agent of this place in a chain."""
    return SpiffeId(f"spiffe://example.org/hop-{number}")


@dataclass
class Life:
    """One server, one attested node with its processes, and the operator's client."""

    estate: Estate
    server: Server
    oidc: OidcIssuer
    node: Node
    agent_id: SpiffeId
    channel: grpc.aio.Channel
    operator: Tasks
    stack: AsyncExitStack
    entries: dict[SpiffeId, str] = field(default_factory=dict)
    service: Process | None = None

    # ---- who is there

    async def agent(self, spiffe_id: SpiffeId, session: str) -> Process:
        """A process of this workload; the same identity in another session is another process."""
        if spiffe_id not in self.entries:
            self.entries[spiffe_id] = await register(self.server, self.agent_id, spiffe_id)
        made = process(self.server, self.node, self.channel, self.entries[spiffe_id], session, self.node.trusted)
        return await self.stack.enter_async_context(made)

    async def jwt_svid(self, who: SpiffeId) -> str:
        """A JWT-SVID of this workload for this issuer."""
        request = svid_pb2.NewJWTSVIDRequest(entry_id=self.entries[who], audience=[ISSUER])
        answer = await Stub(self.channel, svid.BINDING).NewJWTSVID(request, timeout=DEADLINE)
        token: str = answer.svid.token
        return token

    async def exits(self, *sessions_over: Process) -> None:
        """The node agent tells that these processes are gone."""
        await Stub(self.channel, sessions.BINDING).ReportSessions(
            sessions_pb2.ReportSessionsRequest(ended=[one.session.id for one in sessions_over]), timeout=DEADLINE
        )

    # ---- what workloads ask, by their node agent

    async def start(self, agent: Process, **fields: Any) -> tasks_pb2.Task:
        good = {
            "workload": agent.session,
            "user_token": self.oidc.token("alice"),
            "purpose": "triage",
            "authorization_details": json.dumps(DETAILS),
        }
        return await self._node("StartTask", tasks_pb2.StartTaskRequest(**(good | fields)))

    async def child(self, agent: Process, parent: str, to: SpiffeId, **fields: Any) -> tasks_pb2.Task:
        """Start a task below ``agent``'s own, for another workload."""
        if to not in self.entries:
            self.entries[to] = await register(self.server, self.agent_id, to)
        good = {
            "workload": agent.session,
            "parent": parent,
            "agent": str(to),
            "purpose": "part of it",
            "authorization_details": json.dumps(DETAILS),
        }
        return await self._node("StartChildTask", tasks_pb2.StartChildTaskRequest(**(good | fields)))

    async def issue(self, agent: Process, task_id: str, **fields: Any) -> str:
        good = {"workload": agent.session, "task_id": task_id, "resource": TICKETS}
        issued = await self._node("IssueToken", tasks_pb2.IssueTokenRequest(**(good | fields)))
        token: str = issued.access_token
        return token

    async def complete(self, agent: Process, task_id: str, **fields: Any) -> tasks_pb2.Task:
        asked = tasks_pb2.CompleteTaskRequest(workload=agent.session, task_id=task_id, **fields)
        return await self._node("CompleteTask", asked)

    async def change(self, agent: Process, task_id: str, operation: str, **fields: Any) -> tasks_pb2.ChangedTask:
        asked = tasks_pb2.ChangeOwnTaskRequest(workload=agent.session, task_id=task_id, operation=operation, **fields)
        return await self._node("ChangeOwnTask", asked)

    async def _node(self, method: str, request: Any) -> Any:
        try:
            return await getattr(Stub(self.channel, tasks.BINDING), method)(request, timeout=DEADLINE)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from None

    async def chain(self, hops: int) -> list[tuple[Process, tasks_pb2.Task]]:
        """A chain of so many agents, each of which was started by the one before; the outermost first."""
        line: list[tuple[Process, tasks_pb2.Task]] = []
        for number in range(hops):
            one = await self.agent(hop(number), f"ws_hop{number}")
            task = await (self.child(*_parent(line), hop(number)) if line else self.start(one))
            line.append((one, task))
        return line

    # ---- what workloads ask, at HTTPS

    def form(self, **changes: str) -> dict[str, str]:
        return form(self.oidc, **changes)

    # ---- who judges

    async def is_active(self, token: str) -> bool:
        """Ask the introspection endpoint, as the service that the token is for."""
        return bool((await self.introspected(token))["active"])

    async def introspected(self, token: str) -> dict[str, Any]:
        if self.service is None:
            self.service = await self.agent(SERVICE, "ws_service")
        answer = await self.service.http.post("/introspect", data={"token": token})
        assert answer.status_code == 200, answer.text
        body: dict[str, Any] = answer.json()
        return body

    async def verifier(self, token: str) -> str:
        """Say what a verifier answers that has the feed's snapshot of this moment: ``alive``, or its refusal's code."""
        claims: Any = parse_compact(token).payload
        call = Stub(self.channel, feed.BINDING).Subscribe(timeout=DEADLINE)
        await call.write(feed_pb2.SubscribeRequest())
        state, more = FeedState(), True
        while more:
            message = await call.read()
            state.apply(message, monotonic=0, now=int(claims["iat"]))
            more = message.snapshot.more
        call.cancel()
        try:
            state.require_alive(
                root=claims["task"]["root"], epoch=claims["task"]["epoch"], task=claims["task"]["id"],
                session=claims["cnf"].get("spiffe_session", ""), jti=claims["jti"],
            )  # fmt: skip
        except BrokerError as error:
            return error.reason
        return "alive"

    # ---- what was written

    def records(self, *events: str) -> list[Record]:
        return [one for one in audit_records(self.estate) if one.event in events]

    def about(self, task_id: str, *events: str) -> list[Record]:
        """The records about this task, in their order."""
        return [one for one in audit_records(self.estate) if one.subject == task_id and one.event in events]


def _parent(line: list[tuple[Process, tasks_pb2.Task]]) -> tuple[Process, str]:
    agent, task = line[-1]
    return agent, task.id


async def refused(asked: Awaitable[Any]) -> str:
    """Be refused; give the stable code."""
    try:
        answer = await asked
    except BrokerError as error:
        return error.reason
    raise AssertionError(f"it was not refused: {answer}")


def settings_of(oidc: OidcIssuer, **tasks_table: Any) -> dict[str, Any]:
    """The server's settings; ``tasks_table`` is of ``[server.tasks]``."""
    parts = task_settings(oidc) | {"tasks": TaskSettings(**tasks_table)}
    parts["audiences"] += (AudienceSettings(resource=WIKI, introspectors=(SERVICE,)),)
    return parts


@asynccontextmanager
async def inhabited(estate: Estate, one: Any, oidc: OidcIssuer) -> AsyncIterator[Life]:
    """Bring a node to a server that runs here or in a process of its own."""
    async with (
        attested(one) as (node, agent_id, channel),
        admin_channel(one) as admin,
        AsyncExitStack() as stack,
    ):
        yield Life(estate, one, oidc, node, agent_id, channel, Tasks(admin), stack)


@asynccontextmanager
async def living(estate: Estate, oidc: OidcIssuer, **settings: Any) -> AsyncIterator[Life]:
    """Start everything; ``settings`` are of ``[server.tasks]``."""
    async with running(estate, **settings_of(oidc, **settings)) as one, inhabited(estate, one, oidc) as life:
        yield life


def environment_of(oidc: OidcIssuer, **more: str) -> dict[str, str]:
    """The same settings for a server in a process of its own (see :func:`tests.fakes.replicas.replica`)."""
    subject = {"issuer": oidc.issuer, "audiences": ["broker"], "ca_path": str(oidc.ca_path)}
    services = [{"resource": each, "introspectors": [str(SERVICE)]} for each in (TICKETS, WIKI)]
    return {
        "BROKER_SERVER__ISSUER": ISSUER,
        "BROKER_SERVER__SUBJECTS": json.dumps([subject]),
        "BROKER_SERVER__AUDIENCES": json.dumps(services),
        "BROKER_SERVER__TASKS__AGENT_LEASE_TTL": "10m",
    } | more
