"""What the identity half's tests share: a real store, a clock moved by hand, and the use cases over both."""

from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from broker.attestation.contract import AttestedNode, Evidence
from broker.keys import MemoryKeys
from broker.registry.entry import Entry
from broker.server.authority.authorities import Authorities
from broker.server.authority.crl_publisher import CrlPublisher
from broker.server.authority.journal import Journal
from broker.server.authority.rotation import Rotation, RotationRules
from broker.server.authority.upstream import SelfSigned
from broker.server.identity.admission import Admission
from broker.server.identity.bundles import Bundles
from broker.server.identity.directory import Directory
from broker.server.identity.entries import Entries
from broker.server.identity.federated import Federated
from broker.server.identity.join_tokens import JoinTokens
from broker.server.identity.nodes import Nodes, put_node
from broker.server.identity.relationships import Relationships
from broker.server.identity.revocation import Revocation
from broker.server.identity.signing import Signing, SigningRules
from broker.server.identity.watch import Watch
from broker.server.store.rows import AuthorityKind, Node
from broker.server.store.sqlite import SqliteStore
from broker.server.tasks.lifecycle import end_revoked
from broker.spiffe import Selector, SpiffeId, X509Svid, verify_x509_svid
from tests.unit.server.authority.world import DOMAIN, StandingClock

AGENT = SpiffeId("spiffe://example.org/spire/agent/join_token/one")
OTHER = SpiffeId("spiffe://example.org/spire/agent/join_token/two")
SERVER = SpiffeId("spiffe://example.org/spire/server")
UID = Selector("unix:uid:1000")


class ScriptedAttestor:
    """A node attestor that answers what the test says, after the challenges that the test names."""

    def __init__(self, path: str = "/scripted/one", *, reattestable: bool = False, consumes: bool = False) -> None:
        self.path, self.reattestable, self.consumes = path, reattestable, consumes
        self.challenges: tuple[bytes, ...] = ()
        self.responses: list[bytes] = []
        self.selectors = frozenset({Selector("scripted:a:b")})

    async def verify(self, evidence: Evidence, challenge_with: Any) -> AttestedNode:
        for challenge in self.challenges:
            self.responses.append(await challenge_with(challenge))
        secret = evidence.payload.decode() if self.consumes else None
        path = f"{self.path}/{secret}" if secret else self.path
        return AttestedNode(path, self.selectors, self.reattestable, secret)


@dataclass
class World:
    """Everything of the identity half."""

    store: SqliteStore
    clock: StandingClock
    authorities: Authorities
    rotation: Rotation
    directory: Directory
    nodes: Nodes
    admission: Admission
    join_tokens: JoinTokens
    entries: Entries
    signing: Signing
    bundles: Bundles
    federated: Federated
    relationships: Relationships
    watch: Watch
    publisher: CrlPublisher
    revocation: Revocation
    keys: MemoryKeys
    attestor: ScriptedAttestor

    async def add(self, path: str, parent: SpiffeId = AGENT, **fields: Any) -> Entry:
        """Create an entry."""
        (created,) = await self.entries.create([draft(path, parent, self.clock, **fields)], "test")
        assert isinstance(created, Entry), created
        return created

    async def add_node(self, agent_id: SpiffeId = AGENT, **fields: Any) -> Node:
        """Write a node, as attestation would."""
        values = {
            "attestation_type": "scripted",
            "serial": "1",
            "new_serial": "",
            "selectors": frozenset[Selector](),
            **fields,
        }
        node = Node(agent_id, expires_at=self.clock.now() + timedelta(hours=1), **values)
        await self.store.write(lambda writer: put_node(writer, node))
        return node

    async def attest(self, payload: bytes = b"x") -> X509Svid:
        """Attest a node by the scripted attestor; gives its verified SVID."""

        async def none(challenge: bytes) -> bytes:
            return b"answer to " + challenge

        svid = await self.admission.attest(Evidence("scripted", payload), csr(), none)
        return verify_x509_svid(svid.chain_der, self.authorities.bundles, now=self.clock.now())


def draft(path: str, parent: SpiffeId, clock: StandingClock, **fields: Any) -> Entry:
    values = {
        "id": path.strip("/").replace("/", "."),
        "spiffe_id": SpiffeId.of(DOMAIN, path),
        "parent_id": parent,
        "selectors": frozenset({UID}),
        "created_at": clock.now(),
    }
    return Entry(**(values | fields))


def csr(key: ec.EllipticCurvePrivateKey | None = None) -> bytes:
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    return builder.sign(key or ec.generate_private_key(ec.SECP256R1()), hashes.SHA256()).public_bytes(Encoding.DER)


@asynccontextmanager
async def world(
    directory: Any, clock: StandingClock | None = None, audiences: tuple[str, ...] = ("*",)
) -> AsyncIterator[World]:
    clock = clock or StandingClock()
    async with SqliteStore.open(directory / "broker.db", clock=clock) as store:
        keys = MemoryKeys()
        authorities = Authorities(DOMAIN, keys)
        rules = RotationRules(DOMAIN, (AuthorityKind.X509, AuthorityKind.JWT), timedelta(hours=24), "replica")
        journal, upstream = Journal(store, authorities, clock), SelfSigned(DOMAIN, clock)
        rotation = Rotation(journal, keys, upstream, clock, rules)
        await rotation.settle()
        known = Directory(clock)
        await known.load(store)
        federated = Federated(authorities)
        await federated.load(store)
        bundles = Bundles(store, authorities, rotation, federated, clock, trust_domain=DOMAIN)
        nodes = Nodes(store, known, clock)
        publisher = CrlPublisher(store, keys, authorities, clock)
        revocation = Revocation(
            store,
            clock,
            trust_domain=DOMAIN,
            directory=known,
            authorities=authorities,
            publisher=publisher,
            end_session=end_revoked,
        )
        attestor = ScriptedAttestor()
        with ThreadPoolExecutor(1) as workers:
            yield World(
                store=store,
                clock=clock,
                authorities=authorities,
                rotation=rotation,
                directory=known,
                nodes=nodes,
                admission=Admission(
                    store,
                    nodes,
                    authorities,
                    clock,
                    trust_domain=DOMAIN,
                    attestors={"scripted": attestor},
                    agent_ttl=timedelta(hours=1),
                ),
                join_tokens=JoinTokens(store, clock, DOMAIN),
                entries=Entries(store, known, clock, DOMAIN),
                signing=Signing(
                    store,
                    known,
                    authorities,
                    clock,
                    rules=SigningRules(
                        trust_domain=DOMAIN,
                        issuer="https://issuer.example.org",
                        x509_ttl=timedelta(hours=1),
                        jwt_ttl=timedelta(minutes=5),
                        default_audiences=frozenset(audiences),
                    ),
                    workers=workers,
                ),
                bundles=bundles,
                federated=federated,
                relationships=Relationships(store, federated, clock, DOMAIN),
                watch=Watch(store, known, authorities, bundles, federated),
                publisher=publisher,
                revocation=revocation,
                keys=keys,
                attestor=attestor,
            )
