"""What the audit log is told of tasks and tokens: hashes, ids and decisions, never a token and no free text."""

import hashlib
from datetime import datetime

from broker.audit.events import Event, FieldValue, Record
from broker.server.store.rows import SessionRow, TokenRow
from broker.server.tasks.requests import Actor
from broker.spiffe import SpiffeId
from broker.spiffe.jose import b64url_encode
from broker.tasks import Task, TaskClaims
from broker.tasks.binding import bound_by
from broker.tasks.causes import SessionEnd
from broker.tasks.claims import purpose_hash


def sha256(data: bytes) -> str:
    """Give ``sha-256:`` and the hash in base64url."""
    return "sha-256:" + b64url_encode(hashlib.sha256(data).digest())


def task_started(task: Task, actor: Actor, entry_id: str, at: datetime) -> Record:
    """Record that a task began, on whose word and with what authority."""
    delegation = task.delegation
    fields: dict[str, FieldValue] = {
        "door": actor.door.value,
        "agent": str(task.agent),
        "node": None if actor.agent is None else str(actor.agent),
        "entry_id": entry_id,
        "session": task.session,
        "user": task.user,
        "root": task.root,
        "issuer": delegation.issuer,
        "client": delegation.client,
        "user_session": delegation.session,
        "subject_hash": delegation.token_hash,
        "purpose_hash": purpose_hash(task.purpose),
        "authorization_details": task.authority.text(),
        "authority_hash": task.authority.digest,
        "supervision": task.supervision.value,
        "expires_at": int(task.expires_at.timestamp()),
    }
    return Record(Event.TASK_STARTED, at, str(task.agent), task.id, fields)


def token_issued(row: TokenRow, claims: TaskClaims, actor: Actor, at: datetime) -> Record:
    """Record that a token was issued: for whom, bound to what, until when. Its hash is of its claims."""
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
    }
    return Record(Event.TOKEN_ISSUED, at, str(row.agent), row.task_id, fields)


def token_revoked(row: TokenRow, by: str, frame_seq: int, at: datetime) -> Record:
    """Record that one token was revoked, by whom, and which frame told of it."""
    fields: dict[str, FieldValue] = {
        "agent": str(row.agent),
        "root": row.root,
        "jti_hash": sha256(row.jti.encode()),
        "frame_seq": frame_seq,
    }
    return Record(Event.TOKEN_REVOKED, at, by, row.task_id, fields)


def task_ended(task: Task, by: str, *, frame_seq: int, tasks_ended: int, at: datetime, reason: str = "") -> Record:
    """Record the end of a task: state and cause, who caused it and why, and how many tasks ended by it."""
    fields: dict[str, FieldValue] = {
        "agent": str(task.agent),
        "session": task.session,
        "user": task.user,
        "root": task.root,
        "parent": task.parent,
        "state": task.state.value,
        "cause": None if task.cause is None else task.cause.value,
        "version": task.version,
        "frame_seq": frame_seq,
        "tasks_ended": tasks_ended,
    }
    if reason:
        fields["reasons"] = [reason]
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
