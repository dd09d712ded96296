"""Asking the bundle in force: one place for every door and every kind of grant.

Answers are kept under the whole question, so that the same question of the same bundle is evaluated once. That is exact: rules know
no clock, and the one number that moves (the age of a login) is part of the question wherever a rule looks at it. A new bundle brings
an empty memory. Asked from any thread; each answer comes from one bundle, whatever replaces it meanwhile. Who may approve is asked
seldom, and not kept.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Final

from broker.server.tasks.config import Audience, Audiences
from broker.server.tasks.policy.asked import Action, ApprovalAsked, Asked, Question, about, about_approval, age_of_login
from broker.server.tasks.policy.bundle import Bundle, Rule, built_in
from broker.server.tasks.policy.decision import Decision, Effect, all_of
from broker.tasks import Authority, Resource, Task
from broker.telemetry.log import get_logger

DECISIONS_KEPT: Final = 16_384
"""Answers kept: some MiB; then it starts anew. A busy server has as many pairs of user and authority at a time."""

log = get_logger("policy")

_Key = tuple[object, ...]


@dataclass(frozen=True, slots=True)
class _InForce:
    """A bundle with the answers that it gave. ``bundle`` None: what is stored cannot be used here, and everything is denied."""

    hash: str
    bundle: Bundle | None
    trouble: str = ""
    answers: dict[_Key, Decision] = field(default_factory=dict)


class Rules:
    """The policy in force."""

    def __init__(
        self, audiences: Audiences, bundle: Bundle | None = None, count: Callable[[str, str], None] | None = None
    ) -> None:
        """Begin with a bundle, None for the built-in one; ``count`` is told action and effect of each evaluation."""
        self._audiences = audiences
        self._count = count
        bundle = bundle or built_in()
        self._in_force = _InForce(bundle.hash, bundle)

    @property
    def hash(self) -> str:
        """The hash of the bundle in force."""
        return self._in_force.hash

    @property
    def bundle(self) -> Bundle | None:
        """The bundle in force; None where the stored one cannot be used, and everything is denied."""
        return self._in_force.bundle

    def use(self, bundle: Bundle) -> None:
        """Put another bundle in force, at once and whole."""
        self._in_force = _InForce(bundle.hash, bundle)

    def deny_all(self, hash_: str, trouble: str) -> None:
        """Deny everything: the bundle that should be in force cannot be read here (a newer server's, perhaps)."""
        self._in_force = _InForce(hash_, None, trouble)

    def may_begin(self, task: Task, action: Action | None = None) -> Decision:
        """Judge that a task begins, at every audience that its authority concerns; the same for as long as the task lives.

        ``action`` None: the one that its place in the tree says.
        """
        action = action or (Action.START if task.depth == 0 else Action.CHILD)
        return self._remembered(task, action, task.authority, None, age_of_login(task, task.created_at))

    def may_issue(
        self, task: Task, resource: Resource, authority: Authority, now: datetime, action: Action = Action.ISSUE
    ) -> Decision:
        """Judge that a token of a task is issued with this authority, and that the task could still begin."""
        begun = self.may_begin(task)
        if not begun.is_allowed:
            return begun
        return self._remembered(task, action, authority, resource, age_of_login(task, now))

    def may_approve(
        self,
        task: Task,
        resource: Resource | None,
        authority: Authority,
        *,
        approver: str,
        approver_issuer: str,
        acr: str | None,
        auth_age: int | None,
    ) -> Decision:
        """Judge that a person approves what a task wants, at every audience concerned, or at ``resource`` alone.

        ``acr`` and ``auth_age`` (whole seconds) are of the approver's sign-in. Allowed or denied, never a third: only rules that
        name approving permit it. That nobody approves for himself is for the caller to see to. Raises Invalid.
        """
        in_force = self._in_force
        asked = self.to_approve(
            task, resource, authority, approver=approver, approver_issuer=approver_issuer, acr=acr, auth_age=auth_age
        )
        return all_of((self._judge(in_force, one) for one in asked), bundle=in_force.hash)

    def judge(self, asked: Question) -> Decision:
        """Answer one question, by the code that decides."""
        return self._judge(self._in_force, asked)

    def trace(self, asked: Question) -> Iterable[tuple[Rule, str]]:
        """Say of each rule how it stands to a question: ``applies``, ``does not apply`` or ``error``."""
        bundle = self._in_force.bundle
        if bundle is not None:
            for number, rule in enumerate(bundle.rules):
                yield rule, _standing(bundle, number, asked)

    def to_begin(self, task: Task) -> list[Asked]:
        """Give the questions that :meth:`may_begin` asks about a task, for whoever explains them."""
        action = Action.START if task.depth == 0 else Action.CHILD
        return self._questions(task, action, task.authority, None, age_of_login(task, task.created_at))

    def to_issue(self, task: Task, resource: Resource, authority: Authority, now: datetime) -> list[Asked]:
        """Give the questions that :meth:`may_issue` asks besides, for whoever explains them."""
        return self._questions(task, Action.ISSUE, authority, resource, age_of_login(task, now))

    def to_approve(
        self,
        task: Task,
        resource: Resource | None,
        authority: Authority,
        *,
        approver: str,
        approver_issuer: str,
        acr: str | None,
        auth_age: int | None,
    ) -> list[ApprovalAsked]:
        """Give the questions that :meth:`may_approve` asks, for whoever explains them; raises Invalid."""
        return [
            about_approval(
                task, audience, names, approver=approver, approver_issuer=approver_issuer, acr=acr, auth_age=auth_age
            )
            for audience, names in self._concerned(authority, resource)
        ]

    def _remembered(
        self, task: Task, action: Action, authority: Authority, resource: Resource | None, age: int | None
    ) -> Decision:
        in_force = self._in_force
        bundle = in_force.bundle
        if bundle is None:
            return self._judge(in_force, None)
        if age is not None and "auth_age" not in bundle.reads[action]:
            age = None
        delegation = task.delegation
        key = (
            action, task.agent, task.user, delegation.issuer, delegation.acr, age, task.depth, task.supervision,
            authority.text(), resource,
        )  # fmt: skip
        decision = in_force.answers.get(key)
        if decision is None:
            asked = self._questions(task, action, authority, resource, age)
            decision = all_of((self._judge(in_force, one) for one in asked), bundle=in_force.hash)
            if len(in_force.answers) >= DECISIONS_KEPT:
                in_force.answers.clear()
            in_force.answers[key] = decision
        return decision

    def _questions(
        self, task: Task, action: Action, authority: Authority, resource: Resource | None, age: int | None
    ) -> list[Asked]:
        concerned = self._concerned(authority, resource)
        return [about(task, audience, action, names, age) for audience, names in concerned]

    def _concerned(
        self, authority: Authority, resource: Resource | None
    ) -> Iterable[tuple[Audience, list[tuple[str, bool]]]]:
        """Give the registered audiences that an authority concerns, each with its action names and whether each names one thing."""
        found: dict[Resource, tuple[Audience, list[tuple[str, bool]]]] = {}
        for detail in authority.details if resource is None else authority.for_resource(resource).details:
            for location in detail.locations if resource is None else (resource,):
                audience = self._audiences.holding(location)
                if audience is not None:
                    _, names = found.setdefault(audience.resource, (audience, []))
                    names += ((name, detail.identifier is not None) for name in detail.actions)
        return found.values()

    def _judge(self, in_force: _InForce, asked: Question | None) -> Decision:
        bundle = in_force.bundle
        if bundle is None or asked is None:
            return Decision(Effect.DENY, in_force.hash, errors=(in_force.trouble or "there is nothing to judge",))
        judging = bundle.judging(asked.action)
        decision = Decision(Effect.DENY, bundle.hash) if judging is None else _decide(judging, asked)
        if decision.errors:
            # An alarm: such an error means that the schema and the questions do not fit each other.
            log.error("policy_error", policy=bundle.hash, action=asked.action.value, errors=list(decision.errors[:3]))
        if self._count is not None:
            self._count(asked.action.value, "error" if decision.errors else decision.effect.value)
        return decision


def _decide(bundle: Bundle, asked: Question) -> Decision:
    verdict = bundle.engine.ask(asked, bundle.reads[asked.action])
    rules = [bundle.rules[number] for number in verdict.rules]
    decision = Decision(
        Effect.ALLOW if verdict.allows else Effect.DENY,
        bundle.hash,
        tuple(rule.name for rule in rules),
        () if verdict.allows else tuple(rule.advice for rule in rules if rule.advice),
        verdict.errors,
    )
    if verdict.allows or verdict.errors or bundle.lifted is None or not rules or not all(r.by_approval for r in rules):
        return decision
    # Only what approval lifts stands against it: whether anything permits it is asked without those rules.
    without = _decide(bundle.lifted, asked)
    return Decision(Effect.APPROVAL, bundle.hash, decision.rules, decision.advice) if without.is_allowed else without


def _standing(bundle: Bundle, number: int, asked: Question) -> str:
    if asked.action not in bundle.rules[number].actions:
        return "does not apply"
    verdict = bundle.parsed.only([number]).ask(asked, bundle.reads[asked.action])
    if verdict.errors:
        return "error"
    return "applies" if verdict.rules else "does not apply"
