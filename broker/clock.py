"""Time, read in one place.

Rules never read a clock: they take ``now`` as an argument. Whoever must read one holds a :class:`Clock`, so that tests
can step it. Expiry is judged by the wall clock, waiting by the monotonic one.
"""

import time
from datetime import UTC, datetime
from typing import Protocol


class Clock(Protocol):
    """Wall time for expiry, monotonic time for waiting."""

    def now(self) -> datetime:
        """Give the current time, aware, in UTC."""
        ...

    def monotonic(self) -> float:
        """Give seconds that never go back; the origin means nothing."""
        ...


class SystemClock:
    """The machine's own clocks."""

    def now(self) -> datetime:
        """Give the current time, aware, in UTC."""
        return datetime.now(UTC)

    def monotonic(self) -> float:
        """Give seconds that never go back; the origin means nothing."""
        return time.monotonic()
