"""Ends things at their hour by the wall clock, however it was stepped and however long the machine slept."""

import asyncio
import heapq
from collections.abc import Callable
from datetime import datetime
from itertools import count

from broker.clock import Clock

TICK = 0.5  # seconds between two looks: what has expired may live this much longer


class Lifetimes:
    """A set of ``(hour, action)``; actions run on the event loop, once, unless they are forgotten before."""

    def __init__(self, clock: Clock) -> None:
        """Nothing runs before :meth:`start`."""
        self._clock = clock
        self._heap: list[tuple[datetime, int]] = []
        self._actions: dict[int, Callable[[], None]] = {}
        self._numbers = count()
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Begin to look."""
        self._timer = asyncio.get_running_loop().call_later(TICK, self._tick)

    def stop(self) -> None:
        """End; what is still there never runs."""
        if self._timer:
            self._timer.cancel()
        self._heap.clear()
        self._actions.clear()

    def add(self, hour: datetime, action: Callable[[], None]) -> int:
        """Run ``action`` at ``hour`` (aware); gives a number for :meth:`forget`."""
        number = next(self._numbers)
        self._actions[number] = action
        heapq.heappush(self._heap, (hour, number))
        return number

    def forget(self, number: int) -> None:
        """Do not run this one."""
        self._actions.pop(number, None)
        if len(self._heap) > 2 * len(self._actions) + 64:
            # Most entries are of things that ended early: rebuild, so that the heap stays as large as what lives.
            self._heap = [entry for entry in self._heap if entry[1] in self._actions]
            heapq.heapify(self._heap)

    def _tick(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(TICK, self._tick)
        now = self._clock.now()
        while self._heap and self._heap[0][0] <= now:
            action = self._actions.pop(heapq.heappop(self._heap)[1], None)
            if action:
                action()
