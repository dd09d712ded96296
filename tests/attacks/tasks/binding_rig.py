"""A real server behind its TLS port, a node agent that attested, and workloads and strangers who come to POST /token."""

import asyncio
import shutil
import sqlite3
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, closing, contextmanager
from pathlib import Path
from typing import Any

import grpc.aio
import httpx2
import psycopg

from broker._proto.service import Stub
from broker._proto.spire.api.server.svid.v1 import svid_pb2
from broker.audit.records import Record
from broker.sdk.dpop import ProofKey
from broker.server.api.grpc import svid
from broker.server.api.http.clients import JWT_SPIFFE
from broker.server.app import Server
from broker.server.task_settings import AudienceSettings, SubjectSettings, TaskSettings
from broker.spiffe import SpiffeId
from broker.transport.tls import client_context, roots_of
from tests.fakes.oidc import OidcIssuer
from tests.integration.identity_rig import DEADLINE, Estate, Node, attested, running
from tests.integration.test_token_endpoint import ISSUER, TICKETS, TRIAGE, Process, form, process, register

KEYED = "https://keyed.example.org"
"""A service that takes tokens bound to a key only."""
LOOSE = "https://loose.example.org"
"""A service that takes whatever there is, bearer tokens and windows among it."""
TOKEN_URL = f"{ISSUER}/token"


def audiences() -> tuple[AudienceSettings, ...]:
    return (
        AudienceSettings(resource=TICKETS, binding=("x5t", "session", "dpop")),
        AudienceSettings(resource=KEYED, binding=("dpop",)),
        AudienceSettings(resource=LOOSE, binding=("x5t", "window", "bearer")),
    )


class Desk:
    """One server and those who come to it."""

    def __init__(
        self, one: Server, oidc: OidcIssuer, directory: Path, stack: AsyncExitStack,
        node: Node, agent_id: SpiffeId, channel: grpc.aio.Channel, entry: str, store: str = "",
    ) -> None:  # fmt: skip
        self.store = store
        self.one, self.oidc, self.directory, self.stack = one, oidc, directory, stack
        self.node, self.agent_id, self.channel, self.entry = node, agent_id, channel, entry

    async def process(self, session: str, entry: str = "") -> Process:
        """A process with a leaf of its own; the same session again is a rotation."""
        made = process(self.one, self.node, self.channel, entry or self.entry, session, self.node.trusted)
        return await self.stack.enter_async_context(made)

    async def nobody(self, one: Server | None = None) -> httpx2.AsyncClient:
        """A client without a certificate."""
        return await self.stack.enter_async_context(
            httpx2.AsyncClient(
                verify=client_context(None, roots_of(self.node.trusted)),
                base_url=f"https://127.0.0.1:{(one or self.one).port}",
                trust_env=False,
            )
        )

    async def jwt_svid(self, *audience: str) -> str:
        request = svid_pb2.NewJWTSVIDRequest(entry_id=self.entry, audience=audience or [ISSUER])
        answer = await Stub(self.channel, svid.BINDING).NewJWTSVID(request, timeout=DEADLINE)
        token: str = answer.svid.token
        return token

    def form(self, resource: str = TICKETS, **changes: str) -> dict[str, str]:
        details = f'[{{"type":"api","locations":["{resource}"],"actions":["ticket.read"]}}]'
        return form(self.oidc, **{"resource": resource, "authorization_details": details} | changes)

    def asserted(self, token: str, resource: str = TICKETS, **changes: str) -> dict[str, str]:
        return self.form(resource, client_assertion_type=JWT_SPIFFE, client_assertion=token, **changes)

    def records(self, *events: str) -> list[Record]:
        file = f"file:{self.directory}/data/broker.db?mode=ro"
        opened: Any = psycopg.connect(self.store) if self.store else sqlite3.connect(file, uri=True)
        with closing(opened) as database:
            bodies = [row[0] for row in database.execute("SELECT body FROM audit_records ORDER BY seq")]
        return [one for one in (Record.from_body(bytes(body)) for body in bodies) if one.event in events]

    async def refusals(self, reason: str) -> list[Record]:
        """The records of this reason, of which there is one at least: each denial leaves one before it is answered."""
        found = [one for one in self.records("token_refused") if one.fields.get("reason") == reason]
        assert found, [one.fields.get("reason") for one in self.records("token_refused")]
        assert all("access_token" not in str(one.fields) for one in found)
        return found


@contextmanager
def short_directory() -> Iterator[Path]:
    """A directory whose name leaves room for the names of sockets below it."""
    directory = Path(tempfile.mkdtemp(prefix="broker", dir="/tmp"))
    yield directory
    shutil.rmtree(directory)


def desk_settings(oidc: OidcIssuer, **tasks: Any) -> dict[str, Any]:
    """What the server of a desk is started with."""
    return {
        "issuer": ISSUER,
        "subjects": (SubjectSettings(issuer=oidc.issuer, audiences=("broker",), ca_path=oidc.ca_path),),
        "audiences": audiences(),
        "tasks": TaskSettings(**tasks),
    }


@asynccontextmanager
async def desk(directory: Path, oidc: OidcIssuer, *, store: str = "", **tasks: Any) -> AsyncIterator[Desk]:
    async with (
        running(Estate(directory, store), **desk_settings(oidc, **tasks)) as one,
        attested(one) as (node, agent_id, channel),
        AsyncExitStack() as stack,
    ):
        entry = await register(one, agent_id, TRIAGE)
        yield Desk(one, oidc, directory, stack, node, agent_id, channel, entry, store)


class Prover:
    """A key, and the nonce that a server gave for it."""

    def __init__(self, url: str = TOKEN_URL) -> None:
        self.key, self.url, self.nonce = ProofKey(), url, ""

    def header(self, **changes: Any) -> dict[str, str]:
        return {"DPoP": self.key.proof("POST", self.url, nonce=self.nonce, **changes)}

    async def post(self, client: httpx2.AsyncClient, data: dict[str, str], **headers: str) -> httpx2.Response:
        """Ask, and ask once more with the nonce that the server wants."""
        for _ in range(2):
            answer = await client.post("/token", data=data, headers=self.header() | headers)
            if "dpop-nonce" in answer.headers:
                self.nonce = answer.headers["dpop-nonce"]
            if answer.status_code != 400 or answer.json()["error"] != "use_dpop_nonce":
                return answer
        return answer


async def eventually(condition: Any, seconds: float = 30.0) -> None:
    """Wait for a condition with a deadline."""
    deadline = time.monotonic() + seconds
    while not await condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        await asyncio.sleep(0.02)
