"""The audit log's events: a closed set, each with the names of what may be said about it.

What a record is, and what is withheld from it, is in :mod:`broker.audit.records`.
"""

from collections.abc import Mapping
from enum import StrEnum
from typing import Final


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
    ACTION_CLAIMED = "action_claimed"
    ACTION_SUPPRESSED = "action_suppressed"
    ACTION_SETTLED = "action_settled"
    ACTION_REFUSED = "action_refused"
    TASKS_STOPPED = "tasks_stopped"
    USER_ENABLED = "user_enabled"
    SIGNAL_RECEIVED = "signal_received"
    SIGNAL_REFUSED = "signal_refused"
    DELEGATION_CREATED = "delegation_created"
    DELEGATION_REFUSED = "delegation_refused"
    DELEGATION_ENDED = "delegation_ended"
    APPROVAL_REQUESTED = "approval_requested"
    APPROVAL_GIVEN = "approval_given"
    APPROVAL_DENIED = "approval_denied"
    APPROVAL_WITHDRAWN = "approval_withdrawn"
    APPROVAL_EXPIRED = "approval_expired"
    APPROVAL_REFUSED = "approval_refused"
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
    "approval",  # the one that it was issued on
    "parameter_digest",
}
_ACTION: Final = frozenset(
    {
        "audience",
        "service",  # SPIFFE ID of who does it
        "action",
        "action_id",
        "step_hash",
        "identifier_hash",
        "parameter_digest",
        "state",
        "prior_state",
        "settle_by",
        "outcome_hash",
    }
)
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
_APPROVAL: Final = frozenset(
    {
        "issuer",  # the requester's
        "audience",
        "scope",
        "authority_hash",
        "parameter_digest",
        "state",
        "expires_at",
        "approver",
        "approver_issuer",
        "client",  # the one that the approver decided through
        "user_session",  # the approver's
        "subject_hash",
        "approved_until",
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
    _ACTION: (Event.ACTION_CLAIMED, Event.ACTION_SUPPRESSED, Event.ACTION_SETTLED, Event.ACTION_REFUSED),
    _USER: (
        Event.TASKS_STOPPED,
        Event.USER_ENABLED,
        Event.SIGNAL_RECEIVED,
        Event.SIGNAL_REFUSED,
        Event.DELEGATION_CREATED,
        Event.DELEGATION_REFUSED,
        Event.DELEGATION_ENDED,
    ),
    _APPROVAL: (
        Event.APPROVAL_REQUESTED,
        Event.APPROVAL_GIVEN,
        Event.APPROVAL_DENIED,
        Event.APPROVAL_WITHDRAWN,
        Event.APPROVAL_EXPIRED,
        Event.APPROVAL_REFUSED,
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
