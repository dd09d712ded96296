"""What the audit log is told of stops, of signals from identity providers, and of standing delegations."""

from datetime import datetime

from broker.audit.events import Event
from broker.audit.records import FieldValue, Record
from broker.server.tasks.records import sha256
from broker.tasks.standing import StandingDelegation
from broker.tasks.stop import Stop, StopKind

_FIELD = {
    StopKind.USER: "user",
    StopKind.SESSIONS: "user",
    StopKind.SESSIONLESS: "user",
    StopKind.SESSION: "user_session",
    StopKind.DELEGATION: "delegation",
    StopKind.AGENT: "agent",
    StopKind.AUDIENCE: "audience",
}


def stopped(stop: Stop, by: str, *, frame_seq: int, tasks_ended: int, at: datetime, reason: str = "") -> Record:
    """Record a stop, or that more of what it ends was written down: what it is of, and how many tasks ended by it."""
    fields: dict[str, FieldValue] = {
        _FIELD[stop.kind]: stop.name,
        "kind": stop.kind.value,
        "source": stop.source,
        "cause": stop.cause.value,
        "disabled": stop.disabled,
        "not_before": int(stop.not_before.timestamp()),
        "frame_seq": frame_seq,
        "tasks_ended": tasks_ended,
    }
    if reason:
        fields["reasons"] = [reason]
    return Record(Event.TASKS_STOPPED, at, by, stop.name, fields)


def user_enabled(stop: Stop, by: str, at: datetime, reason: str = "") -> Record:
    """Record that a source disables a user no longer. Another source still may."""
    fields: dict[str, FieldValue] = {"user": stop.name, "source": stop.source, "disabled": stop.disabled}
    if reason:
        fields["reasons"] = [reason]
    return Record(Event.USER_ENABLED, at, by, stop.name, fields)


def signal_received(issuer: str, kind: str, jti: str, *, user: str, session: str, effect: str, at: datetime) -> Record:
    """Record a signal that was taken in: of which kind, about whom, and what it did."""
    fields: dict[str, FieldValue] = {
        "kind": kind,
        "issuer": issuer,
        "jti_hash": sha256(jti.encode()),
        "user": user or None,
        "user_session": session or None,
        "effect": effect,
    }
    return Record(Event.SIGNAL_RECEIVED, at, issuer, user or session or issuer, fields)


def signal_refused(door: str, code: str, issuer: str, left_out: int, at: datetime) -> Record:
    """Record a signal that was refused; ``issuer`` is a configured one's name, or empty: what it says is nobody's word."""
    fields: dict[str, FieldValue] = {"door": door, "code": code, "issuer": issuer or None, "left_out": left_out}
    return Record(Event.SIGNAL_REFUSED, at, issuer or "anonymous", door, fields)


def delegation_created(delegation: StandingDelegation, at: datetime) -> Record:
    """Record what a user left standing, by a token of which client."""
    fields: dict[str, FieldValue] = {
        "user": delegation.user,
        "issuer": delegation.issuer,
        "client": delegation.client,
        "user_session": delegation.session,
        "subject_hash": delegation.token_hash,
        "agents": [pattern.text for pattern in delegation.agents],
        "authority_hash": delegation.authority.digest,
        "max_task_ttl": delegation.max_task_ttl,
        "max_hops": delegation.max_hops,
        "expires_at": int(delegation.expires_at.timestamp()),
    }
    return Record(Event.DELEGATION_CREATED, at, delegation.user, delegation.id, fields)


def delegation_ended(delegation: StandingDelegation, by: str, at: datetime, reason: str = "") -> Record:
    """Record that a delegation stands no longer, and by whom."""
    fields: dict[str, FieldValue] = {
        "user": delegation.user,
        "issuer": delegation.issuer,
        "cause": None if delegation.cause is None else delegation.cause.value,
    }
    if reason:
        fields["reasons"] = [reason]
    return Record(Event.DELEGATION_ENDED, at, by, delegation.id, fields)


def delegation_refused(user: str, code: str, by: str, at: datetime) -> Record:
    """Record that somebody tried to make, see or end a delegation and may not."""
    return Record(Event.DELEGATION_REFUSED, at, by, user or "-", {"code": code, "user": user or None})
