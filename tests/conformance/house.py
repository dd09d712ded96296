"""A real server and a real node agent, as processes, started once for the whole package; and the keys of a second replica.

The server publishes what the store holds: authorities of another replica stand in the bundle beside its own. Their private
keys are held here, so that a test can sign whatever it likes, right or wrong, and the signature itself is always good.
"""

import asyncio
import http.client
import json
import os
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import grpc
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from broker._proto.broker.server.v1 import entries_pb2
from broker._proto.service import Stub
from broker._proto.spiffe import workload_pb2
from broker._proto.spire.api.server.entry.v1 import entry_pb2 as entry_service_pb2
from broker._proto.spire.api.types import entry_pb2, selector_pb2, spiffeid_pb2
from broker.agent.listener import WORKLOAD
from broker.client import Nodes, dial_socket
from broker.client.calls import spiffe_id_text
from broker.clock import SystemClock
from broker.dev.configuration import TRUST_DOMAIN, Plan
from broker.dev.estate import Estate
from broker.dev.layout import private_directory
from broker.dev.programs import install_program, program_environment
from broker.server.api.grpc import entries, entry
from broker.server.store.rows import AuthorityKind, AuthorityRow, AuthorityState
from broker.server.store.sqlite import SqliteStore
from broker.spiffe import Bundle, BundleSet, SpiffeId, TrustDomain, jose
from broker.transport.rpc_errors import from_rpc_error
from broker.transport.tls import TlsIdentity, client_context
from tests.fakes.svid_pki import Holder, Pki

DOMAIN = TrustDomain(TRUST_DOMAIN)
ONE, TWO = f"spiffe://{TRUST_DOMAIN}/conformance/one", f"spiffe://{TRUST_DOMAIN}/conformance/two"
RESOURCE = "https://tickets.dev.test"
HEADER = (("workload.spiffe.io", "true"),)
SECONDS = 30.0
"""For one answer: far more than a busy machine needs."""
OWN_CONNECTION = (("grpc.use_local_subchannel_pool", 1),)


class Replica:
    """Another replica of the server: an X.509 and a JWT authority whose private keys are ours."""

    def __init__(self) -> None:
        self.pki = Pki(SystemClock().now().replace(microsecond=0))
        self.root = self.pki.root("another replica", start=timedelta(hours=-1))
        self.jwt_key = ec.generate_private_key(ec.SECP256R1())
        self.kid = "another-replica"

    def rows(self) -> list[AuthorityRow]:
        """What it has published: authorities that sign nothing more, and still count."""
        start, end = self.pki.now - timedelta(hours=1), self.pki.now + timedelta(hours=20)
        spki = self.jwt_key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        published = ((AuthorityKind.X509, "another-root", self.root.der), (AuthorityKind.JWT, self.kid, spki))
        return [
            AuthorityRow(
                kind=kind, id=name, public=public, state=AuthorityState.OLD, not_before=start, not_after=end
            )
            for kind, name, public in published
        ]  # fmt: skip

    def leaf(self, *uris: str, issuer: Holder | None = None, **changes: Any) -> Holder:
        return self.pki.leaf(issuer or self.root, *(uris or (ONE,)), **changes)

    def claims(self, **changes: Any) -> dict[str, Any]:
        """Good claims of a JWT-SVID; a change to None leaves a claim out."""
        now = int(SystemClock().now().timestamp())
        good = {"sub": ONE, "aud": ["tests"], "iat": now - 5, "exp": now + 300, "jti": "1"} | changes
        return {name: value for name, value in good.items() if value is not None}

    def header(self, **changes: Any) -> dict[str, Any]:
        good = {"alg": "ES256", "kid": self.kid, "typ": "JWT"} | changes
        return {name: value for name, value in good.items() if value is not None}

    def sign(self, signing_input: bytes) -> bytes:
        return es256(self.jwt_key, signing_input)

    def token(self, header: Mapping[str, Any] | None = None, **claims: Any) -> str:
        return self.raw(json.dumps(self.header(**(header or {}))), json.dumps(self.claims(**claims)))

    def raw(self, header: str | bytes, payload: str | bytes) -> str:
        """Sign two texts as they are."""
        parts = [text.encode() if isinstance(text, str) else text for text in (header, payload)]
        text = ".".join(jose.b64url_encode(part) for part in parts)
        return f"{text}.{jose.b64url_encode(self.sign(text.encode()))}"


def es256(key: ec.EllipticCurvePrivateKey, data: bytes) -> bytes:
    r, s = decode_dss_signature(key.sign(data, ec.ECDSA(hashes.SHA256())))
    return r.to_bytes(32) + s.to_bytes(32)


@dataclass(frozen=True)
class Answer:
    """What the TLS port said: a status and a body, or nothing but the end of the connection (status 0)."""

    status: int
    body: Mapping[str, Any]

    @property
    def code(self) -> str:
        """The stable code of a refusal; empty where there is none."""
        error = self.body.get("error")
        return str(error["code"] if isinstance(error, dict) else self.body.get("error_code", ""))


class House:
    """The running programs, and the ways in."""

    def __init__(self, estate: Estate, replica: Replica) -> None:
        self.estate, self.replica = estate, replica
        self.program = str(Path("/proc/self/exe").resolve())
        self.node = ""

    @property
    def port(self) -> int:
        return self.estate.require_record().ports.server

    @property
    def issuer(self) -> str:
        return self.estate.require_record().ports.server_url

    @property
    def agent_socket(self) -> Path:
        return self.estate.layout.agent_socket

    @property
    def selectors(self) -> list[str]:
        """This very process, and no program beside it."""
        return [f"unix:uid:{os.geteuid()}", f"unix:path:{self.program}"]

    @contextmanager
    def channel(self, path: Path) -> Iterator[grpc.Channel]:
        with grpc.insecure_channel(f"unix:{path}", options=OWN_CONNECTION) as channel:
            yield channel

    @contextmanager
    def admin(self) -> Iterator[grpc.Channel]:
        """The server's admin socket."""
        with self.channel(self.estate.layout.server_socket) as channel:
            yield channel

    @contextmanager
    def workload(self) -> Iterator[Stub]:
        """The Workload API, as this process."""
        with self.channel(self.agent_socket) as channel:
            yield Stub(channel, WORKLOAD)

    # ---- registration

    def create(self, *wanted: entries_pb2.RegisteredEntry) -> list[Any]:
        """Register; one result per entry, with its status."""
        with self.admin() as channel:
            request = entries_pb2.BatchCreateEntryRequest(entries=wanted)
            return list(Stub(channel, entries.BINDING).BatchCreateEntry(request, timeout=SECONDS).results)

    @contextmanager
    def registered(self, path: str, **more: Any) -> Iterator[str]:
        """An entry for as long as the block lasts; gives its id."""
        (result,) = self.create(self.entry(path, **more))
        assert result.status.code == 0, result.status.message
        try:
            yield result.entry.entry.id
        finally:
            self.delete(result.entry.entry.id)

    def delete(self, entry_id: str) -> None:
        with self.admin() as channel:
            request = entry_service_pb2.BatchDeleteEntryRequest(ids=[entry_id])
            Stub(channel, entry.BINDING).BatchDeleteEntry(request, timeout=SECONDS)

    def entry(self, path: str, *, selectors: list[str] | None = None, parent: str = "", **more: Any) -> Any:
        """An entry below the agent, for this process unless ``selectors`` say otherwise."""
        ours = {name: more.pop(name) for name in ("allowed_audiences", "may_start_tasks", "owner") if name in more}
        pairs = [one.partition(":") for one in (self.selectors if selectors is None else selectors)]
        wanted = entry_pb2.Entry(
            spiffe_id=spiffeid_pb2.SPIFFEID(trust_domain=TRUST_DOMAIN, path=path),
            parent_id=spiffeid_pb2.SPIFFEID(trust_domain=TRUST_DOMAIN, path=parent or SpiffeId(self.node).path),
            selectors=[selector_pb2.Selector(type=kind, value=value) for kind, _, value in pairs],
            **more,
        )
        return entries_pb2.RegisteredEntry(entry=wanted, **ours)

    # ---- what the agent says

    def x509(self) -> workload_pb2.X509SVIDResponse:
        with self.workload() as stub:
            call = stub.FetchX509SVID(workload_pb2.X509SVIDRequest(), metadata=HEADER, timeout=SECONDS)
            answer: workload_pb2.X509SVIDResponse = next(call)
            call.cancel()
            return answer

    def jwt(self, *audience: str, spiffe_id: str = "") -> workload_pb2.JWTSVIDResponse:
        with self.workload() as stub:
            request = workload_pb2.JWTSVIDRequest(audience=audience, spiffe_id=spiffe_id)
            answer: workload_pb2.JWTSVIDResponse = stub.FetchJWTSVID(request, metadata=HEADER, timeout=SECONDS)
            return answer

    @cached_property
    def stranger(self) -> Path:
        """Another program of the same user, with a file of its own, that no entry names."""
        return install_program(self.estate.layout.directory / "programs", "stranger")

    def strange(self) -> dict[str, tuple[str, str]]:
        """What the stranger is told: status and words by method."""
        run = subprocess.run(
            [self.stranger, "-m", "tests.conformance.stranger", self.agent_socket],
            env=program_environment(os.environ), capture_output=True, check=True, timeout=2 * SECONDS,
        )  # fmt: skip
        return {name: (code, words) for name, (code, words) in json.loads(run.stdout).items()}

    @cached_property
    def refusals(self) -> dict[str, tuple[str, str]]:
        """What it is told while no entry names it."""
        return self.strange()

    @cached_property
    def bundles(self) -> BundleSet:
        """What a workload of this node trusts, as the Workload API tells it."""
        name = str(DOMAIN.id)
        with self.workload() as stub:
            x509 = next(stub.FetchX509Bundles(workload_pb2.X509BundlesRequest(), metadata=HEADER, timeout=SECONDS))
            jwt = next(stub.FetchJWTBundles(workload_pb2.JWTBundlesRequest(), metadata=HEADER, timeout=SECONDS))
        return BundleSet.of(Bundle.from_workload_api(DOMAIN, x509_der=x509.bundles[name], jwks=jwt.bundles[name]))

    @property
    def roots(self) -> list[bytes]:
        return [one.public_bytes(Encoding.DER) for one in self.bundles[DOMAIN].x509_authorities]

    # ---- the TLS port

    def ask(self, identity: TlsIdentity | None, path: str = "/keys", form: Mapping[str, str] | None = None) -> Answer:
        """One HTTPS request over a connection of its own, presenting this identity; with a form, a POST."""
        return self.post(identity, path, None if form is None else urlencode(form))

    def post(self, identity: TlsIdentity | None, path: str, body: str | None) -> Answer:
        """The same with the form as it is to be sent; without one, a GET."""
        connection = self.https(identity)
        try:
            return posted(connection, path, body)
        except (ssl.SSLError, ConnectionError, http.client.BadStatusLine):
            return Answer(0, {})
        finally:
            connection.close()

    def https(self, identity: TlsIdentity | None) -> http.client.HTTPSConnection:
        """A connection to the TLS port that presents this identity; not open yet."""
        context = client_context(identity, self.roots)
        return http.client.HTTPSConnection("127.0.0.1", self.port, timeout=SECONDS, context=context)

    def present(self, leaf: Holder, *chain: Holder) -> Answer:
        """Knock at the TLS port with a chain: 200 where it is accepted, 403 with a code or 0 where it is not."""
        return self.ask(TlsIdentity((leaf.der, *(one.der for one in chain)), leaf.key))


def posted(connection: http.client.HTTPSConnection, path: str, body: str | None) -> Answer:
    """Send a form, or a GET without one; give the answer."""
    headers = {} if body is None else {"content-type": "application/x-www-form-urlencoded"}
    connection.request("GET" if body is None else "POST", path, body, headers)
    response = connection.getresponse()
    said = response.read()
    return Answer(response.status, json.loads(said) if said else {})


def reason(call: Callable[[], Any]) -> str:
    """Call, and give the stable code of the refusal; empty where there is none."""
    try:
        call()
    except grpc.RpcError as error:
        found = from_rpc_error(error)  # type: ignore[arg-type]  # a blocking call's error has the same face
        assert found.reason, "a refusal without a code"
        return found.reason
    return ""


def until(condition: Callable[[], Any], seconds: float = SECONDS) -> Any:
    """Wait for a condition with a deadline; give what made it true."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.01)
    return found


@contextmanager
def running(directory: Path) -> Iterator[House]:
    """The programs run for as long as the block lasts, and two entries name this process."""
    replica = Replica()
    estate = Estate(directory / "e", plan=Plan(audiences=(RESOURCE,), first_identity_wait="300ms"))
    house = House(estate, replica)

    async def publish() -> None:
        data = estate.layout.data("server")
        private_directory(estate.layout.directory)
        private_directory(data)
        async with SqliteStore.open(data / "broker.db") as store:
            await store.write(lambda writer: [writer.put_authority(row) for row in replica.rows()])

    async def node() -> str:
        channel = dial_socket(estate.layout.server_socket)
        try:
            (one,) = await Nodes(channel).list()
            return spiffe_id_text(one.id)
        finally:
            await channel.close()

    try:
        asyncio.run(publish())
        asyncio.run(estate.up(lambda _: None))
        house.node = asyncio.run(node())
        (first,) = house.create(house.entry("/conformance/one", id="conformance-1", hint="internal"))
        (second,) = house.create(
            house.entry("/conformance/two", id="conformance-2", hint="external", dns_names=["two.dev.test"])
        )
        assert (first.status.code, second.status.code) == (0, 0)
        until(lambda: len(house.x509().svids) == 2)
        yield house
    finally:
        estate.down()
