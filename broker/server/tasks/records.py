"""What the audit log is told of tasks and tokens: hashes, ids and decisions, never a token and no free text."""

import hashlib
from datetime import datetime
from typing import Final

from broker.audit.events import Event
from broker.audit.records import FieldValue, Record
from broker.server.store.rows import SessionRow, TokenRow
from broker.server.tasks.policy.decision import Decision
from broker.server.tasks.requests import Actor
from broker.spiffe import SpiffeId
from broker.spiffe.jose import b64url_encode
from broker.tasks import Task, TaskClaims
from broker.tasks.binding import bound_by
from broker.tasks.causes import SessionEnd
from broker.tasks.claims import purpose_hash

MAX_NAMED: Final = 32
"""Rules or errors named in one record: of more, the first say enough."""
MAX_ERROR: Final = 500
"""Longest error kept, in characters."""


def sha256(data: bytes) -> str:
    """Give ``sha-256:`` and the hash in base64url."""
    return "sha-256:" + b64url_encode(hashlib.sha256(data).digest())


def decided(decision: Decision) -> dict[str, FieldValue]:
    """Give what a record says of a decision: its effect, the rules by name, the bundle, and what could not be evaluated."""
    fields: dict[str, FieldValue] = {
        "decision": decision.effect.value,
        "rules": list(decision.rules[:MAX_NAMED]),
        "policy": decision.bundle,
    }
    if decision.errors:
        fields["errors"] = [error[:MAX_ERROR] for error in decision.errors[:MAX_NAMED]]
    return fields


def task_started(task: Task, actor: Actor, entry_id: str | None, at: datetime, *, decision: Decision) -> Record:
    """Record that a task began, on whose word, with what authority, and which rules of the policy let it.

    One that was started below another, or took over from one, began by the actor's word for another agent.
    """
    fields = (
        _begun(task)
        | decided(decision)
        | {
            "door": actor.door.value,
            "agent": str(task.agent),
            "node": None if actor.agent is None else str(actor.agent),
            "entry_id": entry_id,
        }
    )
    return Record(Event.TASK_STARTED, at, str(actor.spiffe_id), task.id, fields)


def _begun(task: Task) -> dict[str, FieldValue]:
    delegation = task.delegation
    return {
        "session": task.session,
        "user": task.user,
        "root": task.root,
        "parent": task.parent,
        "depth": task.depth,
        "supersedes": task.supersedes,
        "issuer": delegation.issuer,
        "client": delegation.client,
        "user_session": delegation.session,
        "delegation": delegation.standing,
        "subject_hash": delegation.token_hash,
        "purpose_hash": purpose_hash(task.purpose),
        "authorization_details": task.authority.text(),
        "authority_hash": task.authority.digest,
        "supervision": task.supervision.value,
        "expires_at": int(task.expires_at.timestamp()),
    }


def task_started_for(task: Task, actor: Actor | str, at: datetime, *, decision: Decision) -> Record:
    """Record that a task began for an agent by another's word: a workload's, or an operator's name."""
    if isinstance(actor, Actor):
        return task_started(task, actor, actor.entry_id, at, decision=decision)
    fields = _begun(task) | decided(decision) | {"door": "admin", "agent": str(task.agent)}
    return Record(Event.TASK_STARTED, at, actor, task.id, fields)


def task_attached(task: Task, actor: Actor, at: datetime) -> Record:
    """Record that a process of its agent has taken up a task that another started for it."""
    fields: dict[str, FieldValue] = {
        "door": actor.door.value,
        "agent": str(task.agent),
        "node": None if actor.agent is None else str(actor.agent),
        "session": task.session,
        "user": task.user,
        "root": task.root,
        "parent": task.parent,
        "version": task.version,
    }
    return Record(Event.TASK_ATTACHED, at, str(task.agent), task.id, fields)


def task_suspended(task: Task, by: str, *, frame_seq: int, at: datetime, reason: str) -> Record:
    """Record that a task was stopped for a while: why, by whom, and which frame told of it."""
    fields = _moved(task, reason) | {
        "frame_seq": frame_seq,
        "epoch": task.epoch,
        "supervision": task.supervision.value,
    }
    return Record(Event.TASK_SUSPENDED, at, by, task.id, fields)


def task_resumed(task: Task, by: str, *, resumed_from: str | None, at: datetime, reason: str) -> Record:
    """Record that a task goes on: by whom, in which session, and in which it was before."""
    fields = _moved(task, reason) | {"resumed_from": resumed_from}
    return Record(Event.TASK_RESUMED, at, by, task.id, fields)


def _moved(task: Task, reason: str) -> dict[str, FieldValue]:
    fields: dict[str, FieldValue] = {
        "agent": str(task.agent),
        "session": task.session,
        "user": task.user,
        "root": task.root,
        "parent": task.parent,
        "state": task.state.value,
        "cause": None if task.cause is None else task.cause.value,
        "version": task.version,
    }
    if reason:
        fields["reasons"] = [reason]
    return fields


def token_issued(
    row: TokenRow, claims: TaskClaims, actor: Actor, at: datetime, *, decision: Decision, approval: str | None = None
) -> Record:
    """Record that a token was issued: for whom, bound to what, until when, on which approval. Its hash is of its claims."""
    fields: dict[str, FieldValue] = {
        "door": actor.door.value,
        "agent": str(row.agent),
        "session": row.session,
        "user": claims.sub,
        "root": row.root,
        "txn": claims.txn,
        "jti_hash": sha256(row.jti.encode()),
        "token_hash": row.hash,
        "audience": row.resource,
        "scope": row.scope,
        "x5t": row.x5t,
        "binding": bound_by(claims.cnf).value,
        "jkt": None if claims.cnf is None else claims.cnf.jkt,
        "hop": claims.task.hop,
        "epoch": claims.task.epoch,
        "authority_hash": claims.authorization_details.digest,
        "expires_at": claims.exp,
        **decided(decision),
    }
    if claims.task.use is not None:
        fields |= {"approval": approval, "parameter_digest": claims.task.parameter_digest}
    return Record(Event.TOKEN_ISSUED, at, str(row.agent), row.task_id, fields)


def assertion_issued(
    row: TokenRow,
    kind: str,
    actor: Actor,
    *,
    audience: str,
    user: str,
    txn: str,
    hop: int,
    subject_hash: str | None,
    at: datetime,
    decision: Decision,
) -> Record:
    """Record that a token other than a task token was issued: of which kind, to whom, for whom else than a service."""
    fields: dict[str, FieldValue] = {
        "kind": kind,
        "door": actor.door.value,
        "agent": str(row.agent),
        "session": row.session,
        "user": user,
        "root": row.root,
        "txn": txn,
        "jti_hash": sha256(row.jti.encode()),
        "token_hash": row.hash,
        "subject_hash": subject_hash,
        "audience": audience,
        "resource": row.resource,
        "scope": row.scope,
        "hop": hop,
        "expires_at": int(row.expires_at.timestamp()),
        **decided(decision),
    }
    return Record(Event.TOKEN_ISSUED, at, str(actor.spiffe_id), row.task_id, fields)


def token_revoked(row: TokenRow, by: str, frame_seq: int, at: datetime, reason: str = "") -> Record:
    """Record that one token was revoked, by whom and why, and which frame told of it."""
    fields: dict[str, FieldValue] = {
        "agent": str(row.agent),
        "root": row.root,
        "jti_hash": sha256(row.jti.encode()),
        "frame_seq": frame_seq,
    }
    if reason:
        fields["reasons"] = [reason]
    return Record(Event.TOKEN_REVOKED, at, by, row.task_id, fields)


def task_ended(task: Task, by: str, *, frame_seq: int, tasks_ended: int, at: datetime, reason: str = "") -> Record:
    """Record the end of a task: state and cause, who caused it and why, and how many tasks ended by it."""
    fields = _moved(task, reason) | {"frame_seq": frame_seq, "tasks_ended": tasks_ended}
    return Record(Event.TASK_ENDED, at, by, task.id, fields)


def session_started(row: SessionRow) -> Record:
    """Record that a node agent told of a new workload session."""
    fields: dict[str, FieldValue] = {
        "node": str(row.agent),
        "spiffe_id": str(row.spiffe_id),
        "entry_id": row.entry_id,
        "x5t": row.x5t,
        "not_after": int(row.not_after.timestamp()),
    }
    return Record(Event.SESSION_STARTED, row.started_at, str(row.agent), row.id, fields)


def session_ended(row: SessionRow, cause: SessionEnd, tasks_ended: int, at: datetime, by: str = "") -> Record:
    """Record that a workload session is over, why, how many tasks went with it, and by whom if not by its node agent."""
    fields: dict[str, FieldValue] = {
        "node": str(row.agent),
        "spiffe_id": str(row.spiffe_id),
        "entry_id": row.entry_id,
        "cause": cause.value,
        "tasks_ended": tasks_ended,
    }
    return Record(Event.SESSION_ENDED, at, by or str(row.agent), row.id, fields)


def workload_refused(node: SpiffeId, code: str, uid: int, count: int, at: datetime) -> Record:
    """Record in one row that callers of one local user were refused at a node agent's socket for one reason."""
    fields: dict[str, FieldValue] = {"node": str(node), "door": "agent", "code": code, "left_out": count - 1}
    return Record(Event.WORKLOAD_REFUSED, at, str(node), f"uid:{uid}" if uid >= 0 else "uid:unknown", fields)
