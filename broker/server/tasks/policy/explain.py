"""Why, or why not: what the policy in force says about a question, a task or a token, by the very code that decides."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from broker.clock import Clock
from broker.server.store.ports import Reader, Store
from broker.server.tasks.approved import judge_token
from broker.server.tasks.decision import task_unknown
from broker.server.tasks.policy.asked import Question
from broker.server.tasks.policy.bundle import Rule
from broker.server.tasks.policy.decision import Decision
from broker.server.tasks.policy.rules import Rules
from broker.tasks import Task, TaskClaims
from broker.tasks.task import effective_state


@dataclass(frozen=True, slots=True)
class Part:
    """One question with its answer, and how each rule stands to it: ``applies``, ``does not apply`` or ``error``."""

    asked: Question
    decision: Decision
    trace: Sequence[tuple[Rule, str]]


@dataclass(frozen=True, slots=True)
class Explanation:
    """The whole answer, and the questions that it came from. ``task`` and its state, where it is about one."""

    decision: Decision
    parts: Sequence[Part]
    task: str = ""
    state: str = ""


class Verifier(Protocol):
    """Reads our own tokens back."""

    def verify(self, token: str) -> TaskClaims:
        """Check form, signature and issuer; raises InvalidToken."""
        ...


class Explain:
    """Explains decisions. Decides nothing."""

    def __init__(self, store: Store, rules: Rules, clock: Clock, tokens: Verifier) -> None:
        self._store = store
        self._rules = rules
        self._clock = clock
        self._tokens = tokens

    def question(self, asked: Question) -> Explanation:
        """Explain one question."""
        part = self._part(asked)
        return Explanation(part.decision, (part,))

    async def task(self, task_id: str) -> Explanation:
        """Explain whether a task could begin now; raises NotFound."""
        task = await self._store.read(lambda reader: _task(reader, task_id))
        return self._about(task, self._rules.may_begin(task), self._rules.to_begin(task))

    async def token(self, token: str) -> Explanation:
        """Explain whether a token that this server issued would be issued now; raises InvalidToken, NotFound."""
        claims = self._tokens.verify(token)
        now, authority = self._clock.now(), claims.authorization_details

        def judged(reader: Reader) -> tuple[Task, Decision]:
            task = _task(reader, claims.task.id)
            resource, jti = claims.aud, claims.jti
            return task, judge_token(
                reader, self._rules, task, resource=resource, authority=authority, jti=jti, now=now
            )

        task, decision = await self._store.read(judged)
        asked = [*self._rules.to_begin(task), *self._rules.to_issue(task, claims.aud, authority, now)]
        return self._about(task, decision, asked)

    def _about(self, task: Task, decision: Decision, asked: Sequence[Question]) -> Explanation:
        state = effective_state(task, self._clock.now()).value
        return Explanation(decision, [self._part(one) for one in asked], task.id, state)

    def _part(self, asked: Question) -> Part:
        return Part(asked, self._rules.judge(asked), tuple(self._rules.trace(asked)))


def _task(reader: Reader, task_id: str) -> Task:
    task = reader.task(task_id)
    if task is None:
        raise task_unknown()
    return task
