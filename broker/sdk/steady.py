"""A clock that never goes back: a wall clock that is set back must not bring tokens to life that have expired or ended.

It goes with the wall clock forwards, and on from where it was, by the monotonic clock, when the wall clock falls behind. Whoever set a
fast clock right has its verifiers refuse until they are started again: refusing is the safe mistake.
"""

from datetime import datetime, timedelta

from broker.clock import Clock


class SteadyClock:
    """Wraps a clock."""

    def __init__(self, clock: Clock) -> None:
        """Begin at the wall clock's time."""
        self._clock = clock
        self._latest = clock.now()
        self._at = clock.monotonic()

    def now(self) -> datetime:
        """Give the time: never earlier than an answer before; while the wall clock is behind that, with what has passed since."""
        wall, passed = self._clock.now(), self._clock.monotonic()
        # Asked with every call and every heartbeat: what a step back could hide between two answers is a second.
        if wall >= self._latest:
            self._latest, self._at = wall, passed
            return wall
        return self._latest + timedelta(seconds=passed - self._at)

    def monotonic(self) -> float:
        """Give the wrapped clock's."""
        return self._clock.monotonic()
