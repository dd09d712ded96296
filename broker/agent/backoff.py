"""How long to wait before trying again: doubling, with full jitter, so that a fleet does not come back as one."""

import random
from dataclasses import dataclass, field
from typing import Final

FIRST: Final = 0.1  # seconds: most interruptions are a changed certificate, and over at once
LONGEST: Final = 20.0  # seconds: recovery within 30 s of the server's return


@dataclass(slots=True)
class Backoff:
    """Delays of one loop. ``chance`` gives numbers in [0, 1)."""

    longest: float = LONGEST
    chance: random.Random = field(default_factory=random.SystemRandom)
    attempt: int = 0

    def next(self) -> float:
        """Give the next delay in seconds: at least a quarter of the step, at most all of it."""
        step = min(self.longest, FIRST * (1 << min(self.attempt, 16)))
        self.attempt += 1
        return step * (0.25 + 0.75 * self.chance.random())

    def reset(self) -> None:
        """Begin anew after a success."""
        self.attempt = 0
