"""A policy that changed reaches what is running: tasks that it would not let begin end, tokens that it would not issue are revoked.

Each server looks after it has taken in the new policy, so that whatever it decided by the old one is committed and found: decisions
are made inside the writer's acts, and the first act queued afterwards comes behind all of those. Refusing needs none of this: every
exchange and every introspection asks the policy in force. In batches, so that others do not wait; a bundle that cannot be read here
denies and ends nothing.
"""

import asyncio
from collections.abc import Callable, Sequence
from typing import Final

from broker.clock import Clock
from broker.errors import BrokerError
from broker.server.store.ports import Store, Writer, making_nothing_due
from broker.server.store.rows import TaskFilter
from broker.server.tasks.approved import judge_token
from broker.server.tasks.lifecycle import end, revoke_token
from broker.server.tasks.policy.decision import Decision
from broker.server.tasks.policy.rules import Rules
from broker.tasks import Cause, Resource, State, Task
from broker.telemetry.log import get_logger

BATCH: Final = 100
"""Tasks of one transaction: some milliseconds."""
TOKENS_EACH: Final = 200
"""Tokens of one task that are judged in one transaction; the rest come in the next."""
RETRY_SECONDS: Final = 1.0
"""Before a look that the store did not let finish is begun again."""
BY: Final = "server"

log = get_logger("policy")


class Rejudge:
    """Judges what is running, again and again as policies come."""

    def __init__(self, store: Store, rules: Rules, clock: Clock, count: Callable[[str], None] | None = None) -> None:
        """``count`` is told the cause of each end."""
        self._store = store
        self._rules = rules
        self._clock = clock
        self._count = count
        self._changed = asyncio.Event()
        # At the start, too: the last server may have stopped before it was done, and settings may have raised a risk.
        self._changed.set()

    def soon(self) -> None:
        """Ask for a look: another policy is in force."""
        self._changed.set()

    async def run(self) -> None:
        """Look whenever asked, until cancelled."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            try:
                tasks, tokens = await self.look()
            except BrokerError as error:
                log.warning("policy_not_applied", code=error.reason, error=error.message)
                self._changed.set()
                await asyncio.sleep(RETRY_SECONDS)
            else:
                # That a policy is in force was said before.
                if tasks or tokens:
                    log.info("policy_applied", policy=self._rules.hash, tasks_ended=tasks, tokens_revoked=tokens)

    async def look(self) -> tuple[int, int]:
        """Judge every living task and token once; give how many tasks ended and how many tokens were revoked; raises Unavailable."""
        if self._rules.bundle is None:
            return 0, 0
        # An empty act: behind it, nothing that the old policy decided is still to be committed.
        await self._store.write(making_nothing_due(_nothing))
        after: str | None = None
        ended = revoked = 0
        while True:
            place = after
            page = await self._store.read(
                lambda reader: reader.list_tasks(TaskFilter(live=True), after=place, limit=BATCH)  # noqa: B023 - read at once
            )
            work = [(task.id, "") for task in page.tasks]
            while work:
                batch = work
                tasks, tokens, work = await self._store.write(lambda writer: self._batch(writer, batch))  # noqa: B023
                ended, revoked = ended + tasks, revoked + tokens
            if page.next is None:
                return ended, revoked
            after = page.next

    def _batch(self, writer: Writer, work: Sequence[tuple[str, str]]) -> tuple[int, int, list[tuple[str, str]]]:
        """Judge tasks, each with its tokens after a jti; give also what is left of them."""
        ended = revoked = 0
        left: list[tuple[str, str]] = []
        for task_id, after in work:
            task = writer.task(task_id)
            if task is None or task.state.is_terminal:
                continue
            decision = self._rules.may_begin(task)
            if not decision.is_allowed:
                ended += self._end(writer, task, decision)
                continue
            count, last = self._tokens(writer, task, after)
            revoked += count
            if last:
                left.append((task_id, last))
        return ended, revoked, left

    def _end(self, writer: Writer, task: Task, decision: Decision) -> int:
        over = end(
            writer,
            task,
            State.REVOKED,
            Cause.POLICY_DENIED,
            by=BY,
            now=self._clock.now(),
            reason=why(decision),
        )
        if self._count is not None and over.frame_seq and over.task.cause is not None:
            self._count(over.task.cause.value)
        return 1 if over.frame_seq else 0

    def _tokens(self, writer: Writer, task: Task, after: str) -> tuple[int, str]:
        """Revoke what would not be issued now; give how many, and the last jti where there may be more."""
        now = self._clock.now()
        rows = writer.living_tokens(task.id, now, after=after, limit=TOKENS_EACH)
        revoked = 0
        for row in rows:
            resource = Resource(row.resource)
            try:
                # The row keeps the scope: where the token was narrower than that, it is refused rather than left.
                authority = task.authority.for_resource(resource).for_scope(row.scope)
                decision = judge_token(
                    writer, self._rules, task, resource=resource, authority=authority, jti=row.jti, now=now
                )
            except BrokerError:
                continue  # not a matter of the policy: the task's own authority does not reach there any more
            if not decision.is_allowed:
                revoked += 1 if revoke_token(writer, row, by=BY, now=now, reason=why(decision)) else 0
        return revoked, rows[-1].jti if len(rows) == TOKENS_EACH else ""


def _nothing(writer: Writer) -> None:
    """Do nothing, in its turn."""


def why(decision: Decision) -> str:
    """Say in a word of the record which rule ended something."""
    return f"policy:{','.join(decision.rules) or 'not_permitted'}"[:256]
