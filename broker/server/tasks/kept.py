"""The answer to a change, and its short form under an idempotency key: a repetition is told what the first one was told."""

from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Final

from broker.errors import BrokerError
from broker.server.store.ports import Reader
from broker.server.tasks.answers import spent
from broker.spiffe import strictjson
from broker.tasks import Cause, State, Task

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Changed:
    """A task after a change, the number of the frame that told of it (0: none), and who took over after a hand-off.

    ``refusal`` is set where something was written, and is to be told as an error after its commit.
    """

    task: Task
    frame_seq: int = 0
    successor: Task | None = None
    refusal: BrokerError | None = None


def write_kept(changed: Changed) -> str:
    """Write what changes of a task; who, for whom and with what authority never does."""
    task = changed.task
    return strictjson.canonical(
        {
            "state": task.state.value,
            "version": task.version,
            "cause": None if task.cause is None else task.cause.value,
            "session": task.session,
            "epoch": task.epoch,
            "ended_at": None if task.ended_at is None else (task.ended_at - _EPOCH) // timedelta(microseconds=1),
            "frame_seq": changed.frame_seq,
            "successor": None if changed.successor is None else changed.successor.id,
        }
    ).decode()


def read_kept(reader: Reader, kept: str, task: Task) -> Changed:
    """Give the first answer again, from the task as it is now; Conflict(code="idempotency_spent") if it cannot be given."""
    value = strictjson.loads(kept.encode())
    assert isinstance(value, dict)
    cause, ended_at, successor_id, session = (value[name] for name in ("cause", "ended_at", "successor", "session"))
    then = replace(
        task,
        state=State(str(value["state"])),
        version=int(str(value["version"])),
        cause=None if cause is None else Cause(str(cause)),
        session=None if session is None else str(session),
        epoch=int(str(value["epoch"])),
        ended_at=None if ended_at is None else _EPOCH + timedelta(microseconds=int(str(ended_at))),
    )
    successor = None if successor_id is None else reader.task(str(successor_id))
    if successor_id is not None and successor is None:
        raise spent()
    return Changed(then, int(str(value["frame_seq"])), successor)
