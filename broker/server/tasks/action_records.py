"""What the audit log is told of actions that are done once: who does what for whom, by hashes; never a token, never an outcome."""

from datetime import datetime

from broker.audit.events import Event
from broker.audit.records import FieldValue, Record
from broker.server.tasks.records import sha256
from broker.server.tasks.requests import Actor
from broker.tasks import Task, TaskClaims
from broker.tasks.action import ActionRecord, ActionState, Intent


def action_claimed(record: ActionRecord, task: Task, actor: Actor, at: datetime) -> Record:
    """Record that a service is about to do something once."""
    fields = _done_by(record, task, actor) | {"settle_by": int(record.settle_by.timestamp())}
    return Record(Event.ACTION_CLAIMED, at, str(actor.spiffe_id), record.task, fields)


def action_suppressed(record: ActionRecord, claims: TaskClaims, task: Task, actor: Actor, at: datetime) -> Record:
    """Record that something was not done again, and which token was shown for it this time."""
    fields = _done_by(record, task, actor) | {"jti_hash": sha256(claims.jti.encode()), "txn": claims.txn}
    return Record(Event.ACTION_SUPPRESSED, at, str(actor.spiffe_id), record.task, fields)


def action_settled(record: ActionRecord, prior: ActionState, task: Task, actor: Actor, at: datetime) -> Record:
    """Record what became of an action, and whether it was in doubt before (``prior``)."""
    fields = _done_by(record, task, actor) | {"prior_state": prior.value}
    return Record(Event.ACTION_SETTLED, at, str(actor.spiffe_id), record.task, fields)


def asked_for(claims: TaskClaims, actor: Actor, intent: Intent | None = None) -> dict[str, FieldValue]:
    """Give what the record of a refused claim says besides its reason."""
    fields: dict[str, FieldValue] = {
        "user": claims.sub,
        "agent": str(claims.client_id),
        "root": claims.task.root,
        "txn": claims.txn,
        "jti_hash": sha256(claims.jti.encode()),
        "service": str(actor.spiffe_id),
        "audience": claims.aud.text,
    }
    return fields if intent is None else fields | _of_intent(intent)


def _done_by(record: ActionRecord, task: Task, actor: Actor) -> dict[str, FieldValue]:
    return {
        "door": actor.door.value,
        "node": None if actor.agent is None else str(actor.agent),
        "session": actor.session,
        "user": task.user,
        "agent": str(task.agent),
        "root": record.root,
        "jti_hash": sha256(record.jti.encode()),
        "service": str(record.service),
        "audience": record.intent.audience.text,
        "action_id": record.id,
        "state": record.state.value,
        "outcome_hash": None if record.outcome is None else sha256(record.outcome.encode()),
        **_of_intent(record.intent),
    }


def _of_intent(intent: Intent) -> dict[str, FieldValue]:
    return {
        "action": intent.action,
        "step_hash": sha256(intent.step.encode()),
        "identifier_hash": None if intent.identifier is None else sha256(intent.identifier.encode()),
        "parameter_digest": intent.parameter_digest,
    }
