"""An approval: one person's yes to one thing that an agent wants to do, once.

Responsible for what it is bound to and for how it moves: asked for, decided by somebody else than who asks, used once, over. It is
bound by a hash to task, agent, process, service, authority and parameters, so that a yes to 100 is none to 1,000, and found by that
hash alone: its id opens nothing. Stores nothing and tells nobody.

Invariants: only ``approved`` within its time permits anything. Nothing leaves ``denied``, ``withdrawn`` and ``expired``. The clock is asked before the
stored state.
"""

import hashlib
from dataclasses import dataclass, replace
from datetime import datetime
from enum import StrEnum
from typing import Final, Self

from broker.errors import Conflict, Invalid, PolicyDenied, Refused
from broker.spiffe import SpiffeId, strictjson
from broker.spiffe.jose import b64url_encode
from broker.spiffe.strictjson import JsonValue
from broker.tasks.authority import Authority
from broker.tasks.delegation import Delegation
from broker.tasks.resource import Resource
from broker.tasks.texts import check_digest, check_id, check_issuer, check_name, check_purpose

SERVER: Final = "server"
"""Who decided where nobody did."""
MAX_RULES: Final = 64
"""Most rules of one approval that are kept by name: more tell a person nothing."""


POLL_SECONDS: Final = 5
"""How long who waits leaves between two questions: what CIBA Core §7.3 takes where nothing is said."""


class ApprovalPending(PolicyDenied):
    """Nothing is granted yet: a person has to decide, and the same request asked again is told how it stands.

    ``code`` is ``approval_pending``, or ``slow_down`` for who asks more often than every ``POLL_SECONDS`` (CIBA Core §11).
    """

    code = "approval_pending"

    def __init__(self, approval: "Approval", *, too_soon: bool = False) -> None:
        """Carry what is waited for."""
        super().__init__(
            f"approval {approval.id} waits for a person's decision",
            code="slow_down" if too_soon else None,
            hint=f"send the same request again, not more often than every {POLL_SECONDS} seconds",
        )
        self.approval_id = approval.id
        self.expires_at = approval.expires_at


class ApprovalState(StrEnum):
    """Where an approval stands. The value is stable."""

    PENDING = "pending"
    """A person has to decide."""
    APPROVED = "approved"
    DENIED = "denied"
    USED = "used"
    """The one token that it permits was issued."""
    WITHDRAWN = "withdrawn"
    """It was taken back; a token of it that still lived was revoked."""
    EXPIRED = "expired"
    """Nobody decided in time, or nobody used it in time. Only the clock leads here; it is written down when it is asked for anew."""


class Verdict(StrEnum):
    """What a person says."""

    APPROVE = "approve"
    DENY = "deny"


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """What is to be approved: a token for ``authority`` at ``resource``, for one process of one task; raises Invalid.

    ``user`` and ``issuer`` are whom the agent acts for. ``session`` is None where no node agent told of the process. ``epoch`` is the
    tree's at the time: what was asked for before a pause is asked for anew. ``parameter_digest`` is the hash of the one call that it
    is for, where the agent told it.
    """

    task: str
    root: str
    agent: SpiffeId
    session: str | None
    user: str
    issuer: str
    epoch: int
    resource: Resource
    authority: Authority
    parameter_digest: str | None = None

    def __post_init__(self) -> None:
        check_id(self.task, "task id")
        check_id(self.root, "root task id")
        check_name(self.user, "user")
        check_issuer(self.issuer, "issuer")
        if self.parameter_digest is not None:
            check_digest(self.parameter_digest, "parameter digest")

    @property
    def digest(self) -> str:
        """The hash that the approval is found by: another amount, recipient, service or process is another one."""
        return "sha-256:" + b64url_encode(hashlib.sha256(strictjson.canonical(self.to_json())).digest())

    def to_json(self) -> dict[str, JsonValue]:
        """Give all members, for the store and for the hash."""
        return {
            "task": self.task,
            "root": self.root,
            "agent": str(self.agent),
            "session": self.session,
            "user": self.user,
            "issuer": self.issuer,
            "epoch": self.epoch,
            "resource": self.resource.text,
            "authority": self.authority.to_json(),
            "parameter_digest": self.parameter_digest,
        }

    @classmethod
    def parse(cls, value: JsonValue) -> Self:
        """Read what :meth:`to_json` wrote; raises Invalid."""
        if not isinstance(value, dict) or value.keys() != _MEMBERS:
            raise _invalid("what is wanted does not have exactly its members")
        epoch = value["epoch"]
        if not isinstance(epoch, int) or isinstance(epoch, bool):
            raise _invalid("its epoch is not a whole number")
        session, digest = value["session"], value["parameter_digest"]
        return cls(
            task=_text(value["task"]),
            root=_text(value["root"]),
            agent=SpiffeId(_text(value["agent"])),
            session=None if session is None else _text(session),
            user=_text(value["user"]),
            issuer=_text(value["issuer"]),
            epoch=epoch,
            resource=Resource(_text(value["resource"])),
            authority=Authority.parse(value["authority"]),
            parameter_digest=None if digest is None else _text(digest),
        )


_MEMBERS: Final = frozenset(
    {"task", "root", "agent", "session", "user", "issuer", "epoch", "resource", "authority", "parameter_digest"}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Approval:
    """One request for a person's yes, and what became of it; raises Invalid. Times are aware.

    ``expires_at``: until when it may be decided. ``approved_until``: until when the yes may be used. ``rules`` are those of the policy
    ``policy`` (a hash) that want a person. ``approver`` is the verified word of the person who decided, None where an operator did or
    nobody has. ``decided_by`` says who in a word, ``reason`` why in a sentence. ``jti`` is the token that was issued on it.
    """

    id: str
    wanted: Wanted
    purpose: str
    rules: tuple[str, ...]
    policy: str
    created_at: datetime
    expires_at: datetime
    asked_at: datetime
    """When the agent asked last: who asks too often is told to slow down."""
    state: ApprovalState = ApprovalState.PENDING
    decided_at: datetime | None = None
    decided_by: str = ""
    approver: Delegation | None = None
    reason: str = ""
    approved_until: datetime | None = None
    used_at: datetime | None = None
    jti: str | None = None

    def __post_init__(self) -> None:
        check_id(self.id, "approval's id")
        check_purpose(self.purpose)
        check_digest(self.policy, "policy's hash")
        if self.reason:
            check_purpose(self.reason)
        if len(self.rules) > MAX_RULES:
            raise _invalid("it has too many rules")
        times = (self.created_at, self.expires_at, self.asked_at, self.decided_at, self.approved_until, self.used_at)
        if any(time is not None and time.tzinfo is None for time in times):
            raise _invalid("one of its times has no time zone")
        if self.expires_at <= self.created_at:
            raise _invalid("it ends before it starts")
        is_decided = self.state is not ApprovalState.PENDING
        if is_decided != (self.decided_at is not None) or is_decided != bool(self.decided_by):
            raise _invalid("its state and who decided do not fit each other")
        was_approved = self.approved_until is not None
        if was_approved != (self.approver is not None) or (self.jti is None) != (self.used_at is None):
            raise _invalid("its approver and times do not fit each other")
        if self.state in (ApprovalState.APPROVED, ApprovalState.USED) and not was_approved:
            raise _invalid("nobody approved it")
        if self.state is ApprovalState.USED and self.jti is None:
            raise _invalid("it was used for no token")

    def state_at(self, now: datetime) -> ApprovalState:
        """Give the state that counts: what was not decided, or not used, in time is over."""
        end = {ApprovalState.PENDING: self.expires_at, ApprovalState.APPROVED: self.approved_until}.get(self.state)
        return ApprovalState.EXPIRED if end is not None and now >= end else self.state


def require_other(approval: Approval, approver: Delegation) -> None:
    """Refuse who would approve what an agent wants to do for them; raises PolicyDenied (``approver_is_requester``)."""
    wanted = approval.wanted
    if (approver.issuer, approver.user) == (wanted.issuer, wanted.user) or approver.user == wanted.user:
        raise PolicyDenied(
            "nobody approves what is done for them",
            code="approver_is_requester",
            hint="another person decides: the policy names who may",
        )


def decide(
    approval: Approval,
    verdict: Verdict,
    *,
    by: str,
    now: datetime,
    approver: Delegation | None = None,
    until: datetime | None = None,
    reason: str = "",
) -> Approval:
    """Decide a pending one; the same approval when the same verdict was given before.

    ``by`` names who decides; a yes has its ``approver`` and ``until``. Raises Conflict (``approval_decided``), Refused
    (``approval_expired``), PolicyDenied (``approver_is_requester``).
    """
    if approver is not None and verdict is Verdict.APPROVE:
        require_other(approval, approver)
    state = approval.state_at(now)
    if state is _AFTER[verdict] and approval.decided_by == by:
        return approval
    if state is ApprovalState.EXPIRED:
        raise Refused("nobody decided in time", code="approval_expired", hint="the agent asks again")
    if state is not ApprovalState.PENDING:
        raise Conflict(f"the approval is {state.value} already", code="approval_decided")
    moment = max(now, approval.created_at)
    if verdict is Verdict.DENY:
        return replace(approval, state=ApprovalState.DENIED, decided_at=moment, decided_by=by, reason=reason)
    if approver is None or until is None or until <= now:
        raise _invalid("a yes has a person, and a time to be used in")
    return replace(
        approval,
        state=ApprovalState.APPROVED,
        decided_at=moment,
        decided_by=by,
        approver=approver,
        reason=reason,
        approved_until=until,
    )


_AFTER: Final = {Verdict.APPROVE: ApprovalState.APPROVED, Verdict.DENY: ApprovalState.DENIED}


def withdraw(approval: Approval, *, by: str, now: datetime, reason: str = "") -> Approval:
    """Take back a yes, used or not; the same approval when it was taken back before. Raises Conflict (``approval_not_given``)."""
    if approval.state is ApprovalState.WITHDRAWN:
        return approval
    if approval.state not in (ApprovalState.APPROVED, ApprovalState.USED):
        raise Conflict(
            f"the approval is {approval.state_at(now).value}: there is nothing to take back", code="approval_not_given"
        )
    return replace(
        approval, state=ApprovalState.WITHDRAWN, decided_by=by, reason=reason, decided_at=max(now, approval.created_at)
    )


def use(approval: Approval, jti: str, now: datetime) -> Approval:
    """Use a yes for the one token that it permits; raises Refused where it permits none."""
    state = approval.state_at(now)
    if state is not ApprovalState.APPROVED:
        raise Refused(f"the approval is {state.value}", code="approval_not_given")
    return replace(approval, state=ApprovalState.USED, used_at=now, jti=jti)


def lapse(approval: Approval, now: datetime) -> Approval:
    """Write down that the time of one is over; the caller has seen that it is."""
    return replace(
        approval,
        state=ApprovalState.EXPIRED,
        decided_at=approval.decided_at or max(now, approval.created_at),
        decided_by=approval.decided_by or SERVER,
    )


def _text(value: JsonValue) -> str:
    if not isinstance(value, str):
        raise _invalid("a member is not text")
    return value


def _invalid(what: str) -> Invalid:
    return Invalid(f"the approval cannot be: {what}", code="invalid_approval")
