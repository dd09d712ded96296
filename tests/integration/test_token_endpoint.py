"""The task half as workloads and verifiers meet it: a real server in this process, real TLS, certificates, OIDC and store."""

import asyncio
import json
import shutil
import ssl
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import grpc.aio
import httpx2
import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from broker._proto.broker.server.v1 import entries_pb2, feed_pb2, sessions_pb2, tasks_pb2
from broker._proto.service import Stub
from broker._proto.spire.api.server.svid.v1 import svid_pb2
from broker._proto.spire.api.types import entry_pb2, selector_pb2, spiffeid_pb2
from broker.clock import SystemClock
from broker.sdk.feed import FeedState
from broker.server.api.grpc import entries, feed, sessions, svid, tasks
from broker.server.api.http.token_formats import ACCESS_TOKEN, GRANT_TYPE
from broker.server.app import Server
from broker.server.task_settings import AudienceSettings, SubjectSettings
from broker.spiffe import BundleSet, SpiffeId, X509Svid, verify_x509_svid
from broker.tasks import PeerEvidence, check_binding, verify_task_token
from broker.tasks.keyset import read_keys
from broker.transport.tls import TlsIdentity, client_context, roots_of
from tests.fakes.oidc import OidcIssuer
from tests.integration.identity_rig import (
    DEADLINE,
    Estate,
    Node,
    admin_channel,
    attested,
    csr,
    id_message,
    running,
)

ISSUER = "https://localhost:8443"
TICKETS = "https://tickets.example.org"
DETAILS = [{"type": "api", "locations": [TICKETS], "actions": ["ticket.read"], "identifier": "4711"}]
TRIAGE = SpiffeId("spiffe://example.org/triage")
SERVICE = SpiffeId("spiffe://example.org/tickets")


@pytest.fixture
def estate(request: pytest.FixtureRequest) -> Iterator[Estate]:
    # Short: a Unix socket's path has at most 107 bytes.
    directory = Path(tempfile.mkdtemp(prefix="broker", dir="/tmp"))
    is_postgres = getattr(request, "param", "sqlite") == "postgres"
    yield Estate(directory, request.getfixturevalue("postgresql") if is_postgres else "")
    shutil.rmtree(directory)


@pytest.fixture
def oidc(tmp_path: Path) -> Iterator[OidcIssuer]:
    with OidcIssuer.start(tmp_path) as issuer:
        yield issuer


def task_settings(oidc: OidcIssuer) -> dict[str, Any]:
    return {
        "issuer": ISSUER,
        "subjects": (SubjectSettings(issuer=oidc.issuer, audiences=("broker",), ca_path=oidc.ca_path),),
        "audiences": (AudienceSettings(resource=TICKETS, introspectors=(SERVICE,)),),
    }


@dataclass
class Process:
    """One workload process: its SVID, its session, and an HTTPS client that presents the SVID."""

    svid: X509Svid
    session: sessions_pb2.WorkloadSession
    http: httpx2.AsyncClient
    tls: ssl.SSLContext


async def register(one: Server, parent: SpiffeId, spiffe_id: SpiffeId, *, may_start_tasks: bool = True) -> str:
    wanted = entry_pb2.Entry(
        spiffe_id=spiffeid_pb2.SPIFFEID(trust_domain="example.org", path=spiffe_id.path),
        parent_id=id_message(parent),
        selectors=[selector_pb2.Selector(type="unix", value="uid:1000")],
    )
    registered = entries_pb2.RegisteredEntry(entry=wanted, may_start_tasks=may_start_tasks)
    async with admin_channel(one) as channel:
        answer = await Stub(channel, entries.BINDING).BatchCreateEntry(
            entries_pb2.BatchCreateEntryRequest(entries=[registered]), timeout=DEADLINE
        )
    assert answer.results[0].status.code == 0, answer.results[0].status.message
    entry_id: str = answer.results[0].entry.entry.id
    return entry_id


@asynccontextmanager
async def process(
    one: Server, node: Node, channel: grpc.aio.Channel, entry_id: str, session: str, trusted: BundleSet
) -> AsyncIterator[Process]:
    """A process as the node agent makes it: a key, a signed SVID, and its session told to the server."""
    key = ec.generate_private_key(ec.SECP256R1())
    request = svid_pb2.BatchNewX509SVIDRequest(params=[svid_pb2.NewX509SVIDParams(entry_id=entry_id, csr=csr(key))])
    answer = await Stub(channel, svid.BINDING).BatchNewX509SVID(request, timeout=DEADLINE)
    chain = tuple(answer.results[0].svid.cert_chain)
    held = verify_x509_svid(chain, trusted, now=SystemClock().now())
    told = sessions_pb2.WorkloadSession(
        id=session, spiffe_id=str(held.id), entry_id=entry_id, x5t=held.x5t, not_after=int(held.not_after.timestamp())
    )
    await Stub(channel, sessions.BINDING).ReportSessions(
        sessions_pb2.ReportSessionsRequest(current=[told]), timeout=DEADLINE
    )
    context = client_context(TlsIdentity(chain, key), roots_of(trusted))
    async with httpx2.AsyncClient(verify=context, base_url=f"https://127.0.0.1:{one.port}", trust_env=False) as http:
        yield Process(held, told, http, context)


def form(oidc: OidcIssuer, **changes: str) -> dict[str, str]:
    good = {
        "grant_type": GRANT_TYPE,
        "subject_token": oidc.token("alice"),
        "subject_token_type": ACCESS_TOKEN,
        "resource": TICKETS,
        "authorization_details": json.dumps(DETAILS),
        "purpose": "triage ticket 4711",
    }
    return good | changes


def now() -> datetime:
    return SystemClock().now()


@pytest.mark.parametrize("estate", ["sqlite", "postgres"], indirect=True)
@pytest.mark.bears("RV02", "RV11", "V01")
async def test_a_token_from_exchange_to_its_end(estate: Estate, oidc: OidcIssuer) -> None:
    async with running(estate, **task_settings(oidc)) as one, attested(one) as (node, agent_id, channel):
        triage, service = await register(one, agent_id, TRIAGE), await register(one, agent_id, SERVICE)
        async with (
            process(one, node, channel, triage, "ws_triage", node.trusted) as agent,
            process(one, node, channel, service, "ws_service", node.trusted) as verifier,
        ):
            metadata = (await verifier.http.get("/.well-known/oauth-authorization-server")).json()
            assert metadata["issuer"] == ISSUER
            keys = read_keys((await verifier.http.get("/keys")).content)

            response = await agent.http.post("/token", data=form(oidc))
            assert response.status_code == 200, response.text
            issued = response.json()
            verified = verify_task_token(issued["access_token"], keys, issuer=ISSUER, audience=TICKETS, now=now())
            assert (verified.user, verified.agent, verified.claims.scope) == ("alice", TRIAGE, "ticket.read")
            assert verified.claims.cnf.session == "ws_triage"
            check_binding(verified.claims.cnf, verified.agent, PeerEvidence.from_svid(agent.svid))
            with pytest.raises(Exception, match="another holder"):
                check_binding(verified.claims.cnf, verified.agent, PeerEvidence.from_svid(verifier.svid))

            state = FeedState()
            listening = Stub(channel, feed.BINDING).Subscribe()
            await listening.write(feed_pb2.SubscribeRequest())
            state.apply(await listening.read(), monotonic=0, now=0)
            assert state.issuer == ISSUER
            assert set(read_keys(state.keys)) == set(keys)

            asked = {"token": issued["access_token"]}
            alive = (await verifier.http.post("/introspect", data=asked)).json()
            assert alive["active"] is True
            assert alive["act"] == {"sub": str(TRIAGE)}

            started = time.perf_counter()
            done = await agent.http.post(f"/tasks/{issued['task']}/complete")
            assert done.json()["state"] == "completed"
            while (message := await asyncio.wait_for(listening.read(), DEADLINE)).WhichOneof("kind") != "frame":
                pass
            state.apply(message, monotonic=0, now=0)
            assert time.perf_counter() - started < 30.0
            with pytest.raises(Exception, match="ended"):
                state.require_alive(
                    root=verified.root,
                    epoch=verified.epoch,
                    task=verified.task_id,
                    session="ws_triage",
                    jti=verified.jti,
                )
            await listening.write(feed_pb2.SubscribeRequest(acked=state.seq, store=state.store))
            while (await agent.http.get(f"/tasks/{issued['task']}")).json()["revocation"]["state"] != "closed":
                await asyncio.sleep(0)
            assert (await verifier.http.post("/introspect", data=asked)).json() == {"active": False}
            again = await agent.http.post("/token", data=form(oidc, task=issued["task"]) | {"purpose": "x"})
            assert again.status_code == 400
            listening.cancel()


@pytest.mark.bears("X03", "PB12", "SP09")
async def test_who_does_not_hold_the_certificate_gets_nothing(estate: Estate, oidc: OidcIssuer) -> None:
    async with running(estate, **task_settings(oidc)) as one, attested(one) as (node, agent_id, channel):
        triage = await register(one, agent_id, TRIAGE)
        quiet = await register(one, agent_id, SpiffeId("spiffe://example.org/quiet"), may_start_tasks=False)
        async with (
            process(one, node, channel, triage, "ws_1", node.trusted) as agent,
            process(one, node, channel, triage, "ws_2", node.trusted) as replica,
            process(one, node, channel, quiet, "ws_3", node.trusted) as other,
            httpx2.AsyncClient(
                verify=client_context(None, roots_of(node.trusted)),
                base_url=f"https://127.0.0.1:{one.port}",
                trust_env=False,
            ) as nobody,
        ):
            issued = (await agent.http.post("/token", data=form(oidc))).json()
            anonymous = await nobody.post("/token", data=form(oidc))
            assert (anonymous.status_code, anonymous.json()["error"]) == (401, "invalid_client")
            assert (await nobody.get("/keys")).status_code == 200
            refused = await other.http.post("/token", data=form(oidc))
            assert (refused.status_code, refused.json()["error"]) == (400, "unauthorized_client")
            more = {name: value for name, value in form(oidc, task=issued["task"]).items() if name != "purpose"}
            for stranger in (replica, other):
                answer = await stranger.http.post("/token", data=more)
                assert (answer.status_code, "access_token" in answer.json()) == (400, False)
                assert (await stranger.http.get(f"/tasks/{issued['task']}")).status_code == 404
            assert (await agent.http.post("/token", data=more)).status_code == 200


@pytest.mark.bears("V07")
async def test_the_end_of_the_process_is_the_end_of_its_token(estate: Estate, oidc: OidcIssuer) -> None:
    async with running(estate, **task_settings(oidc)) as one, attested(one) as (node, agent_id, channel):
        triage, service = await register(one, agent_id, TRIAGE), await register(one, agent_id, SERVICE)
        async with (
            process(one, node, channel, triage, "ws_1", node.trusted) as agent,
            process(one, node, channel, service, "ws_2", node.trusted) as verifier,
        ):
            issued = (await agent.http.post("/token", data=form(oidc))).json()
            gone = sessions_pb2.ReportSessionsRequest(ended=["ws_1"])
            await Stub(channel, sessions.BINDING).ReportSessions(gone, timeout=DEADLINE)
            asked = {"token": issued["access_token"]}
            assert (await verifier.http.post("/introspect", data=asked)).json() == {"active": False}
            answer = await agent.http.post("/token", data=form(oidc))
            assert (answer.status_code, answer.json()["error"]) == (400, "invalid_grant")


async def test_the_node_agent_vouches_for_its_workloads(estate: Estate, oidc: OidcIssuer) -> None:
    async with running(estate, **task_settings(oidc)) as one, attested(one) as (node, agent_id, channel):
        triage = await register(one, agent_id, TRIAGE)
        async with process(one, node, channel, triage, "ws_1", node.trusted) as agent:
            stub = Stub(channel, tasks.BINDING)
            task = await stub.StartTask(
                tasks_pb2.StartTaskRequest(
                    workload=agent.session, user_token=oidc.token("alice"), purpose="triage", authorization_details=json.dumps(DETAILS)
                ),
                timeout=DEADLINE,
            )  # fmt: skip
            issued = await stub.IssueToken(
                tasks_pb2.IssueTokenRequest(workload=agent.session, task_id=task.id, resource=TICKETS), timeout=DEADLINE
            )
            keys = read_keys((await agent.http.get("/keys")).content)
            verified = verify_task_token(issued.access_token, keys, issuer=ISSUER, audience=TICKETS, now=now())
            assert (verified.task_id, verified.claims.cnf.x5t) == (task.id, agent.svid.x5t)
            # Both doors lead to the same task.
            assert (await agent.http.get(f"/tasks/{task.id}")).json()["state"] == "active"
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.RevokeTask(tasks_pb2.RevokeTaskRequest(task_id=task.id), timeout=DEADLINE)
            assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
            async with admin_channel(one) as admin:
                revoked = await Stub(admin, tasks.BINDING).RevokeTask(
                    tasks_pb2.RevokeTaskRequest(task_id=task.id, reason="test"), timeout=DEADLINE
                )
            assert (revoked.state, revoked.cause) == ("revoked", "operator")
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.IssueToken(
                    tasks_pb2.IssueTokenRequest(workload=agent.session, task_id=task.id, resource=TICKETS), timeout=DEADLINE
                )  # fmt: skip
            assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED


@pytest.mark.parametrize("estate", ["sqlite", "postgres"], indirect=True)
@pytest.mark.bears("RV09")
async def test_a_restart_forgets_no_task_no_token_and_no_end(estate: Estate, oidc: OidcIssuer) -> None:
    settings = task_settings(oidc)
    async with running(estate, **settings) as one, attested(one) as (node, agent_id, channel):
        triage = await register(one, agent_id, TRIAGE)
        async with process(one, node, channel, triage, "ws_1", node.trusted) as agent:
            living = (await agent.http.post("/token", data=form(oidc))).json()
            ended = (await agent.http.post("/token", data=form(oidc))).json()
            await agent.http.post(f"/tasks/{ended['task']}/complete")
            tls = agent.tls
    async with running(estate, **settings) as again:
        base = f"https://127.0.0.1:{again.port}"
        async with httpx2.AsyncClient(verify=tls, base_url=base, trust_env=False) as http:
            alive = (await http.post("/introspect", data={"token": living["access_token"]})).json()
            assert alive["active"] is True, "its key stays published until it has expired"
            assert (await http.post("/introspect", data={"token": ended["access_token"]})).json() == {"active": False}
            assert (await http.get(f"/tasks/{living['task']}")).json()["state"] == "active"
            assert (await http.get(f"/tasks/{ended['task']}")).json()["state"] == "completed"
            more = {name: value for name, value in form(oidc, task=living["task"]).items() if name != "purpose"}
            assert (await http.post("/token", data=more)).status_code == 200
