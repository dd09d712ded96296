"""Who may use a token at a service: a real server, a real node agent with its feed, a real HTTPS service that verifies."""

import asyncio
import json
import os
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

from broker._proto.broker.server.v1 import entries_pb2, sessions_pb2
from broker._proto.service import Stub
from broker._proto.spire.api.types import entry_pb2, selector_pb2, spiffeid_pb2
from broker.agent.app import Agent
from broker.agent.settings import AgentSettings
from broker.client import Entries, Nodes, Tasks, dial_socket
from broker.clock import SystemClock
from broker.errors import Conflict, Refused
from broker.sdk import Workload
from broker.sdk.asgi import RequireToken
from broker.sdk.dpop import ProofKey
from broker.sdk.verify import TokenVerifier
from broker.server.api.grpc import sessions
from broker.server.task_settings import AudienceSettings
from broker.transport import tls
from broker.transport.callers import CallerIndex
from broker.transport.tls import TlsPeer
from broker.transport.tls_listener import TlsListener
from tests.attacks.tasks import binding_rig
from tests.attacks.tasks.binding_rig import LOOSE, Desk, Prover, desk, eventually, short_directory
from tests.fakes.oidc import OidcIssuer
from tests.fakes.running_agent import serving_agent, until
from tests.integration.identity_rig import DEADLINE
from tests.integration.test_token_endpoint import ISSUER, TICKETS, Process

PATH = "/tickets/4711"


async def _tickets(scope: Any, receive: Any, send: Any) -> None:
    caller = scope["state"]["caller"]
    body = json.dumps({"user": caller.user, "agent": str(caller.agent), "binding": caller.binding.value}).encode()
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})


class House:
    """A desk, an agent on this machine, and services that this process runs as its workload."""

    def __init__(self, at: Desk, me: Workload) -> None:
        self.at, self.me = at, me

    async def service(self, audience: str = TICKETS, port: int = 0) -> int:
        """Open a service for an audience; give its port."""
        me, stack, clock = self.me, self.at.stack, SystemClock()
        verifier = await stack.enter_async_context(await TokenVerifier.discover(ISSUER, audience=audience, workload=me))
        context = tls.ContextSource(
            lambda: me.current.tls,
            lambda: me.bundles,
            lambda identity, bundles: tls.server_context(identity, tls.roots_of(bundles), alpn=("http/1.1",)),
        )
        index: CallerIndex[TlsPeer] = CallerIndex()
        listener = TlsListener(
            host="127.0.0.1", port=port, context=context, bundles=lambda: me.bundles, clock=clock, index=index,
            grpc_backend=None, http_app=RequireToken(_tickets, verifier),
        )  # fmt: skip
        await listener.start()
        stack.push_async_callback(listener.stop, 0.1)
        return listener.port

    async def line(self, port: int, process: Process | None = None) -> httpx2.AsyncClient:
        """A client of a service, with a process's certificate or with none; its connection is its own and stays."""
        context = process.tls if process else tls.client_context(None, tls.roots_of(self.at.node.trusted))
        made = httpx2.AsyncClient(verify=context, base_url=f"https://127.0.0.1:{port}", trust_env=False)
        return await self.at.stack.enter_async_context(made)

    async def token(self, process: Process, resource: str = TICKETS, **changes: str) -> str:
        answer = await process.http.post("/token", data=self.at.form(resource, **changes))
        assert answer.status_code == 200, answer.text
        return str(answer.json()["access_token"])

    async def end(self, session: str) -> None:
        gone = sessions_pb2.ReportSessionsRequest(ended=[session])
        await Stub(self.at.channel, sessions.BINDING).ReportSessions(gone, timeout=DEADLINE)


@asynccontextmanager
async def house(directory: Path, oidc: OidcIssuer, **tasks: Any) -> AsyncIterator[House]:
    async with AsyncExitStack() as stack:
        at = await stack.enter_async_context(desk(directory, oidc, allow_bearer=True, **tasks))
        admin = dial_socket(at.one.socket_path)
        stack.push_async_callback(admin.close)
        settings = AgentSettings(
            trust_domain="example.org", server_port=at.one.port, runtime_dir=directory / "agent",
            join_token=(await Nodes(admin).create_join_token(ttl=600)).value, insecure_bootstrap=True,
            first_identity_wait="10s",
        )  # fmt: skip
        agent = await stack.enter_async_context(serving_agent(Agent(settings), settings))
        entry = entry_pb2.Entry(
            spiffe_id=spiffeid_pb2.SPIFFEID(trust_domain="example.org", path="/me"),
            parent_id=spiffeid_pb2.SPIFFEID(trust_domain="example.org", path=agent.agent.node.id.path),
            selectors=[selector_pb2.Selector(type="unix", value=f"uid:{os.geteuid()}")],
            dns_names=["localhost"],
            x509_svid_ttl=8,
        )
        await Entries(admin).create(entries_pb2.RegisteredEntry(entry=entry, may_start_tasks=True))
        me = await stack.enter_async_context(Workload.connect(f"unix://{agent.socket}"))
        await me.identity()
        yield House(at, me)


@pytest.fixture
async def home(oidc: OidcIssuer) -> AsyncIterator[House]:
    with short_directory() as directory:
        async with house(directory, oidc) as opened:
            yield opened


async def get(line: httpx2.AsyncClient, token: str, scheme: str = "Bearer", **headers: str) -> httpx2.Response:
    return await line.get(PATH, headers={"Authorization": f"{scheme} {token}"} | headers)


@pytest.mark.bears("PB11", "PB12", "X03", "SP09", "RV14")
async def test_a_token_outlives_the_certificate_and_no_other_process_has_it(home: House) -> None:
    at, port = home.at, await home.service()
    agent, replica = await at.process("ws_1"), await at.process("ws_2")
    token = await home.token(agent)
    first, others = await home.line(port, agent), await home.line(port, replica)
    assert (await get(first, token)).json()["binding"] == "x5t"
    for _ in range(3):
        refused = await get(others, token)
        assert (refused.status_code, refused.json()["code"]) == (401, "binding_mismatch")
        assert refused.headers["www-authenticate"] == 'Bearer error="invalid_token"'

    rotated = await at.process("ws_1")
    assert rotated.svid.x5t != agent.svid.x5t
    second = await home.line(port, rotated)
    assert (await get(second, token)).json()["binding"] == "session"
    assert (await get(second, token)).status_code == 200
    # A connection that was opened before the rotation, with a token from after it: neither is stranded.
    newer = await home.token(rotated)
    assert (await get(first, newer)).json()["binding"] == "session"
    # At the token endpoint, too, the older leaf is still the session's.
    assert (await agent.http.post("/token", data=at.form())).status_code == 200
    assert (await get(others, newer)).status_code == 401
    assert (await get(second, await home.token(replica))).status_code == 401

    await home.end("ws_1")

    async def is_dead() -> bool:
        return (await get(second, token)).status_code == 401

    await eventually(is_dead, 5)
    assert [(await get(line, one)).status_code for line in (first, second) for one in (token, newer)] == [401] * 4
    assert at.records("session_ended")


@pytest.mark.bears("PB12")
async def test_an_answer_about_a_leaf_is_asked_of_the_server_and_says_yes_or_no(home: House) -> None:
    at = home.at
    agent, replica = await at.process("ws_1"), await at.process("ws_2")
    verifier = await at.stack.enter_async_context(
        await TokenVerifier.discover(ISSUER, audience=TICKETS, workload=home.me)
    )
    from broker.tasks import PeerEvidence  # noqa: PLC0415

    leaves = verifier._leaves
    assert await leaves.ask("ws_1", PeerEvidence.from_svid(agent.svid))
    for session, held in (("ws_2", agent), ("ws_1", replica), ("ws_9", agent), ("", agent), ("ws 1", agent)):
        assert not await leaves.ask(session, PeerEvidence.from_svid(held.svid))
    assert leaves.holds("ws_1", agent.svid.x5t)
    assert leaves.holds("ws_1", "never asked") is None


@pytest.mark.bears("PB01", "PB04", "PB05", "PB06", "PB08", "PB09", "X03")
async def test_a_token_that_is_bound_to_a_key(home: House) -> None:
    at, port = home.at, await home.service()
    agent, prover = await at.process("ws_1"), Prover()
    issued = await prover.post(agent.http, at.form())
    assert issued.json()["token_type"] == "DPoP"
    token, key = issued.json()["access_token"], prover.key
    # TLS ends elsewhere: the connection has no certificate, or somebody else's.
    line = await home.line(port)

    bearer = await get(line, token)
    assert (bearer.status_code, bearer.json()["error"], bearer.json()["code"]) == (
        401,
        "invalid_token",
        "dpop_required",
    )
    assert bearer.headers["www-authenticate"] == 'DPoP error="invalid_token", algs="ES256"'
    assert (await get(await home.line(port, agent), token)).status_code == 401

    def proof(
        nonce: str, of: ProofKey = key, *, method: str = "GET", url: str = TICKETS + PATH, ath: str = token
    ) -> str:
        return of.proof(method, url, token=ath, nonce=nonce)

    wanted = await get(line, token, "DPoP", DPoP=proof(""))
    assert (wanted.status_code, wanted.json()["error"]) == (401, "use_dpop_nonce")
    assert wanted.headers["www-authenticate"] == 'DPoP error="use_dpop_nonce", algs="ES256"'
    nonce = wanted.headers["dpop-nonce"]
    used = proof(nonce)
    accepted = await get(line, token, "DPoP", DPoP=used)
    assert (accepted.status_code, accepted.json()["binding"]) == (200, "dpop")
    assert accepted.headers["dpop-nonce"] == nonce
    replayed = await get(line, token, "DPoP", DPoP=used)
    assert (replayed.status_code, replayed.json()["code"]) == (401, "proof_replayed")
    assert (await line.get(PATH + "?q=1", headers={"Authorization": f"DPoP {token}", "DPoP": used})).status_code == 401
    assert (
        await line.get(PATH + "?q=1", headers={"Authorization": f"dpop {token}", "DPoP": proof(nonce)})
    ).status_code == 200

    other = ProofKey()
    for wrong, code in (
        (proof(nonce, other), "binding_mismatch"),
        (proof(nonce, method="POST"), "invalid_dpop_proof"),
        (proof(nonce, url=TICKETS + "/tickets/1"), "invalid_dpop_proof"),
        (proof(nonce, url=f"https://127.0.0.1:{port}{PATH}"), "invalid_dpop_proof"),
        (proof(nonce, ath="another token"), "invalid_dpop_proof"),
        (proof(nonce, ath=""), "invalid_dpop_proof"),
        (proof("x" * 10_000), "invalid_dpop_proof"),
        (proof("made-up-nonce"), "use_dpop_nonce"),
        ("a.b.c", "invalid_dpop_proof"),
    ):
        answer = await get(line, token, "DPoP", DPoP=wrong, **{"X-Forwarded-Host": f"127.0.0.1:{port}"})
        assert (answer.status_code, answer.json()["code"]) == (401, code)
    assert (await get(line, token, "DPoP")).json()["code"] == "invalid_dpop_proof"
    spoofed = await get(line, token, "DPoP", DPoP=proof(nonce, url="https://evil.example" + PATH), Host="evil.example")
    assert spoofed.json()["code"] == "invalid_dpop_proof"

    plain = await home.token(agent)
    mixed = await get(await home.line(port, agent), plain, "DPoP", DPoP=proof(nonce, ath=plain))
    assert (mixed.status_code, mixed.json()["code"]) == (401, "dpop_unexpected")
    await home.end("ws_1")

    async def is_dead() -> bool:
        return (await get(line, token, "DPoP", DPoP=proof(nonce))).status_code == 401

    await eventually(is_dead, 5)


@pytest.mark.bears("PB02", "PB14")
async def test_what_is_weak_is_taken_only_where_it_was_published(home: House) -> None:
    at, loose, strict = home.at, await home.service(LOOSE), await home.service()
    agent, replica = await at.process("ws_1"), await at.process("ws_2")
    bearer = await home.token(agent, LOOSE, token_binding="bearer")
    nobody = await home.line(loose)
    assert (await get(nobody, bearer)).json()["binding"] == "bearer"
    assert (await get(nobody, await home.token(agent, LOOSE))).status_code == 401
    assert (await get(await home.line(strict), bearer)).status_code == 401
    bound = await home.token(agent)
    pem = "".join(f"-----BEGIN CERTIFICATE-----{x}" for x in ("a", "b"))
    for line in (await home.line(strict), await home.line(strict, replica)):
        answer = await get(line, bound, **{"X-Forwarded-Client-Cert": f'Cert="{pem}"', "X-Client-Cert": pem})
        assert answer.status_code == 401


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@pytest.mark.bears("PB11", "X03")
async def test_the_sdk_goes_on_across_rotations_with_either_binding(
    oidc: OidcIssuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = _free_port()
    resource = f"https://localhost:{port}"
    more = (*binding_rig.audiences(), AudienceSettings(resource=resource, binding=("x5t", "session", "dpop")))
    monkeypatch.setattr(binding_rig, "audiences", lambda: more)
    with short_directory() as directory:
        async with house(directory, oidc) as home:
            await home.service(resource, port)
            me, url = home.me, f"{resource}{PATH}"
            details = [{"type": "api", "locations": [resource], "actions": ["ticket.read"]}]
            async with (
                me.task(user_token=oidc.token("alice"), purpose="triage", authorization_details=details) as task,
                task.http() as plain,
                task.http(key=ProofKey()) as proving,
            ):
                seen: set[str] = set()
                for _ in range(2):
                    before = me.current
                    for _ in range(3):
                        first, second = await plain.get(url), await proving.get(url)
                        assert (first.status_code, second.status_code) == (200, 200), (first.text, second.text)
                        assert second.json()["binding"] == "dpop"
                        seen.add(first.json()["binding"])
                    await until(lambda before=before: me.current is not before, 20)
                assert seen <= {"x5t", "session"}
                await asyncio.gather(*(proving.get(url) for _ in range(5)))


@pytest.mark.bears("RV12")
@pytest.mark.parametrize("key", [None, ProofKey()])
async def test_the_sdks_client_goes_on_with_its_task_and_no_further(
    oidc: OidcIssuer, monkeypatch: pytest.MonkeyPatch, key: ProofKey | None
) -> None:
    """A suspension kills the token that it keeps, also for the time after it: the first refusal has it ask for another."""
    port = _free_port()
    resource = f"https://localhost:{port}"
    more = (*binding_rig.audiences(), AudienceSettings(resource=resource, binding=("x5t", "session", "dpop")))
    monkeypatch.setattr(binding_rig, "audiences", lambda: more)
    with short_directory() as directory:
        async with house(directory, oidc) as home:
            await home.service(resource, port)
            operator = Tasks(dial_socket(home.at.one.socket_path))
            details = [{"type": "api", "locations": [resource], "actions": ["ticket.read"]}]

            async def its_life() -> None:
                async with (
                    home.me.task(
                        user_token=oidc.token("alice"), purpose="triage", authorization_details=details
                    ) as task,
                    task.http(key=key) as client,
                ):
                    url = f"{resource}{PATH}"
                    assert (await client.get(url)).status_code == 200
                    dead = await task.token(resource, key=key)
                    await operator.change(task.id, "suspend")

                    async def refusal() -> str:
                        try:
                            return str((await client.get(url)).status_code)
                        except Refused as error:
                            return error.reason

                    async def is_refused() -> bool:
                        return await refusal() == "task_suspended"

                    await eventually(is_refused, 5)
                    await operator.change(task.id, "resume")
                    assert (await client.post(url, content=b"sent again")).status_code == 200
                    assert await task.token(resource, key=key) != dead
                    assert len(home.at.records("token_issued")) == 2
                    await operator.revoke(task.id)

                    async def has_ended() -> bool:
                        return await refusal() == "task_ended"

                    await eventually(has_ended, 5)

            # Leaving the block of a task that was revoked says so.
            with pytest.raises(Conflict, match="revoked"):
                await its_life()
