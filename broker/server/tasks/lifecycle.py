"""How tasks end: one function, one transaction, one feed, whatever the cause.

Invariants: an end is a row, an audit record and a frame, all in one commit, before anybody is told. Ending a whole tree
raises its root's epoch, so that one frame kills every token of it; ending a branch names each task of it. Ending twice is
the same end. Expiry is judged by time everywhere; the sweeper only writes down what is true already.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from broker.clock import Clock
from broker.errors import NotFound, Refused
from broker.server import failpoints
from broker.server.store.ports import Store, Writer, making_nothing_due
from broker.server.store.rows import NewFrame, SessionRow, TokenRow
from broker.server.tasks import records
from broker.server.tasks.admission import identify
from broker.server.tasks.answers import Answers, digest_of
from broker.server.tasks.config import MAX_TOKEN_TTL
from broker.server.tasks.decision import own_task, task_unknown
from broker.server.tasks.requests import Actor, check_key
from broker.spiffe import SpiffeId
from broker.tasks import LEEWAY, Cause, State, Task
from broker.tasks import end as ended
from broker.tasks.causes import SessionEnd
from broker.tasks.texts import check_purpose

FORGET_AFTER: Final = MAX_TOKEN_TTL + 2 * LEEWAY
"""Seconds that a frame is kept: no token that it kills is believed for longer, whatever the clocks."""
RECORDED_EACH: Final = 256
"""Most tasks below an ended one that each get a record of their own; of more, the record of the end says how many."""
SWEEP_LIMIT: Final = 200
"""Tasks of one sweep: a transaction of some milliseconds, so that others do not wait."""
ROWS_EACH: Final = 500
"""Rows of ended trees that one transaction writes down: some milliseconds, too."""
FORGET_LIMIT: Final = 500
"""Rows of each kind that one sweep forgets: at a sweep a second as many as a busy server makes."""
TASK_CHANGE: Final = "task"
"""The change log's word for a task that came or changed."""


@dataclass(frozen=True, slots=True)
class End:
    """A task that is over, and the number of the frame that told of it; 0 when it had ended before."""

    task: Task
    frame_seq: int


def end(
    writer: Writer,
    task: Task,
    state: State,
    cause: Cause,
    *,
    by: str,
    now: datetime,
    expected_version: int | None = None,
    reason: str = "",
) -> End:
    """End a task and everything below it, within the caller's transaction; the same task when it has ended so before.

    ``by`` says who: a SPIFFE ID, ``operator:…``, or ``server``; ``reason`` is an operator's sentence. Raises Conflict when it has ended otherwise, or has moved on
    from ``expected_version``.
    """
    over = ended(task, state, cause, now, expected_version)
    if over is task:
        return End(task, 0)
    writer.replace_task(over, expected_version=task.version)
    count, below, seq = _end_tree(writer, over, now) if over.depth == 0 else _end_branch(writer, over, now)
    writer.record(records.task_ended(over, by, frame_seq=seq, tasks_ended=1 + count, at=now, reason=reason))
    writer.change(TASK_CHANGE, over.id, over.state.value)
    for each in below:
        writer.record(records.task_ended(each, by, frame_seq=seq, tasks_ended=1, at=now))
    return End(over, seq)


def _end_tree(writer: Writer, root: Task, now: datetime) -> tuple[int, Sequence[Task], int]:
    """End all below a root and raise its epoch: one statement and one frame, however many there are.

    Gives how many ended, those of them that get a record of their own, and the frame's number.
    """
    count = writer.cascade(root.id, Cause.PARENT_ENDED, now)
    below = _just_ended(writer.subtree(root.id), root, count, now) if 0 < count <= RECORDED_EACH else ()
    epoch = writer.bump_epoch(root.root)
    return count, below, writer.add_frame(frame_of("subtree", root, now, epoch=epoch))


def _just_ended(tree: Sequence[Task], root: Task, count: int, now: datetime) -> Sequence[Task]:
    """Pick the tasks that the cascade has ended: those it cascaded, and those that it found overdue."""
    cascaded: list[Task] = []
    overdue: list[Task] = []
    reached = {root.id}
    for each in tree:
        # Below a task that had ended before, all had ended before. The tree comes by depth.
        if each.parent not in reached:
            continue
        if each.state is State.CASCADED and each.ended_at == max(now, each.created_at):
            cascaded.append(each)
            reached.add(each.id)
        elif each.state is State.EXPIRED:
            overdue.append(each)
            reached.add(each.id)
    # The sweeper takes the longest overdue first: what it had not reached yet are the latest.
    overdue.sort(key=lambda each: (each.expires_at, each.id), reverse=True)
    return [*cascaded, *overdue[: count - len(cascaded)]]


def _end_branch(writer: Writer, branch: Task, now: datetime) -> tuple[int, Sequence[Task], int]:
    """End all below a task that is no root, with a frame for each: its relatives live on under the same epoch.

    Gives as :func:`_end_tree`; the number is the last frame's: who has applied it has applied them all.
    """
    living = [each for each in writer.subtree(branch.id) if each.id != branch.id and not each.state.is_terminal]
    if living:
        writer.cascade(branch.id, Cause.PARENT_ENDED, now)
    below = [ended(each, State.CASCADED, Cause.PARENT_ENDED, now) for each in living]
    seq = 0
    for each in (branch, *below):
        seq = writer.add_frame(frame_of("task", each, now))
    return len(below), below if len(below) <= RECORDED_EACH else (), seq


def frame_of(kind: str, task: Task, now: datetime, *, epoch: int = 0) -> NewFrame:
    """Make the frame that tells of a task's state: of its whole tree (``subtree``) or of itself alone (``task``)."""
    return NewFrame(
        kind=kind,
        committed_at=_milliseconds(now),
        forget_at=_forget_at(now),
        root=task.root,
        task=task.id,
        epoch=epoch,
        state=task.state.value,
        session=task.session or "",
        cause="" if task.cause is None else task.cause.value,
    )


def _milliseconds(now: datetime) -> int:
    return int(now.timestamp() * 1000)


def _forget_at(now: datetime) -> int:
    return int(now.timestamp()) + FORGET_AFTER


def revoke_token(writer: Writer, row: TokenRow, *, by: str, now: datetime, reason: str = "") -> int:
    """Revoke one token and give its frame's number; 0 when it was revoked before. ``reason`` is for the record."""
    if writer.revoke_token(row.jti, now) is None:
        return 0
    seq = writer.add_frame(
        NewFrame(
            kind="token",
            committed_at=_milliseconds(now),
            forget_at=_forget_at(now),
            root=row.root,
            task=row.task_id,
            jti=row.jti,
            state="revoked",
        )
    )
    writer.record(records.token_revoked(row, by, seq, now, reason))
    return seq


def end_session(
    writer: Writer,
    session_id: str,
    *,
    agent: SpiffeId,
    now: datetime,
    cause: SessionEnd = SessionEnd.PROCESS_EXITED,
    by: str = "",
) -> bool:
    """End a workload session and every task attached to it; False when it is unknown, another agent's, or over.

    ``by`` says who, where it is not the node agent.

    A task that is suspended outlives its process: it holds nothing, and goes on only when another process of the same entry
    takes it up, as another session. An unsupervised task has no session and outlives its process; the tokens that the process held die with the session's frame.
    """
    known = writer.session(session_id)
    if known is None or known.agent != agent or writer.end_session(session_id, now) is None:
        return False
    writer.add_frame(
        NewFrame(
            kind="session",
            committed_at=_milliseconds(now),
            forget_at=_forget_at(now),
            session=session_id,
            cause=cause.of_tasks.value,
        )
    )
    # Ancestors first: what hangs below them ends with them, once.
    attached = (task for task in writer.tasks_of_session(session_id) if not _outlives(task, cause))
    tasks = sorted(attached, key=lambda task: task.depth)
    for task in tasks:
        current = writer.task(task.id)
        if current is not None and not current.state.is_terminal:
            end(writer, current, State.REVOKED, cause.of_tasks, by=by or str(agent), now=now)
    writer.record(records.session_ended(known, cause, len(tasks), now, by))
    return True


def _outlives(task: Task, cause: SessionEnd) -> bool:
    return task.state is State.SUSPENDED and cause is SessionEnd.PROCESS_EXITED


def end_revoked(writer: Writer, session: SessionRow, by: str, now: datetime) -> int:
    """End the session of an SVID that was revoked, with its tasks and tokens; give how many tasks were attached to it."""
    tasks = len(writer.tasks_of_session(session.id))
    over = end_session(writer, session.id, agent=session.agent, now=now, cause=SessionEnd.SVID_REVOKED, by=by)
    return tasks if over else 0


class Lifecycle:
    """The doors' way to end tasks."""

    def __init__(self, store: Store, clock: Clock, count: Callable[[str], None] | None = None) -> None:
        """``count`` is told the cause of each end."""
        self._store = store
        self._clock = clock
        self._count = count

    async def complete(
        self, actor: Actor, task_id: str, *, expected_version: int | None = None, idempotency_key: str = ""
    ) -> End:
        """End a task because its own process says that the work is done; raises NotFound, Refused, Conflict."""
        check_key(idempotency_key)
        over = await self._store.write(
            lambda writer: self._complete(writer, actor, task_id, expected_version, idempotency_key)
        )
        failpoints.reach("lifecycle.after_commit")
        return self._counted(over)

    async def revoke(self, task_id: str, *, by: str, expected_version: int | None = None, reason: str = "") -> End:
        """End a task because an operator says so; raises NotFound, Conflict, Invalid."""
        if reason:
            check_purpose(reason)

        def act(writer: Writer) -> End:
            task = writer.task(task_id)
            if task is None:
                raise task_unknown()
            now, state, cause = self._clock.now(), State.REVOKED, Cause.OPERATOR
            return end(writer, task, state, cause, by=by, now=now, expected_version=expected_version, reason=reason)

        return self._counted(await self._store.write(act))

    async def revoke_token(self, jti: str, *, owner: SpiffeId, ending: Actor | None = None) -> bool:
        """Revoke a token at its own actor's wish; False when there is no such token of this actor (RFC 7009 §2.2).

        ``ending`` is who wants its task to end with it: nothing else ends where the task is another process's.
        """

        def act(writer: Writer) -> tuple[bool, End | None]:
            row, now = writer.token(jti), self._clock.now()
            if row is None or row.agent != owner:
                return False, None
            revoked = revoke_token(writer, row, by=str(owner), now=now) > 0
            return revoked, None if ending is None else _give_up(writer, ending, row.task_id, now)

        revoked, over = await self._store.write(act)
        if over is not None:
            self._counted(over)
        return revoked

    async def sweep(self) -> int:
        """Write down the tasks whose time is over, the rows of trees that ended, and forget what nobody can ask for.

        Gives how many tasks were found whose time was over.
        """

        def act(writer: Writer) -> list[End]:
            now = self._clock.now()
            over = []
            for task in sorted(writer.overdue_tasks(now, SWEEP_LIMIT), key=lambda task: task.depth):
                current = writer.task(task.id)
                if current is not None and not current.state.is_terminal:
                    over.append(end(writer, current, State.EXPIRED, Cause.EXPIRED, by="server", now=now))
            return over

        found = await self._store.write(making_nothing_due(act))
        for each in found:
            self._counted(each)
        while (
            await self._store.write(making_nothing_due(lambda writer: writer.write_tree_ends(ROWS_EACH))) == ROWS_EACH
        ):
            pass
        await self._store.write(making_nothing_due(lambda writer: writer.sweep(self._clock.now(), FORGET_LIMIT)))
        return len(found)

    def _complete(
        self, writer: Writer, actor: Actor, task_id: str, expected_version: int | None, idempotency_key: str
    ) -> End:
        now = self._clock.now()
        caller = identify(writer, actor)
        task = own_task(writer.lineage(task_id), caller)
        digest = digest_of("complete", None, task_id, expected_version)
        answers = Answers(writer, owner=caller.owner, key=idempotency_key, digest=digest, now=now)
        if answers.recall() is not None:
            return End(task, 0)
        over = end(
            writer,
            task,
            State.COMPLETED,
            Cause.COMPLETED,
            by=str(task.agent),
            now=now,
            expected_version=expected_version,
        )
        answers.keep(task_id)
        failpoints.reach("lifecycle.before_commit")
        return over

    def _counted(self, over: End) -> End:
        if self._count is not None and over.frame_seq and over.task.cause is not None:
            self._count(over.task.cause.value)
        return over


def _give_up(writer: Writer, actor: Actor, task_id: str, now: datetime) -> End | None:
    """End a task that its own process gives up; None where it is not its own, or is over."""
    try:
        task = own_task(writer.lineage(task_id), identify(writer, actor))
    except (NotFound, Refused):
        return None
    if task.state.is_terminal:
        return None
    return end(writer, task, State.REVOKED, Cause.CANCELLED, by=str(task.agent), now=now)
