"""Lets the calls of one process begin a few at a time, so that those of others do not stand behind all of them.

gRPC's core queues the calls that nobody has taken up yet, first come first served: ten thousand streams that are opened
at once would keep every other caller waiting for seconds. Here they wait in their own connections instead. Knows
neither processes nor calls.
"""

import asyncio
from collections import deque
from collections.abc import Callable

MAX_BEGINNING = 32  # calls passed on and not taken up yet: some 20 ms of work
STALL = 0.1  # seconds without one taken up, after which those passed on count as answered: gRPC refuses some by itself


class Turnstile:
    """Counts the calls that were passed on and are not taken up yet; used from one event loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._beginning = 0
        self._waiting: deque[tuple[int, Callable[[], None]]] = deque()
        self._taken_up = 0
        self._timer: asyncio.TimerHandle | None = None

    def ask(self, calls: int, go: Callable[[], None]) -> bool:
        """Say whether so many calls may pass now; otherwise ``go`` is called when they may."""
        if not calls:
            return True
        if self._beginning < MAX_BEGINNING and not self._waiting:
            self._beginning += calls
            return True
        self._waiting.append((calls, go))
        if self._timer is None:
            self._timer = self._loop.call_later(STALL, self._look, self._taken_up)
        return False

    def begun(self) -> None:
        """One call was taken up."""
        self._taken_up += 1
        self._beginning = max(0, self._beginning - 1)
        self._next()

    def close(self) -> None:
        """Nobody waits any more."""
        self._waiting.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _next(self) -> None:
        while self._waiting and self._beginning < MAX_BEGINNING:
            calls, go = self._waiting.popleft()
            self._beginning += calls
            go()

    def _look(self, taken_up: int) -> None:
        self._timer = None
        if taken_up == self._taken_up:
            self._beginning = 0
            self._next()
        if self._waiting:
            self._timer = self._loop.call_later(STALL, self._look, self._taken_up)
