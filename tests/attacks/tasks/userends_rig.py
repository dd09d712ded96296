"""What an identity provider says of its users, signed as it signs; and a task with a token, seen by everyone who judges it."""

import itertools
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2

from broker._proto.broker.server.v1 import feed_pb2
from broker.audit.records import Record
from broker.errors import BrokerError
from broker.sdk.feed import FeedState
from broker.server.api.grpc.feed import _frame
from broker.server.api.http.signals import SET
from broker.server.store.rows import FrameRow
from broker.server.tasks.config import Transmitter
from broker.server.tasks.requests import IssuedToken
from broker.server.tasks.signals import LOGOUT_EVENT
from broker.tasks import Task
from tests.fakes.oidc import OidcIssuer, SigningKey
from tests.unit.server.api.http.door import HttpDoorway, open_door
from tests.unit.server.tasks.estate import INSPECTOR, TICKETS, Estate, running

CAEP = "https://schemas.openid.net/secevent/caep/event-type/"
RISC = "https://schemas.openid.net/secevent/risc/event-type/"
APP = "console"
"""The users' own application: its tokens make standing delegations."""
_NUMBERS = itertools.count()


@dataclass
class Scene:
    """An estate with an open door, and an identity provider that tells of its users."""

    estate: Estate
    door: HttpDoorway
    oidc: OidcIssuer

    # ---- the identity provider's words

    def now(self) -> int:
        return int(self.estate.clock.now().timestamp())

    def logout_token(
        self, *, header: Mapping[str, Any] | None = None, key: SigningKey | None = None, **claims: Any
    ) -> str:
        payload = {
            "iss": self.oidc.issuer,
            "aud": "broker",
            "iat": self.now(),
            "exp": self.now() + 120,
            "jti": f"logout-{next(_NUMBERS)}",
            "events": {LOGOUT_EVENT: {}},
        } | claims
        return self._signed("logout+jwt", payload, header, key)

    def event(
        self,
        kind: str,
        *,
        subject: Mapping[str, Any] | None = None,
        happened: int | None = None,
        header: Mapping[str, Any] | None = None,
        key: SigningKey | None = None,
        **claims: Any,
    ) -> str:
        body = {} if happened is None else {"event_timestamp": happened}
        payload = {
            "iss": self.oidc.issuer,
            "aud": "broker",
            "iat": self.now(),
            "jti": f"set-{next(_NUMBERS)}",
            "sub_id": dict(subject or self.subject()),
            "events": {kind: body},
        } | claims
        return self._signed("secevent+jwt", payload, header, key)

    def subject(self, sub: str = "alice", session: str = "") -> dict[str, Any]:
        user = {"format": "iss_sub", "iss": self.oidc.issuer, "sub": sub}
        if not session:
            return user
        return {"format": "complex", "user": user, "session": {"format": "opaque", "id": session}}

    def _signed(
        self, typ: str, payload: Mapping[str, Any], header: Mapping[str, Any] | None, key: SigningKey | None
    ) -> str:
        signer = key or self.oidc.keys[0]
        top = {"alg": signer.alg, "kid": signer.kid, "typ": typ} | dict(header or {})
        present = {name: value for name, value in payload.items() if value is not None}
        return self.oidc.raw_token({k: v for k, v in top.items() if v is not None}, present, signer)

    async def logout(self, token: str) -> httpx2.Response:
        self.door.come_as(None)
        return await self.door.post("/backchannel-logout", [("logout_token", token)])

    async def push(self, token: str, **headers: str) -> httpx2.Response:
        self.door.come_as(None)
        return await self.door.raw("/ssf/events", token.encode(), {"content-type": SET} | headers)

    # ---- the user and the agent

    def user_token(self, sub: str = "alice", **claims: Any) -> str:
        return self.estate.user_token(sub, **({"sid": "s-1", "auth_time": self.now()} | claims))

    async def work(self, sub: str = "alice", **claims: Any) -> "Work":
        """Start a task and fetch a token of it."""
        task = await self.estate.start(user_token=self.user_token(sub, **claims))
        return Work(self, task, await self.estate.issue(task))

    async def delegate(self, **changes: Any) -> httpx2.Response:
        """Leave a delegation standing, as the user's own application."""
        token = changes.pop("token", None) or self.user_token(azp=APP)
        terms = {
            "agents": ["spiffe://example.org/triage"],
            "authorization_details": [{"type": "api", "locations": [TICKETS.text], "actions": ["ticket.read"]}],
            "expires_in": 3600,
            "purpose": "nightly triage",
        } | changes
        self.door.come_as(None)
        return await self.door.client.post("/delegations", json=terms, headers={"authorization": f"Bearer {token}"})

    # ---- what was written

    async def frames(self, after: int = 0) -> tuple[FrameRow, ...]:
        return await self.estate.store.read(lambda reader: reader.frames_since(after))

    async def records(self, *events: str) -> list[Record]:
        return await self.estate.records(*events)


@dataclass
class Work:
    """One task and one token of it."""

    scene: Scene
    task: Task
    token: IssuedToken

    async def state(self) -> Task:
        found = await self.scene.estate.store.read(lambda reader: reader.task(self.task.id))
        assert found is not None
        return found

    async def introspected(self) -> bool:
        found = await self.scene.estate.tokens.introspect(self.token.access_token, INSPECTOR)
        return found is not None

    async def verifier(self) -> str:
        """Say what a verifier with a live feed answers: ``alive``, or the code of its refusal."""
        state = FeedState()
        frames = [_frame(row) for row in await self.scene.frames()]
        snapshot = feed_pb2.FeedSnapshot(issuer="i", keys="k", frames=frames)
        message = feed_pb2.FeedMessage(seq=len(frames), store="s", snapshot=snapshot)
        state.apply(message, monotonic=0, now=self.scene.now())
        verified = self.scene.estate.verify(self.token)
        claims = verified.claims
        try:
            state.require_alive(
                root=verified.root,
                epoch=verified.epoch,
                task=verified.task_id,
                session=claims.cnf.session,
                jti=claims.jti,
            )
            state.require_going(
                user=claims.sub,
                user_session=claims.sid,
                agent=str(claims.client_id),
                audience=claims.aud.text,
                issued_at=claims.iat,
            )
        except BrokerError as error:
            return error.reason
        return "alive"

    async def renewal(self) -> str:
        """Say what comes of another token of the task."""
        return await outcome(self.scene.estate.issue(self.task))

    async def exchange(self, **claims: Any) -> str:
        """Say what comes of a new task on a token of the same session."""
        return await outcome(self.scene.estate.start(user_token=self.scene.user_token(self.task.user, **claims)))

    async def is_dead(self) -> bool:
        """Tell whether everyone who judges the token refuses it."""
        seen = (await self.introspected(), await self.verifier(), await self.renewal())
        return not seen[0] and seen[1] != "alive" and seen[2] != "done"


async def outcome(asked: Any) -> str:
    try:
        await asked
    except BrokerError as error:
        return error.reason
    return "done"


@asynccontextmanager
async def playing(directory: Path, oidc: OidcIssuer, **settings: Any) -> AsyncIterator[Scene]:
    transmitters = settings.pop("transmitters", None) or (
        Transmitter(
            oidc.issuer,
            frozenset({"broker"}),
            subject_issuer=oidc.issuer,
            ca_path=oidc.ca_path,
            jwks_url=f"{oidc.issuer}/jwks",
        ),
    )
    clients = {"clients": frozenset({APP}), "delegation_clients": frozenset({APP})} | settings
    async with running(directory, oidc, transmitters=transmitters, **clients) as estate, open_door(estate) as door:
        yield Scene(estate, door, oidc)
