"""The audit records of approvals: who wanted what, who decided, and who was refused. Names and hashes, never what a person wrote freely."""

from datetime import datetime

from broker.audit.events import Event
from broker.audit.records import FieldValue, Record
from broker.server.tasks.records import sha256
from broker.tasks.approval import SERVER, Approval, ApprovalState

_EVENTS = {
    ApprovalState.APPROVED: Event.APPROVAL_GIVEN,
    ApprovalState.DENIED: Event.APPROVAL_DENIED,
    ApprovalState.WITHDRAWN: Event.APPROVAL_WITHDRAWN,
    ApprovalState.EXPIRED: Event.APPROVAL_EXPIRED,
}


def requested(approval: Approval, at: datetime) -> Record:
    """Record that an agent wants what a person has to approve."""
    return Record(Event.APPROVAL_REQUESTED, at, str(approval.wanted.agent), approval.id, _fields(approval))


def decided(approval: Approval, at: datetime) -> Record:
    """Record what became of one: a yes, a no, taken back, or over in time."""
    fields = _fields(approval)
    approver = approval.approver
    if approver is not None and approval.approved_until is not None:
        fields |= {
            "approver": approver.user,
            "approver_issuer": approver.issuer,
            "client": approver.client,
            "user_session": approver.session,
            "subject_hash": approver.token_hash,
            "approved_until": int(approval.approved_until.timestamp()),
        }
    if approval.jti is not None:
        fields["jti_hash"] = sha256(approval.jti.encode())
    by = SERVER if approval.state is ApprovalState.EXPIRED else approval.decided_by
    return Record(_EVENTS[approval.state], at, by, approval.id, fields)


def refused(user: str, code: str, by: str, at: datetime) -> Record:
    """Record that somebody tried to see or decide an approval and may not."""
    return Record(Event.APPROVAL_REFUSED, at, by, user or "-", {"code": code, "user": user or None})


def _fields(approval: Approval) -> dict[str, FieldValue]:
    wanted = approval.wanted
    fields: dict[str, FieldValue] = {
        "task": wanted.task,
        "root": wanted.root,
        "agent": str(wanted.agent),
        "session": wanted.session,
        "user": wanted.user,
        "issuer": wanted.issuer,
        "audience": wanted.resource.text,
        "scope": wanted.authority.scope(),
        "authority_hash": wanted.authority.digest,
        "parameter_digest": wanted.parameter_digest,
        "state": approval.state.value,
        "rules": [*approval.rules],
        "policy": approval.policy,
        "expires_at": int(approval.expires_at.timestamp()),
    }
    if approval.reason:
        fields["reasons"] = [approval.reason]
    return fields
