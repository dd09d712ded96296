"""The HTTP app over a real task half, called in process: the peer that TLS would have verified is put into the scope."""

import base64
import json
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx2
from starlette.types import ASGIApp, Receive, Scope, Send

from broker.keys import Signer
from broker.keys.local import generated
from broker.server.api.http.app import create_app
from broker.server.api.http.clients import Clients
from broker.server.api.http.direct import DirectApp
from broker.server.api.http.openapi import document
from broker.server.api.http.services import HttpServices
from broker.server.api.http.token_formats import ACCESS_TOKEN, GRANT_TYPE
from broker.server.tasks.proofs import Proofs
from broker.spiffe import Bundle, BundleSet, SpiffeId, X509Svid, jose, verify_x509_svid
from broker.transport.http import PEER_EXTENSION
from broker.transport.tls import Anonymous, SvidPeer, TlsPeer
from tests.unit.server.api.http.declared import Declared
from tests.unit.server.tasks.estate import AGENT, ISSUER, TICKETS, Estate, detail
from tests.unit.transport.pki import Authority

FORM = "application/x-www-form-urlencoded"
URN = "urn:ietf:params:oauth:token-type:"


class Peers:
    """Who calls next. The app sees the peer of the moment at which the request begins."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app
        self.peer: TlsPeer = Anonymous()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.app({**scope, "extensions": {PEER_EXTENSION: self.peer}}, receive, send)


class HttpDoorway:
    """A client of the app, and the certificates of its callers."""

    def __init__(
        self, estate: Estate, client: httpx2.AsyncClient, peers: Peers, jwt: Signer, services: HttpServices
    ) -> None:
        self.estate = estate
        self.client = client
        self.services = services
        self.authority = Authority("example.org")
        self._peers = peers
        self._jwt = jwt

    def svid(self, spiffe_id: SpiffeId = AGENT) -> X509Svid:
        identity = self.authority.issue(str(spiffe_id))
        return verify_x509_svid(
            list(identity.chain_der), BundleSet.of(self.authority.bundle), now=self.estate.clock.now()
        )

    def come_as(self, who: SpiffeId | X509Svid | None) -> X509Svid | None:
        svid = self.svid(who) if isinstance(who, SpiffeId) else who
        self._peers.peer = Anonymous() if svid is None else SvidPeer(svid)
        return svid

    def parameters(self, **changes: Any) -> list[tuple[str, str]]:
        """A good request; ``None`` leaves a parameter out, a list sends it several times."""
        good: dict[str, Any] = {
            "grant_type": GRANT_TYPE,
            "subject_token": self.estate.user_token(),
            "subject_token_type": ACCESS_TOKEN,
            "resource": TICKETS.text,
            "authorization_details": json.dumps([detail()]),
        }
        pairs: list[tuple[str, str]] = []
        for name, value in (good | changes).items():
            values = value if isinstance(value, list) else [value]
            pairs += [(name, each) for each in values if each is not None]
        return pairs

    async def token(self, *, headers: dict[str, str] | None = None, **changes: Any) -> httpx2.Response:
        return await self.post("/token", self.parameters(**changes), headers)

    async def post(
        self, path: str, pairs: list[tuple[str, str]], headers: dict[str, str] | None = None
    ) -> httpx2.Response:
        return await self.raw(path, str(httpx2.QueryParams(pairs)).encode(), headers)

    async def raw(self, path: str, body: bytes, headers: dict[str, str] | None = None) -> httpx2.Response:
        return await self.client.post(path, content=body, headers={"content-type": FORM} | (headers or {}))

    def jwt_svid(self, spiffe_id: SpiffeId = AGENT, audience: str = ISSUER, *others: str) -> str:
        at = int(self.estate.clock.now().timestamp())
        payload = {"sub": str(spiffe_id), "aud": [audience, *others], "exp": at + 60, "iat": at}
        return jose.sign_compact({"alg": "ES256", "kid": "jwt-1", "typ": "JWT"}, payload, self._jwt.sign)


@asynccontextmanager
async def open_door(estate: Estate) -> AsyncIterator[HttpDoorway]:
    jwt = generated("jwt-1")
    bundles = BundleSet.of(Bundle(AGENT.trust_domain, (), {"jwt-1": jwt.public_key}))
    services = HttpServices(
        issuer=ISSUER,
        trust_domain=AGENT.trust_domain,
        store=estate.store,
        clock=estate.clock,
        exchange=estate.exchange,
        assertions=estate.assertions,
        lifecycle=estate.lifecycle,
        changes=estate.changes,
        actions=estate.actions,
        tokens=estate.tokens,
        feed=estate.feed,
        keys=estate.keys,
        refusals=estate.refusals,
        supervisor=estate.supervisor,
        bundles=lambda: bundles,
        delegations=estate.ends.delegations,
        approvals=estate.ends.approvals,
        logout_tokens=estate.ends.logout_tokens,
        events=estate.ends.events,
        signals=estate.ends.signals,
        audiences=estate.audiences,
        clients=Clients(Proofs(estate.store, estate.clock, secrets.token_bytes), estate.foreign),
    )
    app = create_app(services)
    declared = Declared(document(app.routes, ISSUER))

    async def judge(response: httpx2.Response) -> None:
        await response.aread()
        declared.judge(response)

    # Whatever a test asks, the answer is one that the OpenAPI document declares.
    peers, hooks = Peers(DirectApp(app)), {"response": [judge]}
    transport = httpx2.ASGITransport(peers)
    async with httpx2.AsyncClient(transport=transport, base_url=ISSUER, event_hooks=hooks) as client:
        door = HttpDoorway(estate, client, peers, jwt, services)
        door.come_as(AGENT)
        yield door


def payload_of(token: str) -> dict[str, Any]:
    body = token.split(".")[1]
    read: dict[str, Any] = json.loads(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4)))
    return read


def assert_error(response: httpx2.Response, status: int, error: str) -> dict[str, Any]:
    """Every error is JSON with a code, never cached, and shows nothing of the inside."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert response.headers["cache-control"] == "no-store"
    body: dict[str, Any] = response.json()
    assert body["error"] == error, body
    text = response.text
    assert "Traceback" not in text
    assert "SELECT" not in text
    assert "eyJ" not in text
    return body
