"""How tasks are suspended: one function, one transaction, one feed, as with ends. How one goes on is not known here.

Invariants: a suspension is a row, an audit record and a frame, all in one commit. Every token of the task and of all below it is
dead from then on, for good: the tree's epoch is raised, the tasks that are suspended take it over, and the frames say that
tokens below it are dead. Those of the relatives of a branch live on. Whoever lets the task go on need not touch an epoch.
Suspending twice is the same suspension.
"""

from dataclasses import dataclass, replace
from datetime import datetime

from broker.server.store.ports import Writer
from broker.server.store.rows import NewFrame
from broker.server.tasks import records
from broker.server.tasks.lifecycle import FORGET_AFTER, TASK_CHANGE
from broker.tasks import Cause, State, Task
from broker.tasks import suspend as suspended


@dataclass(frozen=True, slots=True)
class Suspension:
    """A task that is suspended, and the number of the frame that told of it; 0 when it had been before."""

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
    """Suspend an active task, within the caller's transaction; the same task when it is suspended already.

    ``by`` says who: a SPIFFE ID, ``operator:…``, or ``server``. What is below it keeps its state and can do nothing while it lasts. Raises
    Conflict when the task has ended, or has moved on from ``expected_version``.
    """
    stopped = suspended(task, cause, now, expected_version)
    if stopped is task:
        return Suspension(task, 0)
    epoch = writer.bump_epoch(task.root)
    stopped = replace(stopped, epoch=epoch)
    writer.replace_task(stopped, expected_version=task.version)
    below = writer.raise_epochs(task.id, epoch)
    if stopped.depth == 0:
        seq = writer.add_frame(_frame("subtree", stopped, stopped, now))
    else:
        living = [one for one in writer.subtree(task.id) if not one.state.is_terminal and one.id != task.id]
        seq = 0
        for each in (stopped, *living):
            seq = writer.add_frame(_frame("task", each, stopped, now))
    writer.record(records.task_suspended(stopped, by, frame_seq=seq, below=below, at=now, reason=reason))
    writer.change(TASK_CHANGE, stopped.id, stopped.state.value)
    return Suspension(stopped, seq)


def _frame(kind: str, task: Task, stopped: Task, now: datetime) -> NewFrame:
    return NewFrame(
        kind=kind,
        committed_at=int(now.timestamp() * 1000),
        forget_at=int(now.timestamp()) + FORGET_AFTER,
        root=task.root,
        task=task.id,
        epoch=stopped.epoch,
        state=State.SUSPENDED.value,
        session=task.session or "",
        cause="" if stopped.cause is None else stopped.cause.value,
    )
