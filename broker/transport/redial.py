"""When a server that could not be reached is tried again: soon at first, then once in 28 seconds, each client at its own moment.

One schedule for one client, whoever in it wants to call: otherwise each of its loops knocks by itself, and a fleet of clients
comes back in the second in which the server does. Knows no addresses and no TLS.
"""

import random
from typing import Final

FIRST: Final = 0.1  # seconds: most interruptions are a restart or a changed certificate, and over at once
LONGEST: Final = 28.0  # seconds from one attempt to the next: whoever is back is found again within 30
NARROW: Final = 0.1  # of the longest: equal distances from moments that differ spread a fleet evenly, wide ones do not


class Redial:
    """The schedule of one client. ``now`` in seconds of any steady clock; ``chance`` gives numbers in [0, 1)."""

    def __init__(self, chance: random.Random | None = None) -> None:
        """Begin with nothing in the way."""
        self._chance = chance or random.SystemRandom()
        self._failures = 0
        self._taken = self._next = float("-inf")

    def take(self, now: float) -> float:
        """Take the turn for an attempt that begins now: 0, or the seconds for which nobody may make one."""
        if now < self._next:
            return self._next - now
        self._taken = now
        if self._failures:
            # At once, not when it has failed: only one attempt is made in each interval.
            self._next = now + self._delay()
        return 0.0

    def failed(self, now: float) -> None:
        """Say that the attempt led to nothing. The next is counted from its beginning, however long it took."""
        self._failures += 1
        self._next = max(self._taken + self._delay(), now + FIRST / 4)

    def at_once(self) -> None:
        """Let attempts be made at once: the server has spoken, or there is reason to think that it will."""
        self._failures, self._next = 0, float("-inf")

    def _delay(self) -> float:
        step = FIRST * (1 << min(self._failures - 1, 16))
        if step >= LONGEST:
            return LONGEST * (1 - NARROW * self._chance.random())
        return step * (0.25 + 0.75 * self._chance.random())
