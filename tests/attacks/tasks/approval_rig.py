"""A bank whose payments a person approves: a server with that policy, agents at both doors, and people with tokens of their own."""

import itertools
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc.aio
import httpx2

from broker._proto.broker.server.v1 import tasks_pb2
from broker._proto.service import Stub
from broker.audit.records import Record
from broker.server.api.grpc import tasks
from broker.server.task_settings import AudienceSettings, SubjectSettings
from broker.server.tasks.signals import LOGOUT_EVENT
from broker.spiffe import jose
from broker.transport.rpc_errors import from_rpc_error
from broker.transport.tls import client_context, roots_of
from tests.attacks.tasks.policy_rig import Rig
from tests.fakes.oidc import OidcIssuer
from tests.integration.identity_rig import DEADLINE, Estate, attested, running
from tests.integration.test_token_endpoint import ISSUER, SERVICE, Process

BANK = "https://bank.example.org"
APP = "console"
"""The application through which people decide."""
POLICY = """
@id("agents-act") permit (principal, action in [Action::"begin", Action::"issue"], resource);
@id("payments") @advice("carol or dave decides") @requires("approval")
forbid (principal, action == Action::"issueToken", resource) when { context.actions.contains("payment.transfer") };
@id("leads-approve") permit (principal, action == Action::"approve", resource)
when { principal in [User::"carol", User::"dave", User::"alice"] };
"""
TRANSFER = "payment.transfer"
_NUMBERS = itertools.count()


def payment(amount: str = "100", recipient: str = "shop.example", **members: Any) -> list[dict[str, Any]]:
    constraints = {"max_amount": {"amount": amount, "currency": "EUR"}, "recipient_domain": [recipient]}
    detail = {"type": "api", "locations": [BANK], "actions": [TRANSFER], "constraints": constraints}
    return [detail | members]


CEILING = [
    {
        "type": "api",
        "locations": [BANK],
        "actions": [TRANSFER, "account.read"],
        "constraints": {
            "max_amount": {"amount": "5000", "currency": "EUR"},
            "recipient_domain": ["shop.example", "evil.example"],
        },
    }
]


@dataclass
class Bank:
    """The ground of an attack, and the people."""

    rig: Rig
    people: httpx2.AsyncClient

    # ---- agents

    async def start(self, agent: Process, **fields: Any) -> tasks_pb2.Task:
        good = {"authorization_details": json.dumps(CEILING), "purpose": "pay the invoice"}
        return await self.rig.start(agent, **(good | fields))

    async def ask(
        self, agent: Process, task_id: str, details: list[dict[str, Any]] | None = None, **fields: Any
    ) -> dict[str, Any]:
        """Ask at the agents' door; give the token's claims, or ``{"code": …}`` of the refusal."""
        good = {
            "workload": agent.session,
            "task_id": task_id,
            "resource": BANK,
            "authorization_details": json.dumps(details or payment()),
        }
        try:
            issued = await Stub(self.rig.channel, tasks.BINDING).IssueToken(
                tasks_pb2.IssueTokenRequest(**(good | fields)), timeout=DEADLINE
            )
        except grpc.aio.AioRpcError as error:
            return {"code": reason_of(error)}
        return jose.parse_compact(issued.access_token).payload

    async def ask_https(
        self, agent: Process, task_id: str, details: list[dict[str, Any]] | None = None, **changes: str
    ) -> httpx2.Response:
        good = {"resource": BANK, "task": task_id, "authorization_details": json.dumps(details or payment())}
        sent = self.rig.form(**(good | changes))
        del sent["purpose"]
        return await agent.http.post("/token", data=sent)

    # ---- people

    def person(self, name: str = "carol", **claims: Any) -> str:
        good = {"azp": APP, "sid": f"s-{name}", "auth_time": int(time.time())}
        return self.rig.oidc.token(name, **(good | claims))

    async def say(self, approval_id: str, verdict: str = "approve", *, token: str = "", **body: Any) -> httpx2.Response:
        headers = {"authorization": f"Bearer {token or self.person()}"}
        return await self.people.post(f"/approvals/{approval_id}/{verdict}", json=body, headers=headers)

    async def seen(self, approval_id: str, *, token: str = "") -> dict[str, Any]:
        headers = {"authorization": f"Bearer {token or self.person()}"}
        answer = await self.people.get(f"/approvals/{approval_id}", headers=headers)
        found: dict[str, Any] = answer.json()
        return found

    async def waiting(self, *, token: str = "") -> list[str]:
        headers = {"authorization": f"Bearer {token or self.person()}"}
        answer = await self.people.get("/approvals", headers=headers)
        assert answer.status_code == 200, answer.text
        return [one["id"] for one in answer.json()["approvals"]]

    def logout_token(self, name: str) -> str:
        at = int(time.time())
        payload = {
            "iss": self.rig.oidc.issuer,
            "aud": "broker",
            "iat": at,
            "exp": at + 120,
            "jti": f"logout-{next(_NUMBERS)}",
            "sub": name,
            "events": {LOGOUT_EVENT: {}},
        }
        key = self.rig.oidc.keys[0]
        return self.rig.oidc.raw_token({"alg": key.alg, "kid": key.kid, "typ": "logout+jwt"}, payload, key)

    # ---- what was written

    def records(self, *events: str) -> list[Record]:
        return self.rig.records(*events)


def reason_of(error: grpc.aio.AioRpcError) -> str:
    return from_rpc_error(error).reason


def settings(oidc: OidcIssuer) -> dict[str, Any]:
    subject = SubjectSettings(
        issuer=oidc.issuer,
        audiences=("broker",),
        clients=(APP,),
        approval_clients=(APP,),
        ca_path=oidc.ca_path,
    )
    return {
        "issuer": ISSUER,
        "subjects": (subject,),
        "audiences": (AudienceSettings(resource=BANK, introspectors=(SERVICE,)),),
    }


@asynccontextmanager
async def bank(estate: Estate, oidc: OidcIssuer) -> AsyncIterator[Bank]:
    async with running(estate, **settings(oidc)) as one, attested(one) as (node, agent_id, channel):
        rig = Rig(estate, one, oidc, node, agent_id, channel)
        await rig.push(POLICY)
        context = client_context(None, roots_of(node.trusted))
        async with httpx2.AsyncClient(
            verify=context, base_url=f"https://127.0.0.1:{one.port}", trust_env=False
        ) as people:
            yield Bank(rig, people)
