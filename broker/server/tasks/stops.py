"""Stops: one word ends all that hangs on a user, a session, a delegation, an agent or an audience.

Invariants: the stop itself is one row, one record and at most one frame, in the caller's transaction; from its commit on
nothing that it forbids is issued anywhere, and verifiers refuse what was. Each task then ends through ``lifecycle.end``, as
at every other door, a bounded number in one transaction: the first ones in the stop's own. What a crash leaves unfinished,
the sweep finishes. Only where one user has more tasks than are told singly do all end in bulk: the frame has told it.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime
from functools import partial
from typing import Final

from broker.clock import Clock
from broker.server import failpoints
from broker.server.store.ports import Reader, Store, Writer, making_nothing_due
from broker.server.store.rows import NewFrame
from broker.server.store.user_rows import LivingTasks
from broker.server.tasks import user_records
from broker.server.tasks.lifecycle import FORGET_AFTER, end
from broker.spiffe import SpiffeId
from broker.tasks import Resource, State, Task
from broker.tasks.stop import Stop, StopKind, concerns

ENDED_AT_ONCE: Final = 256
"""Tasks that end singly in one transaction, each with its frame and record: some ten milliseconds."""
ENDED_IN_BULK: Final = 2_000
"""Tasks of one user that one statement ends: some thirty milliseconds, so that others do not wait longer."""
LOOKED_AT: Final = 10_000
"""Tasks looked at in one transaction in search of those that a stop ends."""
UNFINISHED: Final = 16
"""Stops that one sweep goes on with."""

_WHOLE: Final = frozenset({StopKind.USER, StopKind.AGENT, StopKind.AUDIENCE})
"""What a frame can name as a whole: every token of it that was issued before is dead."""
_FIRST: Final = ""
"""In the place of where a search goes on: this is the stop's own transaction."""
_AGAIN: Final = "0:"
"""From the beginning: what was found before has ended since."""


@dataclass(frozen=True, slots=True)
class Stopped:
    """A stop that stands: how many tasks it has ended so far, and the number of the frame that told of it, 0 for none.

    ``after`` is where the search for more goes on, None when all are written down.
    """

    stop: Stop
    tasks_ended: int
    frame_seq: int
    after: str | None = None


@dataclass(frozen=True, slots=True)
class _Step:
    ended: int
    after: str | None


def stop(writer: Writer, wanted: Stop, *, by: str, now: datetime, reason: str = "") -> Stopped:
    """Set a stop and end the first of what it ends, within the caller's transaction.

    ``by`` says who: ``operator:…``, an issuer, a user; ``reason`` is an operator's sentence.
    """
    # A token that was issued in this very second is dead too: none is issued again before the next.
    tokens_from = int(now.timestamp()) + 1 if wanted.kind in _WHOLE else 0
    standing = writer.put_stop(replace(wanted, tokens_from=tokens_from, unfinished=True))
    seq = 0
    for frame in _frames(writer, standing, now):
        seq = writer.add_frame(frame)
    step = _end_some(writer, standing, by=by, now=now, after=_FIRST)
    if step.after is None:
        writer.finish_stop(standing)
    writer.record(user_records.stopped(standing, by, frame_seq=seq, tasks_ended=step.ended, at=now, reason=reason))
    failpoints.reach("stops.before_commit")
    return Stopped(standing, step.ended, seq, step.after)


def _frames(writer: Writer, standing: Stop, now: datetime) -> list[NewFrame]:
    seconds = int(now.timestamp())
    frame = NewFrame(
        kind="user",
        committed_at=int(now.timestamp() * 1000),
        forget_at=seconds + FORGET_AFTER,
        cause=standing.cause.value,
    )
    if standing.kind in _WHOLE:
        kind, not_before = standing.kind.value, standing.tokens_from
        return [replace(frame, kind=kind, name=standing.name, not_before=not_before)]
    if standing.kind is not StopKind.SESSION:
        # Of what no token tells, each task has its own frame.
        return []
    # No token of an ended session is issued again: all that a verifier meets while it remembers are dead.
    issuer, _, sid = standing.name.partition(" ")
    users = writer.user_sessions(issuer, sid)
    return [replace(frame, name=each.user, sid=sid, not_before=seconds + 2 * FORGET_AFTER) for each in users]


def _end_some(writer: Writer, standing: Stop, *, by: str, now: datetime, after: str) -> _Step:
    """End the next of what a stop ends; ``after`` says where the search goes on."""
    if standing.kind is StopKind.USER:
        if after == _AGAIN:
            bulk = writer.end_tasks_of(standing.name, standing.cause, now, ENDED_IN_BULK)
            return _Step(bulk, _AGAIN if bulk == ENDED_IN_BULK else None)
        if writer.has_tasks(standing.name, ENDED_AT_ONCE + 1):
            # One frame tells of them all: it goes out first, with nothing to wait for.
            return _Step(0, _AGAIN)
    searches = _searches(writer, standing)
    number, _, place = after.partition(":") if after else ("0", "", "")
    ended = looked = 0
    for at in range(int(number), len(searches)):
        while True:
            if ended >= ENDED_AT_ONCE or looked >= LOOKED_AT:
                return _Step(ended, f"{at}:{place}")
            page = writer.living_tasks(searches[at], after=place or None, limit=ENDED_AT_ONCE - ended)
            looked += len(page.tasks)
            ended += sum(_end(writer, task, standing, by=by, now=now) for task in _by_depth(page.tasks))
            place = page.next or ""
            if not place:
                break
    return _Step(ended, None)


def _searches(reader: Reader, standing: Stop) -> list[LivingTasks]:
    """Say where the tasks are that a stop may end."""
    name = standing.name
    match standing.kind:
        case StopKind.USER | StopKind.SESSIONS | StopKind.SESSIONLESS:
            return [LivingTasks(user=name)]
        case StopKind.SESSION:
            issuer, _, sid = name.partition(" ")
            users = reader.user_sessions(issuer, sid)
            given = (("issuer", issuer), ("session", sid))
            return [LivingTasks(user=each.user, given=given) for each in users]
        case StopKind.DELEGATION:
            delegation = reader.delegation(name)
            return [] if delegation is None else [LivingTasks(user=delegation.user, given=(("standing", name),))]
        case StopKind.AGENT:
            return [LivingTasks(agent=SpiffeId(name))]
        case StopKind.AUDIENCE:
            return [LivingTasks(location=name)]


def _by_depth(tasks: tuple[Task, ...]) -> list[Task]:
    # Ancestors first: what hangs below them ends with them, once.
    return sorted(tasks, key=lambda task: task.depth)


def _end(writer: Writer, found: Task, standing: Stop, *, by: str, now: datetime) -> bool:
    if not _reaches(standing, found):
        return False
    task = writer.task(found.id)
    if task is None or task.state.is_terminal:
        return False
    end(writer, task, State.REVOKED, standing.cause, by=by, now=now)
    return True


def _reaches(standing: Stop, task: Task) -> bool:
    if not concerns(standing, task.delegation):
        return False
    if standing.kind is StopKind.AGENT:
        return str(task.agent) == standing.name
    if standing.kind is StopKind.AUDIENCE:
        audience = Resource(standing.name)
        return any(audience.contains(one) for one in task.authority.resources())
    return True


class Stops:
    """The doors' way to stop, and the sweep's to finish."""

    def __init__(self, store: Store, clock: Clock, count: Callable[[str], None] | None = None) -> None:
        """``count`` is told the cause of each stop."""
        self._store = store
        self._clock = clock
        self._count = count

    async def run(self, act: Callable[[Writer, datetime], Stopped]) -> Stopped:
        """Run an act that stops something, then finish it: it counts from the act's commit on. Raises Unavailable."""

        def now(writer: Writer) -> Stopped:
            return act(writer, self._clock.now())

        return await self.finished(await self._store.write(now))

    async def finished(self, stopped: Stopped, *beside: Stopped) -> Stopped:
        """Write down what a committed stop ends and its transaction did not; give what it came to. Raises Unavailable.

        ``beside``: others of the same word, which count as one with it.
        """
        if self._count is not None:
            self._count(stopped.stop.cause.value)
        for other in beside:
            await self._finish(other)
        return await self._finish(stopped)

    async def sweep(self) -> int:
        """Go on with stops that a crash has left unfinished; give how many tasks ended."""
        waiting = await self._store.read(lambda reader: reader.unfinished_stops(UNFINISHED))
        return sum([(await self._finish(Stopped(each, 0, 0, _AGAIN))).tasks_ended for each in waiting])

    async def _finish(self, stopped: Stopped) -> Stopped:
        while (after := stopped.after) is not None:
            step = await self._store.write(making_nothing_due(partial(self._go_on, stopped=stopped, after=after)))
            stopped = replace(stopped, tasks_ended=stopped.tasks_ended + step.ended, after=step.after)
        return stopped

    def _go_on(self, writer: Writer, stopped: Stopped, after: str) -> _Step:
        now, standing = self._clock.now(), stopped.stop
        step = _end_some(writer, standing, by=standing.source, now=now, after=after)
        if step.after is None:
            writer.finish_stop(standing)
        if step.ended:
            seq = stopped.frame_seq
            ended = user_records.stopped(standing, standing.source, frame_seq=seq, tasks_ended=step.ended, at=now)
            writer.record(ended)
        return step
