"""Rows that have no home of their own in the rules: what the tables hold, as frozen values.

Entries, tasks and audit records are the rules' own types and are stored as such. Times are aware datetimes and come back as
exactly what they were (frames carry integers instead, as on the wire). No row ever holds a token, a key or any other secret:
hashes and public halves only.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum

from broker.spiffe import Selector, SpiffeId, strictjson
from broker.tasks.task import State, Task


@dataclass(frozen=True, slots=True)
class Change:
    """One committed change: its sequence number is its place in the order of commits, without gaps."""

    seq: int
    kind: str
    key: str
    body: str


@dataclass(frozen=True, slots=True)
class Node:
    """A node agent that attested: ``serial`` is pinned, ``new_serial`` is offered and not used yet (empty: none)."""

    id: SpiffeId
    attestation_type: str
    serial: str
    new_serial: str
    expires_at: datetime
    selectors: frozenset[Selector]
    banned: bool = False
    reattestable: bool = False
    agent_version: str = ""


@dataclass(frozen=True, slots=True)
class JoinToken:
    """A one-time admission for a node, known only by its hash; ``agent_id`` asks for an alias entry, None for none."""

    token_hash: str
    agent_id: SpiffeId | None
    expires_at: datetime


class AuthorityKind(StrEnum):
    """What an authority signs; each kind has its own keys."""

    X509 = "x509"
    JWT = "jwt"
    TASK = "task"


class AuthorityState(StrEnum):
    """prepared (published, not used) → active (signs) → old (published until all it signed has expired)."""

    PREPARED = "prepared"
    ACTIVE = "active"
    OLD = "old"


@dataclass(frozen=True, slots=True)
class AuthorityRow:
    """The public half of an authority: a DER certificate (x509) or a DER SubjectPublicKeyInfo (jwt, task).

    ``replica`` holds the key. Below an upstream authority, ``upstream`` is the key identifier (hex) of its issuer and
    ``chain`` what leads from that issuer's certificate to the root, concatenated DER without the root.
    """

    kind: AuthorityKind
    id: str
    public: bytes
    state: AuthorityState
    not_before: datetime
    not_after: datetime
    tainted: bool = False
    replica: str = ""
    upstream: str = ""
    chain: bytes = b""


class Source(StrEnum):
    """Where an adopted authority comes from; a revoked one is remembered, so that it is not adopted again."""

    UPSTREAM = "upstream"
    DOWNSTREAM = "downstream"
    APPENDED = "appended"
    REVOKED = "revoked"


@dataclass(frozen=True, slots=True)
class AdoptedAuthority:
    """An authority of our bundle that no replica of ours signs with; ``public`` and ``id`` as in AuthorityRow."""

    kind: AuthorityKind
    id: str
    public: bytes
    not_after: datetime
    source: Source
    tainted: bool = False


@dataclass(frozen=True, slots=True)
class Published:
    """All that stands in our bundle, or signs, at one moment; ``replicas`` maps each replica to when it was last heard."""

    authorities: tuple[AuthorityRow, ...] = ()
    adopted: tuple[AdoptedAuthority, ...] = ()
    sequence: int = 0
    replicas: Mapping[str, datetime] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SessionRow:
    """One attested process instance, as its node agent told it; ``ended_at`` is None while it lives."""

    id: str
    agent: SpiffeId
    spiffe_id: SpiffeId
    entry_id: str
    x5t: str
    not_after: datetime
    started_at: datetime
    ended_at: datetime | None = None
    serial: str = ""
    """Of that leaf, in lower hex; empty where the node agent did not tell it."""
    run: str = ""
    """The run of the node agent that told of it; empty where it did not say."""


@dataclass(frozen=True, slots=True)
class SessionLeaf:
    """One leaf of a workload session, of which it may hold more than one while they overlap; ``serial`` as in SessionRow."""

    x5t: str
    not_after: datetime
    serial: str


@dataclass(frozen=True, slots=True)
class TokenRow:
    """A task token that was issued: its hash and what it was bound to, never the token."""

    jti: str
    task_id: str
    root: str
    resource: str
    scope: str
    agent: SpiffeId
    session: str | None
    x5t: str | None
    issued_at: datetime
    expires_at: datetime
    hash: str
    revoked_at: datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class NewFrame:
    """A message of the revocation feed before it has its number; fields that its kind does not use stay empty.

    ``committed_at`` is in milliseconds since 1970; ``forget_at`` in seconds: nothing that the frame kills lives longer.
    """

    kind: str
    committed_at: int
    forget_at: int
    root: str = ""
    task: str = ""
    epoch: int = 0
    state: str = ""
    session: str = ""
    jti: str = ""
    keys: str = ""
    cause: str = ""
    name: str = ""
    sid: str = ""
    not_before: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class FrameRow(NewFrame):
    """A frame with its number, which is also the number of its change."""

    seq: int

    @classmethod
    def of(cls, change: Change) -> "FrameRow":
        """Read a frame from its change (kind "frame"); for subscribers."""
        value = strictjson.loads(change.body.encode())
        if not isinstance(value, dict):
            raise TypeError("the body of a frame's change is not a JSON object")
        return cls(seq=change.seq, **value)  # type: ignore[arg-type]  # written by add_frame from the same class


@dataclass(frozen=True, slots=True)
class TaskFilter:
    """Which tasks a list is of; a field that is None does not narrow. ``live`` keeps pending, active and suspended."""

    live: bool = False
    state: State | None = None
    user: str | None = None
    agent: SpiffeId | None = None
    root: str | None = None
    parent: str | None = None


@dataclass(frozen=True, slots=True)
class ResumeRow:
    """A task that was taken up again: by which session, and which had it before (None: no session)."""

    task_id: str
    at: datetime
    session: str | None
    resumed_from: str | None


@dataclass(frozen=True, slots=True)
class TaskPage:
    """Tasks, oldest first; ``next`` is the token of the following page, None at the end."""

    tasks: tuple[Task, ...]
    next: str | None
