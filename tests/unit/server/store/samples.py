"""Rows to store: short words for what matters, defaults for the rest."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

from broker.audit.events import Event
from broker.audit.records import Record
from broker.registry.entry import Entry
from broker.server.store.bundle_rows import PublishedBundle, PublishedKey
from broker.server.store.rows import (
    AuthorityKind,
    AuthorityRow,
    AuthorityState,
    NewFrame,
    Node,
    SessionRow,
    TokenRow,
)
from broker.spiffe import Selector, SpiffeId, TrustDomain
from broker.spiffe.federation import Profile, Relationship
from broker.tasks.authority import Authority
from broker.tasks.causes import Cause
from broker.tasks.delegation import Delegation
from broker.tasks.task import State, Task

# With microseconds: what is stored must come back as it was.
NOW = datetime(2026, 11, 22, 12, 0, 0, 123456, tzinfo=UTC)
SECOND = timedelta(seconds=1)
HOUR = timedelta(hours=1)
AGENT = SpiffeId("spiffe://example.org/agent/triage")
NODE = SpiffeId("spiffe://example.org/spire/agent/join_token/n1")
HASH = "sha-256:" + "A" * 43
X5T = "A" * 43


def entry(name: str = "web", **fields: Any) -> Entry:
    return Entry(
        **{
            "id": f"ent_{name}",
            "spiffe_id": SpiffeId(f"spiffe://example.org/{name}"),
            "parent_id": NODE,
            "selectors": frozenset({Selector("unix:uid:1000"), Selector("unix:path:/usr/bin/web")}),
            "created_at": NOW,
        }
        | fields
    )


def full_entry() -> Entry:
    return entry(
        "full",
        x509_svid_ttl=3600,
        jwt_svid_ttl=300,
        federates_with=frozenset({TrustDomain("b.example"), TrustDomain("a.example")}),
        admin=True,
        downstream=True,
        expires_at=NOW + HOUR,
        dns_names=("z.example.org", "a.example.org"),
        revision=7,
        store_svid=True,
        hint="inner “quoted” \\ ' ; DROP TABLE entries",
        allowed_audiences=frozenset({"https://a.example", "b"}),
        may_start_tasks=True,
        description="ünïcode, emoji 🪪",
        owner="team-a",
        disable_x509_svid_prefetch=True,
        jwt_svid_include_jti=True,
    )


def node(**fields: Any) -> Node:
    return Node(
        **{
            "id": NODE,
            "attestation_type": "join_token",
            "serial": "1234",
            "new_serial": "",
            "expires_at": NOW + HOUR,
            "selectors": frozenset({Selector("join_token:abc")}),
        }
        | fields
    )


def authority(name: str = "a1", **fields: Any) -> AuthorityRow:
    return AuthorityRow(
        **{
            "kind": AuthorityKind.X509,
            "id": name,
            "public": b"\x00\xff DER",
            "state": AuthorityState.PREPARED,
            "not_before": NOW,
            "not_after": NOW + HOUR,
        }
        | fields
    )


def session(name: str = "ws_1", **fields: Any) -> SessionRow:
    return SessionRow(
        **{
            "id": name,
            "agent": NODE,
            "spiffe_id": AGENT,
            "entry_id": "ent_web",
            "x5t": X5T,
            "not_after": NOW + HOUR,
            "started_at": NOW,
        }
        | fields
    )


def task(name: str = "tsk_1", *, parent: Task | None = None, **fields: Any) -> Task:
    place = (
        {"root": name, "parent": None, "depth": 0}
        if parent is None
        else {"root": parent.root, "parent": parent.id, "depth": parent.depth + 1}
    )
    user = fields.get("user", "usr_1")
    return Task(
        **{
            "id": name,
            "user": user,
            "agent": AGENT,
            "session": "ws_1",
            "purpose": "triage ticket 4711",
            "authority": Authority.parse(
                [{"type": "api", "locations": ["https://tickets.example.org"], "actions": ["ticket.read"]}]
            ),
            "delegation": Delegation(
                issuer="https://idp.example.org", user=user, expires_at=NOW + 24 * HOUR, token_hash=HASH
            ),
            "created_at": NOW,
            "expires_at": NOW + HOUR,
        }
        | place
        | fields
    )


def token(name: str = "jti_1", *, of: str = "tsk_1", **fields: Any) -> TokenRow:
    return TokenRow(
        **{
            "jti": name,
            "task_id": of,
            "root": of,
            "resource": "https://tickets.example.org",
            "scope": "ticket.read",
            "agent": AGENT,
            "session": "ws_1",
            "x5t": X5T,
            "issued_at": NOW,
            "expires_at": NOW + 180 * SECOND,
            "hash": HASH,
        }
        | fields
    )


def frame(**fields: Any) -> NewFrame:
    return NewFrame(
        **{
            "kind": "subtree",
            "committed_at": 1_795_348_800_123,
            "forget_at": int((NOW + HOUR).timestamp()),
            "root": "tsk_1",
            "epoch": 1,
            "state": "revoked",
            "cause": "operator",
        }
        | fields
    )


def record(subject: str = "tsk_1", **fields: Any) -> Record:
    return Record(event=Event.TOKEN_ISSUED, at=NOW, actor=str(AGENT), subject=subject, fields=fields)


def ended(of: Task, state: State = State.COMPLETED, cause: Cause = Cause.COMPLETED) -> Task:
    return replace(of, state=state, cause=cause, ended_at=NOW + SECOND, version=of.version + 1)


def federated_bundle(name: str = "other.test", **fields: Any) -> PublishedBundle:
    return PublishedBundle(
        **{
            "trust_domain": TrustDomain(name),
            "x509": (PublishedKey("", b"\x00\xff DER", NOW.replace(microsecond=0), tainted=True),),
            "jwt": (PublishedKey("kid “quoted”", b"\x01 SPKI"),),
            "sequence": 2**64 - 1,
            "refresh_hint": 2**53 + 1,
        }
        | fields
    )


def relationship(name: str = "other.test", **fields: Any) -> Relationship:
    return Relationship(
        **{
            "trust_domain": TrustDomain(name),
            "url": f"https://{name}:8443/bundle?a=b",
            "profile": Profile.HTTPS_SPIFFE,
            "endpoint_id": SpiffeId(f"spiffe://{name}/spire/server"),
        }
        | fields
    )
