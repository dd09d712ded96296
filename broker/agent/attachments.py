"""Attached tasks whose processes hold a stream here: who answers, and who has let go.

A process lets go of a task by not answering for too long, or by closing its last stream without coming back at once. What is
counted is beats that were sent and not answered, not time: while this agent stood still itself, nobody was silent. A process that
exits ends its session and with it its tasks: that is not told here.
"""

import asyncio
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final

from broker.telemetry.log import get_logger

BEATS_IN_LEASE: Final = 3
"""Beats that may be left unanswered, one after the other, in the time that a process may be silent."""
COME_BACK_WITHIN: Final = 5.0
"""Seconds in which a process that lost its stream may open another: a connection breaks, and the process is not to blame."""

_log = get_logger("agent.attachments")


@dataclass(slots=True, eq=False)
class Held:
    """One stream of one process for one task."""

    task_id: str
    session_id: str
    ttl: float
    sent: int = 0
    answered: int = 0
    unanswered: int = 0

    @property
    def every(self) -> float:
        """Seconds between two beats."""
        return self.ttl / BEATS_IN_LEASE

    def beat(self) -> int:
        """Count the beat before, if nobody answered it, and give the number of the next."""
        self.unanswered = self.unanswered + 1 if self.answered < self.sent else 0
        self.sent += 1
        return self.sent

    @property
    def is_silent(self) -> bool:
        """Whether the process has not answered for too long."""
        return self.unanswered >= BEATS_IN_LEASE

    def answer(self, beat: int) -> None:
        """Note an answer; one to a beat that was not sent counts as none."""
        if self.answered < beat <= self.sent:
            self.answered = beat


@dataclass(slots=True)
class _Attached:
    session_id: str
    streams: set[Held] = field(default_factory=set)
    leaving: asyncio.TimerHandle | None = None


class Attachments:
    """All tasks that are held by a stream, or were a moment ago."""

    def __init__(self, on_detached: Callable[[str, str], None]) -> None:
        """``on_detached`` is told the task and the session of a living process that let go."""
        self._on_detached = on_detached
        self._attached: dict[str, _Attached] = {}

    def __len__(self) -> int:
        return len(self._attached)

    @contextmanager
    def holding(self, task_id: str, session_id: str, ttl: float) -> Iterator[Held]:
        """Hold a task for as long as the block lasts; ``ttl`` in seconds: how long the process may be silent."""
        held = Held(task_id, session_id, ttl)
        attached = self._attached.setdefault(task_id, _Attached(session_id))
        if attached.leaving is not None:
            attached.leaving.cancel()
            attached.leaving = None
        attached.streams.add(held)
        try:
            yield held
        finally:
            attached.streams.discard(held)
            if not attached.streams and self._attached.get(task_id) is attached:
                seconds = min(ttl, COME_BACK_WITHIN)
                attached.leaving = asyncio.get_running_loop().call_later(
                    seconds, self._let_go, task_id, "stream_closed"
                )

    def is_held(self, held: Held) -> bool:
        """Tell whether the stream still stands for its task: neither the task nor the session is over."""
        attached = self._attached.get(held.task_id)
        return attached is not None and held in attached.streams

    def silent(self, held: Held) -> None:
        """Let go of a task whose process does not answer any more on this stream, if it does on no other."""
        attached = self._attached.get(held.task_id)
        if attached is not None and all(one.is_silent for one in attached.streams):
            self._let_go(held.task_id, "not_answered")

    def forget(self, task_id: str) -> None:
        """The task is over: its streams may close."""
        attached = self._attached.pop(task_id, None)
        if attached is not None and attached.leaving is not None:
            attached.leaving.cancel()

    def ended(self, session_ids: Collection[str]) -> None:
        """These sessions are over, and with them their tasks."""
        gone = frozenset(session_ids)
        for task_id in [task_id for task_id, one in self._attached.items() if one.session_id in gone]:
            self.forget(task_id)

    def close(self) -> None:
        """Forget everything, as the agent stops."""
        for task_id in list(self._attached):
            self.forget(task_id)

    def _let_go(self, task_id: str, why: str) -> None:
        attached = self._attached.get(task_id)
        if attached is None:
            return
        self.forget(task_id)
        _log.info("task_detached", task=task_id, session=attached.session_id, reason=why)
        self._on_detached(task_id, attached.session_id)
