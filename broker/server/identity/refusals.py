"""How many refusals are written down: nodes that are refused need no certificate, and must not fill the disk.

Beyond the rate they are only counted; the next record says how many were left out before it.
"""

from typing import Final

from broker.clock import Clock

PER_SECOND: Final = 10.0
"""Records a second in the long run: a million a day, some hundred MiB, is what an attack may cost at most."""
BURST: Final = 200.0
"""Records at once: a fleet with a wrong token is seen in full."""


class RefusalBudget:
    """A bucket of records that fills with time."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._allowance = BURST
        self._counted_at = clock.monotonic()
        self._left_out = 0

    def take(self) -> int | None:
        """Give how many were left out since the last record, or None: this one is left out too."""
        now = self._clock.monotonic()
        self._allowance = min(BURST, self._allowance + (now - self._counted_at) * PER_SECOND)
        self._counted_at = now
        if self._allowance < 1:
            self._left_out += 1
            return None
        self._allowance -= 1
        left_out, self._left_out = self._left_out, 0
        return left_out
