"""Refusals in the log, as many as a reader can use: a hostile process can be refused thousands of times a second."""

from typing import Any, Final

from broker.clock import Clock

LINES: Final = 30  # in one period; above that only their number is told
PERIOD: Final = 10.0  # seconds


class RefusalLog:
    """Writes at level info until the period's lines are used up, then counts."""

    def __init__(self, log: Any, clock: Clock, *, lines: int = LINES) -> None:
        self._room = lines
        self._log = log
        self._clock = clock
        self._began = clock.monotonic()
        self._lines = 0
        self._held_back = 0

    def has_room(self) -> bool:
        """Say whether the next line will be written; so costly reasons are looked for only where they are read."""
        now = self._clock.monotonic()
        if now - self._began >= PERIOD:
            if self._held_back:
                self._log.info("refusals_not_shown", count=self._held_back)
            self._began, self._lines, self._held_back = now, 0, 0
        return self._lines < self._room

    def __call__(self, event: str, **fields: object) -> None:
        """Write one line, or count it."""
        if self.has_room():
            self._lines += 1
            self._log.info(event, **fields)
        else:
            self._held_back += 1
