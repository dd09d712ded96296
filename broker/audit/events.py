"""The audit log's events: a closed set, each with the names of what may be said about it.

Responsible for what a record is and for its one canonical form. Chaining is in :mod:`broker.audit.chain`, keeping is the
store's. A record never holds a secret: names are declared per event, and of text that looks like a token or a private key
only the hash is kept. Nobody can keep a refusal out of the log by the text that he sends.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from types import MappingProxyType
from typing import Final, Self, TypeAlias

from broker.errors import Invalid, InvalidJson
from broker.spiffe import strictjson
from broker.spiffe.jose import b64url_encode
from broker.spiffe.strictjson import MAX_EXACT, JsonValue

FieldValue: TypeAlias = str | int | bool | list[str] | tuple[str, ...] | None

VERSION: Final = 1
"""The form of a record's body; another form gets another number, and old rows stay as they are."""
MAX_TEXT: Final = 8192
"""Longest text kept as it is, in characters: a canonical authority, or a selector with a path, must fit."""
MAX_ITEMS: Final = 256
"""Most texts in one list: an entry's selectors must fit."""

# A compact JWS or JWE starts with a JSON object's first two characters in base64url. It is looked for at the start of a
# word only, which keeps the search linear. Lone surrogates are not text.
_UNFIT: Final = re.compile(
    "(?<![A-Za-z0-9_-])eyJ[A-Za-z0-9_-]{5,}\\.[A-Za-z0-9_-]*\\.[A-Za-z0-9_-]*|-----BEGIN [A-Z ]*PRIVATE KEY|[\ud800-\udfff]"
)
_TOKEN_SIGN: Final = "eyJ"  # noqa: S105  # how every JWS begins
_KEY_SIGN: Final = "-----BEGIN"
_TIME: Final = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}\.[0-9]{6}Z")


class Event(StrEnum):
    """What may be recorded. Values are stable; new ones are only added."""

    SERVER_STARTED = "server_started"
    SERVER_STOPPED = "server_stopped"
    CLOCK_STEPPED = "clock_stepped"
    NODE_ATTESTED = "node_attested"
    NODE_RENEWED = "node_renewed"
    NODE_REFUSED = "node_refused"
    AGENT_EVICTED = "agent_evicted"
    AGENT_PURGED = "agent_purged"
    AGENT_BANNED = "agent_banned"
    JOIN_TOKEN_CREATED = "join_token_created"  # noqa: S105 - an event's name
    JOIN_TOKEN_USED = "join_token_used"  # noqa: S105 - an event's name
    ENTRY_CREATED = "entry_created"
    ENTRY_UPDATED = "entry_updated"
    ENTRY_DELETED = "entry_deleted"
    SVID_ISSUED = "svid_issued"
    SVID_REFUSED = "svid_refused"
    SVID_REVOKED = "svid_revoked"
    CRL_PUBLISHED = "crl_published"
    SESSION_STARTED = "session_started"
    SESSION_ENDED = "session_ended"
    WORKLOAD_REFUSED = "workload_refused"
    CONNECTION_REFUSED = "connection_refused"
    TASK_STARTED = "task_started"
    TASK_REFUSED = "task_refused"
    TASK_ATTACHED = "task_attached"
    TASK_SUSPENDED = "task_suspended"
    TASK_RESUMED = "task_resumed"
    TASK_ENDED = "task_ended"
    TOKEN_ISSUED = "token_issued"  # noqa: S105 - an event's name
    TOKEN_REFUSED = "token_refused"  # noqa: S105 - an event's name
    TOKEN_REVOKED = "token_revoked"  # noqa: S105 - an event's name
    TOKEN_INTROSPECTED = "token_introspected"  # noqa: S105 - an event's name
    TASKS_STOPPED = "tasks_stopped"
    USER_ENABLED = "user_enabled"
    SIGNAL_RECEIVED = "signal_received"
    SIGNAL_REFUSED = "signal_refused"
    DELEGATION_CREATED = "delegation_created"
    DELEGATION_REFUSED = "delegation_refused"
    DELEGATION_ENDED = "delegation_ended"
    AUTHORITY_PREPARED = "authority_prepared"
    AUTHORITY_ACTIVATED = "authority_activated"
    AUTHORITY_RETIRED = "authority_retired"
    AUTHORITY_TAINTED = "authority_tainted"
    AUTHORITY_REVOKED = "authority_revoked"
    AUTHORITY_PRUNED = "authority_pruned"
    BUNDLE_CHANGED = "bundle_changed"
    BUNDLE_DELETED = "bundle_deleted"
    RELATIONSHIP_CREATED = "relationship_created"
    RELATIONSHIP_UPDATED = "relationship_updated"
    RELATIONSHIP_DELETED = "relationship_deleted"
    ADMIN_REFUSED = "admin_refused"
    POLICY_CHANGED = "policy_changed"


COMMON: Final = frozenset(
    {
        "code",  # the stable code of an error
        "reason",  # the same, where a person chose it
        "left_out",  # how many like it were not recorded, because there were too many
        "cause",
        "decision",
        "rules",  # which rules of the policy decided
        "policy",  # the hash of the bundle that they stand in
        "errors",  # what of it could not be evaluated
        "reasons",
        "door",  # where the request came in: agent, https, admin
        "remote",
        "method",
        "request_id",
        "replica",
        "node",  # SPIFFE ID of the node agent
        "agent",  # SPIFFE ID of the workload that acts
        "spiffe_id",
        "entry_id",
        "session",  # workload session
        "user",
        "task",
        "root",
        "txn",
        "jti_hash",
    }
)
"""What may be said of every event: the names by which records are joined."""

_NODE: Final = frozenset(
    {"attestor", "serial", "expires_at", "selectors", "reattestable", "agent_version", "previous_serial"}
)
_JOIN_TOKEN: Final = frozenset({"token_hash", "expires_at", "attestor"})
_ENTRY: Final = frozenset(
    {
        "parent_id",
        "selectors",
        "revision",
        "admin",
        "downstream",
        "may_start_tasks",
        "allowed_audiences",
        "federates_with",
        "dns_names",
        "x509_svid_ttl",
        "jwt_svid_ttl",
        "expires_at",
        "store_svid",
        "hint",
        "owner",
        "changed",
    }
)
_SVID: Final = frozenset({"kind", "serial", "x5t", "audience", "not_before", "expires_at", "authority", "minted"})
_CRL: Final = frozenset({"number", "revoked", "indirect", "expires_at"})
_SESSION: Final = frozenset({"x5t", "not_after", "tasks_ended"})
_TASK: Final = frozenset(
    {
        "parent",
        "depth",
        "purpose_hash",
        "authority_hash",
        "authorization_details",
        "expires_at",
        "supervision",
        "state",
        "version",
        "epoch",
        "issuer",
        "client",
        "user_session",
        "delegation",  # a standing one
        "subject_hash",
        "frame_seq",
        "tasks_ended",
        "resource",
        "resumed_from",
        "supersedes",
    }
)
_TOKEN: Final = _TASK | {
    "audience",
    "scope",
    "x5t",
    "hop",
    "issued_at",
    "kid",
    "token_hash",
    "binding",
    "jkt",
    "active",
    "kind",
}
_USER: Final = frozenset(
    {
        "kind",  # what a stop is of; which kind of signal
        "source",
        "issuer",
        "client",
        "user_session",
        "audience",
        "delegation",
        "disabled",
        "not_before",
        "frame_seq",
        "tasks_ended",
        "delegations_ended",
        "unfinished",
        "agents",
        "authority_hash",
        "max_task_ttl",
        "max_hops",
        "expires_at",
        "subject_hash",
        "effect",
    }
)
_AUTHORITY: Final = frozenset({"kind", "not_before", "not_after", "state", "sequence", "algorithm"})
_BUNDLE: Final = frozenset({"trust_domain", "sequence", "x509_authorities", "jwt_authorities"})
_RELATIONSHIP: Final = frozenset({"trust_domain", "endpoint_url", "profile", "endpoint_id"})
_SERVER: Final = frozenset({"version", "store", "roles", "seconds", "chain_seq"})
_POLICY: Final = frozenset({"version", "previous", "source", "rule_count"})

_FAMILIES: Final = {
    _SERVER: (Event.SERVER_STARTED, Event.SERVER_STOPPED, Event.CLOCK_STEPPED),
    _NODE: (
        Event.NODE_ATTESTED,
        Event.NODE_RENEWED,
        Event.NODE_REFUSED,
        Event.AGENT_EVICTED,
        Event.AGENT_PURGED,
        Event.AGENT_BANNED,
    ),
    _JOIN_TOKEN: (Event.JOIN_TOKEN_CREATED, Event.JOIN_TOKEN_USED),
    _ENTRY: (Event.ENTRY_CREATED, Event.ENTRY_UPDATED, Event.ENTRY_DELETED),
    _SVID: (Event.SVID_ISSUED, Event.SVID_REFUSED, Event.SVID_REVOKED),
    _CRL: (Event.CRL_PUBLISHED,),
    _SESSION: (Event.SESSION_STARTED, Event.SESSION_ENDED),
    _TASK: (
        Event.TASK_STARTED,
        Event.TASK_REFUSED,
        Event.TASK_ATTACHED,
        Event.TASK_SUSPENDED,
        Event.TASK_RESUMED,
        Event.TASK_ENDED,
    ),
    _TOKEN: (Event.TOKEN_ISSUED, Event.TOKEN_REFUSED, Event.TOKEN_REVOKED, Event.TOKEN_INTROSPECTED),
    _USER: (
        Event.TASKS_STOPPED,
        Event.USER_ENABLED,
        Event.SIGNAL_RECEIVED,
        Event.SIGNAL_REFUSED,
        Event.DELEGATION_CREATED,
        Event.DELEGATION_REFUSED,
        Event.DELEGATION_ENDED,
    ),
    _AUTHORITY: (
        Event.AUTHORITY_PREPARED,
        Event.AUTHORITY_ACTIVATED,
        Event.AUTHORITY_RETIRED,
        Event.AUTHORITY_TAINTED,
        Event.AUTHORITY_REVOKED,
        Event.AUTHORITY_PRUNED,
    ),
    _BUNDLE: (Event.BUNDLE_CHANGED, Event.BUNDLE_DELETED),
    _POLICY: (Event.POLICY_CHANGED,),
    _RELATIONSHIP: (Event.RELATIONSHIP_CREATED, Event.RELATIONSHIP_UPDATED, Event.RELATIONSHIP_DELETED),
    frozenset[str](): (Event.ADMIN_REFUSED, Event.WORKLOAD_REFUSED, Event.CONNECTION_REFUSED),
}

FIELDS: Final[Mapping[Event, frozenset[str]]] = {
    event: names | COMMON for names, events in _FAMILIES.items() for event in events
}
"""The names that may be used with each event."""


@dataclass(frozen=True, slots=True)
class Record:
    """One thing that happened: who did it (``actor``), to what (``subject``), when (aware). Raises Invalid.

    Fields have declared names; lists are kept as tuples. Of a secret or an overlong text only the hash is kept. No two
    records that differ have the same body.
    """

    event: Event
    at: datetime
    actor: str
    subject: str
    fields: Mapping[str, FieldValue]

    def __post_init__(self) -> None:
        event = Event(self.event)
        if self.at.tzinfo is None:
            raise _invalid("its time has no time zone")
        if not self.actor or not self.subject:
            raise _invalid("its actor or subject is empty")
        unknown = self.fields.keys() - FIELDS[event]
        if unknown:
            raise _invalid(f"{event} has no field {min(unknown)}")
        # All texts at once, for most records hold nothing to withhold: a search in each would be a third of the work.
        is_plain = _is_plain([self.actor, self.subject, *(one for one in self.fields.values() if type(one) is str)])
        fields = {
            name: value if value is None or (is_plain and type(value) is str) else _read(value)
            for name, value in self.fields.items()
        }
        object.__setattr__(self, "event", event)
        object.__setattr__(self, "at", self.at.astimezone(UTC))
        if not is_plain:
            object.__setattr__(self, "actor", _shown(self.actor))
            object.__setattr__(self, "subject", _shown(self.subject))
        object.__setattr__(self, "fields", MappingProxyType(fields))

    def body(self) -> bytes:
        """Give the one canonical form (RFC 8785); times in UTC with microseconds."""
        # Every part was judged when the record was made, and all names are ours.
        return strictjson.canonical_of_known(
            {
                "v": VERSION,
                "event": self.event.value,
                "at": self.at.replace(tzinfo=None).isoformat(timespec="microseconds") + "Z",
                "actor": self.actor,
                "subject": self.subject,
                "fields": dict(self.fields),
            }
        )

    @classmethod
    def from_body(cls, body: bytes) -> Self:
        """Read a body; one that :meth:`body` would not write is Invalid."""
        try:
            value = strictjson.loads(body)
        except InvalidJson:
            raise _invalid("its body is not JSON") from None
        if not isinstance(value, dict) or value.keys() != {"v", "event", "at", "actor", "subject", "fields"}:
            raise _invalid("its body does not have exactly its members")
        if value["v"] != VERSION or isinstance(value["v"], bool):
            raise _invalid("its body has a form that is not known")
        fields = value["fields"]
        if not isinstance(fields, dict):
            raise _invalid("its fields are not an object")
        record = cls(
            _event(value["event"]),
            _time(value["at"]),
            _text(value["actor"]),
            _text(value["subject"]),
            {name: _field(item) for name, item in fields.items()},
        )
        if record.body() != body:
            raise _invalid("its body is not in canonical form")
        return record


def _is_plain(texts: list[str]) -> bool:
    """Tell whether nothing in any of the texts can be unfit: what is, has one of these signs in it or is not ASCII."""
    try:
        joined = "\n".join(texts)
    except TypeError:  # one of them is no text: refused where it is read
        return False
    return len(joined) <= MAX_TEXT and joined.isascii() and _TOKEN_SIGN not in joined and _KEY_SIGN not in joined


def _read(value: FieldValue) -> FieldValue:
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return _shown(value)
    if isinstance(value, int):
        if abs(value) > MAX_EXACT:
            raise _invalid("a number is beyond 2^53; write it as text")
        return value
    if not isinstance(value, (list, tuple)):
        raise _invalid(f"a {type(value).__name__} cannot be recorded")
    if len(value) > MAX_ITEMS:
        raise _invalid(f"a list holds more than {MAX_ITEMS} texts")
    return tuple(_shown(item) for item in value)


def _shown(text: object) -> str:
    if not isinstance(text, str):
        raise _invalid("something is not text")
    # NOTE(security): the last line of defence; callers record hashes. Refusing instead would let whoever sends such a
    # text be refused without a record.
    if len(text) <= MAX_TEXT and _UNFIT.search(text) is None:
        return text
    hashed = b64url_encode(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest())
    return f"withheld sha-256:{hashed} ({len(text)} characters)"


def _event(value: JsonValue) -> Event:
    try:
        return Event(_text(value))
    except ValueError:
        raise _invalid("its event is not known") from None


def _time(value: JsonValue) -> datetime:
    text = _text(value)
    if _TIME.fullmatch(text) is None:
        raise _invalid("its time is malformed")
    try:
        return datetime.fromisoformat(text)
    except ValueError:
        raise _invalid("its time is malformed") from None


def _text(value: JsonValue) -> str:
    if not isinstance(value, str):
        raise _invalid("something is not text")
    return value


def _field(value: JsonValue) -> FieldValue:
    if isinstance(value, list):
        return [_text(item) for item in value]
    if isinstance(value, (dict, float)):
        raise _invalid("a field is an object or a fraction")
    return value


def _invalid(what: str) -> Invalid:
    return Invalid(f"the audit record is not valid: {what}", code="invalid_record")
