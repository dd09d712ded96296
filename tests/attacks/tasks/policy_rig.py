"""A server whose policy an operator changes over the admin socket, and agents at both of its doors."""

import json
import sqlite3
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc.aio

from broker._proto.broker.server.v1 import policies_pb2, tasks_pb2
from broker._proto.service import Stub
from broker.audit.records import Record
from broker.server.api.grpc import policies, tasks
from broker.server.app import Server
from broker.spiffe import SpiffeId
from tests.fakes.oidc import OidcIssuer
from tests.integration.identity_rig import DEADLINE, Estate, Node, admin_channel, attested, running
from tests.integration.test_token_endpoint import DETAILS, TICKETS, Process, form, process, register, task_settings

OPEN = '@id("all") permit(principal, action, resource);\n'
NO_TOKENS = (
    OPEN + '@id("no-tokens") @advice("ask the platform team") forbid(principal, action in Action::"issue", resource);'
)
NO_TASKS = (
    OPEN + '@id("no-tasks") @advice("ask the platform team") forbid(principal, action in Action::"begin", resource);'
)


@dataclass
class Rig:
    """A running server, one attested node, and what of both an attack needs."""

    estate: Estate
    server: Server
    oidc: OidcIssuer
    node: Node
    agent_id: SpiffeId
    channel: grpc.aio.Channel

    async def push(self, text: str) -> policies_pb2.Policy:
        async with admin_channel(self.server) as admin:
            put: policies_pb2.Policy = await Stub(admin, policies.BINDING).PushPolicy(
                policies_pb2.PushPolicyRequest(text=text), timeout=DEADLINE
            )
        return put

    @asynccontextmanager
    async def agent(self, spiffe_id: SpiffeId, session: str) -> AsyncIterator[Process]:
        entry_id = await register(self.server, self.agent_id, spiffe_id)
        async with process(self.server, self.node, self.channel, entry_id, session, self.node.trusted) as one:
            yield one

    def form(self, **changes: str) -> dict[str, str]:
        return form(self.oidc, **changes)

    async def start(self, agent: Process, **fields: Any) -> tasks_pb2.Task:
        good = {
            "workload": agent.session,
            "user_token": self.oidc.token("alice"),
            "purpose": "triage",
            "authorization_details": json.dumps(DETAILS),
        }
        task: tasks_pb2.Task = await Stub(self.channel, tasks.BINDING).StartTask(
            tasks_pb2.StartTaskRequest(**(good | fields)), timeout=DEADLINE
        )
        return task

    async def issue(self, agent: Process, task_id: str, **fields: Any) -> tasks_pb2.IssuedToken:
        good = {"workload": agent.session, "task_id": task_id, "resource": TICKETS}
        issued: tasks_pb2.IssuedToken = await Stub(self.channel, tasks.BINDING).IssueToken(
            tasks_pb2.IssueTokenRequest(**(good | fields)), timeout=DEADLINE
        )
        return issued

    def records(self, *events: str) -> list[Record]:
        """Give the audit records of these events."""
        return [one for one in audit_records(self.estate) if one.event in events]


def audit_records(estate: Estate) -> list[Record]:
    """Read the audit log as it stands on the disk."""
    rows = sqlite3.connect(f"file:{estate.directory / 'data' / 'broker.db'}?mode=ro", uri=True)
    try:
        bodies = rows.execute("SELECT body FROM audit_records ORDER BY seq").fetchall()
    finally:
        rows.close()
    return [Record.from_body(bytes(body)) for (body,) in bodies]


@asynccontextmanager
async def rig(estate: Estate, oidc: OidcIssuer) -> AsyncIterator[Rig]:
    async with running(estate, **task_settings(oidc)) as one, attested(one) as (node, agent_id, channel):
        yield Rig(estate, one, oidc, node, agent_id, channel)
