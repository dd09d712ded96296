"""A grant that a person has to approve: asked for, waited for, used once; inside the transaction of the exchange.

The agent sends the same request again until a person has decided: what is wanted is found by its hash, so that no id of an approval
travels, and none opens anything. A yes is not redeemed but judged anew (AuthZEN Access Request and Approval): the user's word, the
approver's, whether the policy still lets that person decide, and the clock. What is granted on it is for one use and a minute.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Final

from broker.errors import PolicyDenied, Refused
from broker.server.store.ports import Reader, Writer
from broker.server.tasks import approval_records
from broker.server.tasks.admission import Admitted
from broker.server.tasks.decision import ONCE_TTL, Grant
from broker.server.tasks.ids import Ids
from broker.server.tasks.policy.asked import Action
from broker.server.tasks.policy.decision import Decision, Effect
from broker.server.tasks.policy.rules import Rules
from broker.server.tasks.standing import Standing
from broker.tasks import Authority, Delegation, Resource, Task, lineage_epoch
from broker.tasks.approval import (
    MAX_RULES,
    POLL_SECONDS,
    Approval,
    ApprovalPending,
    ApprovalState,
    Wanted,
    lapse,
    require_other,
    use,
)
from broker.tasks.reference import ONCE

WAIT: Final = timedelta(hours=1)
"""How long a person has to decide: what was asked for longer ago is asked for anew, as things are then."""
MAX_OF_TASK: Final = 100
"""Approvals that one task may ask for over its life: people who are asked more often no longer look."""
PREFIX: Final = "apr"


@dataclass(frozen=True, slots=True)
class Permission:
    """What may be granted, by which decision, and on which yes, None where no person had to be asked, or none was yet."""

    grant: Grant
    decision: Decision
    approval: Approval | None = None

    @property
    def approval_id(self) -> str | None:
        """The yes that it stands on, by its id."""
        return None if self.approval is None else self.approval.id

    def used(self, writer: Writer, jti: str, now: datetime) -> None:
        """Use up the yes for the token of this id."""
        if self.approval is not None:
            writer.replace_approval(use(self.approval, jti, now), was=ApprovalState.APPROVED)


@dataclass(frozen=True, slots=True)
class Approving:
    """Asks the policy, and people where it wants them."""

    rules: Rules
    standing: Standing
    ids: Ids

    def judge(self, task: Task, grant: Grant, now: datetime) -> Permission:
        """Ask the policy: it allows what is granted, or would if a person approved it; else raises DeniedByPolicy."""
        decision = self.rules.may_issue(task, grant.audience.resource, grant.authority, now)
        if decision.effect is not Effect.APPROVAL or not self.rules.may_begin(task).is_allowed:
            decision.require()
        return Permission(grant, decision)

    def permit(
        self,
        writer: Writer,
        admitted: Admitted,
        lineage: Sequence[Task],
        asked: Permission,
        now: datetime,
        *,
        issued: str | None = None,
    ) -> Permission | ApprovalPending:
        """Say what may be granted, or that a person has to decide: then what is written stands, and the error is told after the commit.

        ``asked`` is what :meth:`judge` gave; ``issued`` is the token that the same request was given before, under its idempotency key.
        Raises DeniedByPolicy, PolicyDenied (``approval_denied``, ``too_many_approvals``).
        """
        if asked.decision.is_allowed:
            return asked
        if issued is not None:
            return replace(asked, decision=_of_token(writer, issued, asked.decision).require())
        task, wanted = lineage[-1], _wanted(admitted, lineage, asked.grant)
        known = writer.latest_approval(task.id, wanted.digest)
        if known is not None and (answer := self._answer(writer, task, known, asked, now)) is not None:
            return answer
        return self._ask(writer, wanted, task.purpose, asked.decision, now)

    def _answer(
        self, writer: Writer, task: Task, known: Approval, asked: Permission, now: datetime
    ) -> Permission | ApprovalPending | None:
        """Say how the latest request for this stands; None where it is to be asked for anew."""
        match known.state_at(now):
            case ApprovalState.PENDING:
                return _asked_again(writer, known, now)
            case ApprovalState.DENIED | ApprovalState.WITHDRAWN:
                raise PolicyDenied(
                    f"approval {known.id} is {known.state.value}",
                    code="approval_denied",
                    hint="this task is not granted it: go on without, or ask the person",
                )
            case ApprovalState.APPROVED if self._still_counts(writer, task, known, now):
                allowed = replace(asked.decision, effect=Effect.ALLOW)
                return Permission(_once(asked.grant, known), allowed, known)
            case ApprovalState.USED | ApprovalState.EXPIRED if known.state in _CLOSED:
                return None
            case _:
                # Its time is over, or the person's who said yes.
                over = lapse(known, now)
                writer.replace_approval(over, was=known.state)
                writer.record(approval_records.decided(over, now))
                return None

    def _still_counts(self, reader: Reader, task: Task, known: Approval, now: datetime) -> bool:
        """Tell whether a yes of a person still is one: signed in, not disabled, and one whom the policy lets decide."""
        assert known.approver is not None
        try:
            require_other(known, known.approver)
            self.standing.require(reader, known.approver, now)
        except Refused:
            return False
        return may_decide(self.rules, task, known, known.approver, known.decided_at or now).is_allowed

    def _ask(self, writer: Writer, wanted: Wanted, purpose: str, decision: Decision, now: datetime) -> ApprovalPending:
        if writer.count_approvals(wanted.task) >= MAX_OF_TASK:
            raise PolicyDenied(
                f"this task has asked people {MAX_OF_TASK} times",
                code="too_many_approvals",
                hint="start a new task, for less that has to be approved",
            )
        made = Approval(
            id=self.ids.new(PREFIX, now),
            wanted=wanted,
            purpose=purpose,
            rules=decision.rules[:MAX_RULES],
            policy=decision.bundle,
            created_at=now,
            expires_at=now + WAIT,
            asked_at=now,
        )
        writer.add_approval(made)
        writer.record(approval_records.requested(made, now))
        return ApprovalPending(made)


_CLOSED: Final = frozenset({ApprovalState.USED, ApprovalState.EXPIRED})


def judge_token(
    reader: Reader,
    rules: Rules,
    task: Task,
    *,
    resource: Resource,
    authority: Authority,
    jti: str,
    now: datetime,
    action: Action = Action.ISSUE,
) -> Decision:
    """Ask the policy about a token that was issued: what a person approved, and did not take back, is allowed."""
    decision = rules.may_issue(task, resource, authority, now, action)
    if decision.effect is not Effect.APPROVAL or not rules.may_begin(task).is_allowed:
        return decision
    return _of_token(reader, jti, decision)


def may_decide(rules: Rules, task: Task, approval: Approval, approver: Delegation, at: datetime) -> Decision:
    """Ask the policy whether this person may decide an approval; ``at`` is when, which their sign-in is held against."""
    wanted = approval.wanted
    age = None if approver.auth_time is None else max(0, int((at - approver.auth_time).total_seconds()))
    return rules.may_approve(
        task,
        wanted.resource,
        wanted.authority,
        approver=approver.user,
        approver_issuer=approver.issuer,
        acr=approver.acr,
        auth_age=age,
    )


def _of_token(reader: Reader, jti: str, decision: Decision) -> Decision:
    known = reader.approval_of_token(jti)
    is_given = known is not None and known.state is ApprovalState.USED
    return replace(decision, effect=Effect.ALLOW) if is_given else decision


def _wanted(admitted: Admitted, lineage: Sequence[Task], grant: Grant) -> Wanted:
    task, resource = lineage[-1], grant.audience.resource
    return Wanted(
        task=task.id,
        root=task.root,
        agent=task.agent,
        session=admitted.session,
        user=task.user,
        issuer=task.delegation.issuer,
        epoch=lineage_epoch(lineage),
        resource=resource,
        authority=grant.authority.for_resource(resource),
        parameter_digest=grant.parameter_digest,
    )


def _once(grant: Grant, approval: Approval) -> Grant:
    assert approval.approved_until is not None
    not_after = (*grant.not_after, approval.approved_until)
    return replace(grant, use=ONCE, ttl=min(grant.ttl, ONCE_TTL), not_after=not_after)


def _asked_again(writer: Writer, known: Approval, now: datetime) -> ApprovalPending:
    if now < known.asked_at + timedelta(seconds=POLL_SECONDS):
        return ApprovalPending(known, too_soon=True)
    writer.replace_approval(replace(known, asked_at=now), was=ApprovalState.PENDING)
    return ApprovalPending(known)
