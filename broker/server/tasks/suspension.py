"""How tasks are stopped for a while and go on: one function each, beside ``lifecycle.end``, whatever the cause.

Invariants: a suspension is a row, an audit record and its frames, all in one commit. It takes a number from the tree's one
counter and keeps it as the task's epoch: every token of the task or below it that was issued before bears a lower one and is
dead, at verifiers by the frame and here by the row, and stays dead when the task goes on. What is issued afterwards bears the
new number, so that going on needs no frame.
"""

from dataclasses import dataclass, replace
from datetime import datetime

from broker.errors import Conflict
from broker.server.store.ports import Writer
from broker.server.store.rows import NewFrame, ResumeRow
from broker.server.tasks import records
from broker.server.tasks.lifecycle import TASK_CHANGE, frame_of
from broker.tasks import Cause, State, Task, activate
from broker.tasks import suspend as suspended


@dataclass(frozen=True, slots=True)
class Suspension:
    """A task that is suspended, and the number of the last frame that told of it; 0 when it was suspended before."""

    task: Task
    frame_seq: int


def suspend(
    writer: Writer,
    task: Task,
    cause: Cause,
    *,
    by: str,
    now: datetime,
    expected_version: int | None = None,
    reason: str = "",
) -> Suspension:
    """Suspend an active task within the caller's transaction; the same task when it is suspended already.

    No token of it or below it lives on. The tasks below keep their own state: while one above them is not active they can do
    nothing. Where an operator suspends one that stood still for another cause, that is written and recorded, and no frame is needed.
    Raises Conflict when it is over or pending, or has moved on from ``expected_version``.
    """
    held = suspended(task, cause, now, expected_version)
    if held is task:
        return Suspension(task, 0)
    is_news = task.state is not State.SUSPENDED
    if is_news:
        held = replace(held, epoch=writer.bump_epoch(task.root))
    writer.replace_task(held, expected_version=task.version)
    seq = 0
    for frame in _frames(writer, held, now) if is_news else ():
        seq = writer.add_frame(frame)
    writer.record(records.task_suspended(held, by, frame_seq=seq, at=now, reason=reason))
    writer.change(TASK_CHANGE, held.id, held.state.value)
    return Suspension(held, seq)


def _frames(writer: Writer, held: Task, now: datetime) -> list[NewFrame]:
    """One for a whole tree; for a branch one for each living task of it, since its relatives go on."""
    if held.depth == 0:
        return [frame_of("subtree", held, now, epoch=held.epoch)]
    living = [each for each in writer.subtree(held.id) if not each.state.is_terminal]
    return [replace(frame_of("task", each, now, epoch=held.epoch), state=State.SUSPENDED.value) for each in living]


def resume(
    writer: Writer,
    task: Task,
    *,
    by: str,
    now: datetime,
    session: str | None,
    expected_version: int | None = None,
    reason: str = "",
) -> Task:
    """Let a suspended task go on within the caller's transaction.

    ``session`` is that of the process that takes it up; None where it hangs on no process, or waits for its agent's next one.

    Raises Conflict when it is not suspended (also when it is active), or has moved on from ``expected_version``.
    """
    if task.state is State.PENDING:
        raise Conflict("the task is pending: it waits for somebody's word", code="conflict")
    active = replace(activate(task, None, now, expected_version), session=session)
    writer.replace_task(active, expected_version=task.version)
    writer.add_resume(ResumeRow(task.id, now, session, task.session))
    writer.record(records.task_resumed(active, by, resumed_from=task.session, at=now, reason=reason))
    writer.change(TASK_CHANGE, active.id, active.state.value)
    return active


def exhaust(writer: Writer, task: Task, *, by: str, now: datetime) -> Task:
    """Keep a suspended task so until an operator looks: it was taken up again too often."""
    stopped = replace(task, cause=Cause.RESUME_LIMIT, version=task.version + 1)
    writer.replace_task(stopped, expected_version=task.version)
    writer.record(records.task_suspended(stopped, by, frame_seq=0, at=now, reason=""))
    writer.change(TASK_CHANGE, stopped.id, stopped.state.value)
    return stopped
