"""How long it took from the commit of an end until its verifiers had applied it.

Measured with one clock, this server's: from the commit to the acknowledgement, which is an upper bound of the moment of
applying. Of each frame it can say ``closed`` (all who were there have it), ``partial`` (some left without a word) or
``unknown`` (some have not answered yet, or it is too long ago).
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

REMEMBERED: Final = 4096
"""Frames whose delivery is remembered: minutes of a busy server."""
BUCKETS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
"""Upper bounds in seconds; the budgets lie between 5 ms and 100 ms."""


class Outcome(StrEnum):
    """What is known of a frame's delivery."""

    CLOSED = "closed"
    PARTIAL = "partial"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Delivery:
    """One frame's delivery: of ``expected`` subscribers ``acked`` have it, the slowest after ``max_seconds``."""

    outcome: Outcome
    expected: int
    acked: int
    max_seconds: float


@dataclass(slots=True)
class _Open:
    committed_at: float
    expected: int
    waiting: set[object]
    acked: int = 0
    max_seconds: float = 0.0


@dataclass(slots=True)
class Histogram:
    """Delays in seconds: ``counts`` per bucket (the last one is beyond all bounds), their sum, and the longest."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(BUCKETS) + 1))
    sum: float = 0.0
    max: float = 0.0

    @property
    def count(self) -> int:
        """How many delays were measured."""
        return sum(self.counts)

    def add(self, seconds: float) -> None:
        """Count one delay."""
        place = next((number for number, bound in enumerate(BUCKETS) if seconds <= bound), len(BUCKETS))
        self.counts[place] += 1
        self.sum += seconds
        self.max = max(self.max, seconds)


class Deliveries:
    """The deliveries of the latest frames."""

    def __init__(self, observe: Callable[[float], None] | None = None) -> None:
        """``observe`` is told each delay, in seconds."""
        self.histogram = Histogram()
        self._observe = observe
        self._open: OrderedDict[int, _Open] = OrderedDict()

    def sent(self, seq: int, to: Iterable[object], now: float) -> None:
        """Note a frame that was committed just now, and who is there to get it; ``now`` is monotonic."""
        waiting = set(to)
        self._open[seq] = _Open(now, len(waiting), waiting)
        if len(self._open) > REMEMBERED:
            self._open.popitem(last=False)

    def acked(self, who: object, since: int, until: int, now: float) -> None:
        """Note that a subscriber has applied every frame after ``since`` up to ``until``."""
        for seq in reversed(self._open):
            if seq <= since:
                break
            delivery = self._open[seq]
            if seq > until or who not in delivery.waiting:
                continue
            delivery.waiting.discard(who)
            delivery.acked += 1
            delay = now - delivery.committed_at
            delivery.max_seconds = max(delivery.max_seconds, delay)
            self.histogram.add(delay)
            if self._observe is not None:
                self._observe(delay)

    def gone(self, who: object) -> None:
        """Note that a subscriber left: what it had not acknowledged, it may never have applied."""
        for delivery in self._open.values():
            delivery.waiting.discard(who)

    def of(self, seq: int) -> Delivery:
        """Tell what is known of one frame."""
        delivery = self._open.get(seq)
        if delivery is None:
            return Delivery(Outcome.UNKNOWN, 0, 0, 0.0)
        if delivery.waiting:
            outcome = Outcome.UNKNOWN
        else:
            outcome = Outcome.CLOSED if delivery.acked == delivery.expected else Outcome.PARTIAL
        return Delivery(outcome, delivery.expected, delivery.acked, delivery.max_seconds)
