"""A server and a node agent in this process, with their real ports: this very process is three workloads, by three entries.

``triage`` and ``neighbour`` may start tasks, ``tickets`` is the service. Each has its SVID from the agent's socket and an HTTPS client
that presents it; ``socket`` is the agent's Tasks service. The audit log is read from the store's file.
"""

import json
import shutil
import socket
import sqlite3
import tempfile
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, closing
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc.aio
import httpx2
from cryptography.hazmat.primitives.serialization import load_der_private_key

from broker._proto.broker.agent.v1 import tasks_pb2
from broker._proto.service import ServiceBinding, Stub
from broker.audit.records import Record
from broker.client import Entries, Nodes, dial_socket
from broker.sdk.workload import Workload
from broker.server.api.grpc import authorities
from broker.server.api.http.token_formats import ACCESS_TOKEN, GRANT_TYPE
from broker.server.app import Server, server
from broker.server.settings import OperationsSettings, RateLimitSettings, ServerSettings, StoreSettings
from broker.server.task_settings import (
    AudienceSettings,
    OutwardSettings,
    SubjectSettings,
    TaskSettings,
    TransactionSettings,
)
from broker.spiffe import SpiffeId
from broker.spiffe.x509svid import split_der
from broker.tasks.keyset import read_keys
from broker.transport.rpc_errors import from_rpc_error
from broker.transport.tls import TlsIdentity, client_context, roots_of
from tests.fakes.oidc import OidcIssuer
from tests.fakes.running_agent import HEADER, RunningAgent
from tests.integration.test_agent_server import TD
from tests.integration.test_agent_server import Estate as Machines

TICKETS, WIKI, REMOTE = "https://tickets.example.org", "https://wiki.example.org", "https://as.partner.example"
TRIAGE, NEIGHBOUR, SERVICE = (SpiffeId(f"spiffe://example.org/{name}") for name in ("triage", "neighbour", "tickets"))
DETAILS = [{"type": "api", "locations": [TICKETS], "actions": ["ticket.read", "ticket.write"]}]
TASKS = ServiceBinding.of(tasks_pb2.DESCRIPTOR, "Tasks")


class Estate(Machines):
    """The same machines, with a task half that has something to decide."""

    def __init__(self, directory: Path, oidc: OidcIssuer, *audiences: str) -> None:
        super().__init__(directory)
        self.oidc = oidc
        self.audiences = audiences
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            # The issuer's address holds the port, so that it must be known before.
            self.port = probe.getsockname()[1]

    lease: timedelta | None = None
    """How long a user's session counts without another word."""
    lease_ttl = timedelta(seconds=30)
    """How long a supervised process may be silent."""
    allow_unsupervised = False

    @property
    def issuer(self) -> str:
        return f"https://localhost:{self.port}"

    @asynccontextmanager
    async def server(self) -> AsyncIterator[Server]:
        (self.directory / "data").mkdir(exist_ok=True)
        settings = ServerSettings(
            trust_domain=TD,
            issuer=self.issuer,
            bind_address="127.0.0.1",
            bind_port=self.port,
            data_dir=self.directory / "data",
            runtime_dir=self.directory / "server",
            store=StoreSettings(url=f"sqlite://{self.directory}/broker.db"),
            operations=OperationsSettings(enabled=False),
            ratelimit=RateLimitSettings(attestation=False),
            subjects=(
                SubjectSettings(
                    issuer=self.oidc.issuer, audiences=("broker",), ca_path=self.oidc.ca_path, session_lease=self.lease
                ),
            ),
            audiences=(
                AudienceSettings(
                    resource=TICKETS, introspectors=(SERVICE,), transactions=True, transaction_requesters=(SERVICE,)
                ),
                AudienceSettings(resource=WIKI),
                *(AudienceSettings(resource=each) for each in self.audiences),
            ),
            transactions=TransactionSettings(replacers=(NEIGHBOUR,)),
            tasks=TaskSettings(lease_ttl=self.lease_ttl, allow_unsupervised=self.allow_unsupervised),
            outward=(OutwardSettings(issuer=REMOTE, resources=(WIKI,), formats=("id-jag", "jwt")),),
        )
        async with server(settings) as running:
            channel = dial_socket(settings.socket_path)
            self.entries, self.nodes = Entries(channel), Nodes(channel)
            self.operator = Stub(channel, authorities.BINDING)
            try:
                yield running
            finally:
                await channel.close()


@dataclass
class Rig:
    """Everything that an attack may touch."""

    estate: Estate
    agent: RunningAgent
    socket: Stub
    clients: dict[SpiffeId, httpx2.AsyncClient] = field(default_factory=dict)
    files: dict[SpiffeId, Any] = field(default_factory=dict)
    entries: dict[SpiffeId, str] = field(default_factory=dict)

    @property
    def issuer(self) -> str:
        return self.estate.issuer

    @property
    def operator(self) -> Stub:
        """The authorities, on the server's admin socket."""
        return self.estate.operator

    def user_token(self, sub: str = "alice", **claims: Any) -> str:
        return self.estate.oidc.token(sub, **claims)

    def form(self, **changes: Any) -> list[tuple[str, str]]:
        """A good exchange; ``None`` leaves a parameter out, a list sends it several times."""
        good: dict[str, Any] = {
            "grant_type": GRANT_TYPE,
            "subject_token": self.user_token(),
            "subject_token_type": ACCESS_TOKEN,
            "resource": TICKETS,
            "authorization_details": json.dumps(DETAILS),
        }
        return [
            (name, each)
            for name, value in (good | changes).items()
            for each in (value if isinstance(value, list) else [value])
            if each is not None
        ]

    async def post(
        self, path: str, pairs: Sequence[tuple[str, str]], who: SpiffeId = TRIAGE, **headers: str
    ) -> httpx2.Response:
        body = str(httpx2.QueryParams(list(pairs))).encode()
        kind = {"content-type": "application/x-www-form-urlencoded"}
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        return await self.clients[who].post(path, content=body, headers=kind | sent)

    async def token(self, who: SpiffeId = TRIAGE, **changes: Any) -> httpx2.Response:
        return await self.post("/token", self.form(**changes), who)

    async def issued(self, who: SpiffeId = TRIAGE, **changes: Any) -> dict[str, Any]:
        response = await self.token(who, **changes)
        assert response.status_code == 200, response.text
        body: dict[str, Any] = response.json()
        return body

    async def active(self, token: str, who: SpiffeId = SERVICE) -> bool:
        response = await self.post("/introspect", [("token", token)], who)
        assert response.status_code == 200, response.text
        body = response.json()
        assert body["active"] or body == {"active": False}
        return bool(body["active"])

    async def keys(self) -> dict[str, Any]:
        return read_keys((await self.clients[TRIAGE].get("/keys")).content)

    def records(self, *events: str) -> list[Record]:
        with closing(sqlite3.connect(f"file:{self.estate.directory}/broker.db?mode=ro", uri=True)) as database:
            bodies = [row[0] for row in database.execute("SELECT body FROM audit_records ORDER BY seq")]
        found = [Record.from_body(bytes(body)) for body in bodies]
        return [record for record in found if not events or record.event in events]


def short_directory() -> Path:
    """A Unix socket's path has at most 107 bytes."""
    directory = Path(tempfile.mkdtemp(dir="/tmp"))
    directory.chmod(0o755)
    return directory


@asynccontextmanager
async def rig(
    *audiences: str, session_lease: timedelta | None = None, allow_unsupervised: bool = False
) -> AsyncIterator[Rig]:
    """Start everything, with further audiences; all of it is gone afterwards."""
    directory = short_directory()
    try:
        async with AsyncExitStack() as stack:
            oidc = stack.enter_context(OidcIssuer.start(directory))
            estate = Estate(directory, oidc, *audiences)
            estate.lease, estate.lease_ttl = session_lease, session_lease or estate.lease_ttl
            estate.allow_unsupervised = allow_unsupervised
            await stack.enter_async_context(estate.server())
            agent = await stack.enter_async_context(estate.agent())
            entries = {
                who: await estate.register(agent, who.path, may_start_tasks=who != SERVICE)
                for who in (TRIAGE, NEIGHBOUR, SERVICE)
            }
            channel = await stack.enter_async_context(agent.channel())
            made = Rig(estate, agent, Stub(channel, TASKS), entries=entries)
            await _present(made, stack)
            yield made
    finally:
        shutil.rmtree(directory)


async def _present(made: Rig, stack: AsyncExitStack) -> None:
    """Take the three SVIDs of this process from the socket."""
    workload = await stack.enter_async_context(Workload.connect(f"unix:{made.agent.socket}"))
    await workload.identity(timeout=30)
    answer = await made.agent.x509()
    assert {one.spiffe_id for one in answer.svids} == {str(TRIAGE), str(NEIGHBOUR), str(SERVICE)}
    for one in answer.svids:
        chain = tuple(split_der(one.x509_svid))
        key: Any = load_der_private_key(one.x509_svid_key, None)
        context = client_context(TlsIdentity(chain, key), roots_of(workload.bundles))
        client = httpx2.AsyncClient(verify=context, base_url=made.issuer, trust_env=False)
        made.clients[SpiffeId(one.spiffe_id)] = await stack.enter_async_context(client)
        made.files[SpiffeId(one.spiffe_id)] = (chain, key, split_der(one.bundle))


async def by_socket(made: Rig, **fields: Any) -> Any:
    """Ask for a token at the agent's socket."""
    return await made.socket.IssueToken(tasks_pb2.IssueTokenRequest(**fields), metadata=HEADER, timeout=30)


async def started(made: Rig, **fields: Any) -> Any:
    """Start a task at the agent's socket, as triage."""
    good = {
        "spiffe_id": str(TRIAGE),
        "user_token": made.user_token(),
        "purpose": "triage",
        "authorization_details": json.dumps(DETAILS),
    }
    return await made.socket.StartTask(tasks_pb2.StartTaskRequest(**good | fields), metadata=HEADER, timeout=30)


async def refused_by_socket(made: Rig, **fields: Any) -> str:
    """Be refused at the socket; give the stable code."""
    try:
        await by_socket(made, **fields)
    except grpc.aio.AioRpcError as error:
        return from_rpc_error(error).reason
    raise AssertionError(f"{fields} was not refused")
