"""What becomes of tasks whose user's session is not confirmed in time, where its issuer tells of no sign-out.

Invariants: that a session does not count any more is judged by rows and the moment, wherever it is about to be used
(:mod:`broker.server.tasks.standing`); what is done here makes it known to verifiers, too. The tasks are suspended, each with
its record and its frames, and their tokens of before stay dead. A newer token of the same session lets them go on: the one that it
was shown for at once, the others within a second. Not what the policy would not let go on now, nor what hung on a process that is
gone: its agent's next one takes that up itself. A task below another one stands still with the one above it.
"""

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any, Final, TypeAlias

from broker.clock import Clock
from broker.errors import BrokerError
from broker.server.store.ports import Reader, Store, Writer, making_nothing_due
from broker.server.store.rows import TaskFilter, TaskPage
from broker.server.store.user_rows import LivingTasks, UserLease, UserSession
from broker.server.tasks.policy.asked import Action
from broker.server.tasks.policy.rules import Rules
from broker.server.tasks.standing import Standing
from broker.server.tasks.suspension import resume, suspend
from broker.tasks import Cause, State, Task, effective_state
from broker.telemetry.log import get_logger

CHECK_EVERY: Final = 1.0
"""Seconds between two looks: one query over an index for each issuer with a lease."""
SESSIONS_AT_ONCE: Final = 50
"""Sessions that are worked on side by side: their acts share commits."""
TASKS_AT_ONCE: Final = 200
"""Tasks of one transaction, so that others do not wait."""
LOOKED_AT: Final = 500
"""Tasks of one page when a server starts."""
SERVER: Final = "server"
_NEVER: Final = datetime.fromtimestamp(0, UTC)

log = get_logger("user_leases")


@dataclass(frozen=True, slots=True)
class Looked:
    """What a look came to: how many tasks were suspended, and how many go on."""

    suspended: int
    resumed: int


@dataclass(frozen=True, slots=True)
class _Step:
    count: int
    after: str | None


_Act: TypeAlias = Callable[[Writer, UserSession, str | None], _Step]


class UserLeases:
    """Looks for sessions that lapsed, and for those that were heard of again."""

    def __init__(self, store: Store, clock: Clock, standing: Standing, rules: Rules) -> None:
        self._store = store
        self._clock = clock
        self._standing = standing
        self._rules = rules

    def loops(self) -> Iterable[Coroutine[Any, Any, None]]:
        """Give what has to run for as long as the server does: nothing where no issuer has a lease."""
        return (self.run(),) if self._standing.leases else ()

    async def run(self) -> None:
        """Look again and again, until cancelled."""
        settled = False
        while True:
            try:
                if not settled:
                    await self.settle()
                    settled = True
                found = await self.look()
            except BrokerError as error:
                log.warning("user_sessions_not_judged", code=error.reason, error=error.message)
            else:
                if found != Looked(0, 0):
                    log.info("user_sessions_judged", tasks_suspended=found.suspended, tasks_resumed=found.resumed)
            await asyncio.sleep(CHECK_EVERY)

    async def settle(self) -> None:
        """Note the sessions of tasks that were started before their issuer had a lease; raises Unavailable."""
        after: str | None = None
        while True:
            page = await self._store.read(partial(_living, after=after))
            theirs = [task for task in page.tasks if self._has_lease(task) and task.depth == 0]
            if theirs:
                await self._store.write(making_nothing_due(partial(_note, tasks=theirs)))
            after = page.next
            if after is None:
                return

    async def look(self) -> Looked:
        """Suspend and let go on what is due at this moment; raises Unavailable."""
        suspended = resumed = 0
        for issuer, lease in self._standing.leases.items():
            until = self._clock.now() - lease
            suspended += await self._all(partial(_silent, issuer=issuer, until=until), self._suspend)
            resumed += await self._all(partial(_returning, issuer=issuer, since=until), self._resume)
        return Looked(suspended, resumed)

    async def _all(self, find: Callable[[Reader], tuple[UserSession, ...]], step: _Act) -> int:
        count, before = 0, tuple[UserSession, ...]()
        # The same ones again: they are due by the clock of the query only, which was stepped meanwhile.
        while (sessions := await self._store.read(find)) != before:
            count += sum(await asyncio.gather(*(self._each(session, step) for session in sessions)))
            before = sessions
        return count

    async def _each(self, session: UserSession, step: _Act) -> int:
        after, count = None, 0
        while True:
            done = await self._store.write(making_nothing_due(partial(_in_turn, step, session, after)))
            count += done.count
            after = done.after
            if after is None:
                return count

    def _suspend(self, writer: Writer, session: UserSession, after: str | None) -> _Step:
        now, known = self._clock.now(), writer.user_session(session.issuer, session.sid, session.user)
        if known is None or known.lease is UserLease.LAPSED or not self._is_silent(known, now):
            return _Step(0, None)
        page = writer.living_tasks(_of(known, State.ACTIVE), after=after, limit=TASKS_AT_ONCE)
        count = 0
        for task in page.tasks:
            if effective_state(task, now) is State.ACTIVE and self._standing.unconfirmed(writer, task.delegation, now):
                count += suspend(writer, task, Cause.USER_UNCONFIRMED, by=SERVER, now=now).frame_seq > 0
        if page.next is None:
            writer.put_user_lease(known, UserLease.LAPSED)
        return _Step(count, page.next)

    def _resume(self, writer: Writer, session: UserSession, after: str | None) -> _Step:
        now, known = self._clock.now(), writer.user_session(session.issuer, session.sid, session.user)
        if known is None or known.lease is not UserLease.RETURNING or self._is_silent(known, now):
            return _Step(0, None)
        wanted = _of(known, State.SUSPENDED, Cause.USER_UNCONFIRMED)
        page = writer.living_tasks(wanted, after=after, limit=TASKS_AT_ONCE)
        count = sum(go_on(writer, task, self._standing, self._rules, now) is not task for task in page.tasks)
        if page.next is None:
            writer.put_user_lease(known, UserLease.HELD)
        return _Step(count, page.next)

    def _is_silent(self, session: UserSession, now: datetime) -> bool:
        return now >= session.confirmed_at + self._standing.leases[session.issuer]

    def _has_lease(self, task: Task) -> bool:
        return task.delegation.issuer in self._standing.leases and task.delegation.standing is None


def go_on(writer: Writer, task: Task, standing: Standing, rules: Rules, now: datetime) -> Task:
    """Let a task go on that was suspended because nothing was heard of its user's session; the same task where it may not."""
    if task.cause is not Cause.USER_UNCONFIRMED or effective_state(task, now) is not State.SUSPENDED:
        return task
    if not _is_attended(writer, task) or not rules.may_begin(task, Action.RESUME).is_allowed:
        return task
    try:
        standing.require(writer, task.delegation, now, agent=task.agent)
    except BrokerError:
        return task
    return resume(writer, task, by=task.delegation.issuer, now=now, session=task.session)


def go_on_above(
    writer: Writer, lineage: tuple[Task, ...], standing: Standing, rules: Rules, now: datetime
) -> tuple[Task, ...]:
    """Let the tree of a task go on, where that is why it stands still; give the task and its ancestors as they are then."""
    return (go_on(writer, lineage[0], standing, rules, now), *lineage[1:])


def _is_attended(reader: Reader, task: Task) -> bool:
    """Tell whether the process that a task hangs on lives; one that hangs on none waits for nobody."""
    if task.session is None:
        return True
    known = reader.session(task.session)
    return known is not None and known.ended_at is None


def _of(session: UserSession, state: State, cause: Cause | None = None) -> LivingTasks:
    given = (("issuer", session.issuer), *((("session", session.sid),) if session.sid else ()))
    return LivingTasks(user=session.user, given=given, state=state, cause=cause, roots=True)


def _in_turn(step: _Act, session: UserSession, after: str | None, writer: Writer) -> _Step:
    return step(writer, session, after)


def _silent(reader: Reader, issuer: str, until: datetime) -> tuple[UserSession, ...]:
    return reader.silent_user_sessions(issuer, until, SESSIONS_AT_ONCE)


def _returning(reader: Reader, issuer: str, since: datetime) -> tuple[UserSession, ...]:
    return reader.returning_user_sessions(issuer, since, SESSIONS_AT_ONCE)


def _living(reader: Reader, after: str | None) -> TaskPage:
    return reader.list_tasks(TaskFilter(live=True), after=after, limit=LOOKED_AT)


def _note(writer: Writer, tasks: Sequence[Task]) -> None:
    for task in tasks:
        given = task.delegation
        if writer.user_session(given.issuer, given.session or "", given.user) is None:
            confirmed_at = given.issued_at or _NEVER
            writer.see_user_session(
                UserSession(given.issuer, given.session or "", given.user, confirmed_at, task.created_at)
            )
