"""Who has given a sign of life, and who has not for too long. By steady time alone; knows no tasks and no store.

Steady time is the time in which this server listened. A stepped wall clock does not touch it, and while the server itself stood
still, or was cut off from those who could have told it, nobody was silent: it was deaf.
"""

from collections import OrderedDict
from typing import Final

MOST_AT_ONCE: Final = 2.0
"""Seconds that may lie between two looks and still count: beyond it the server stood still itself."""


class SteadyTime:
    """Seconds in which this server listened, counted by looks at a monotonic clock."""

    def __init__(self, monotonic: float) -> None:
        """Begin at zero."""
        self._passed = 0.0
        self._looked_at = monotonic

    def at(self, monotonic: float) -> float:
        """Give the time of a moment since the last look."""
        return self._passed + min(max(monotonic - self._looked_at, 0.0), MOST_AT_ONCE)

    def look(self, monotonic: float, *, is_listening: bool) -> float:
        """Look again, and give the time; nothing has passed where nobody could be heard."""
        if is_listening:
            self._passed = self.at(monotonic)
        self._looked_at = monotonic
        return self._passed


class Leases:
    """Names, each with when it was heard last. All have the same time; looking for who is due costs what is due."""

    def __init__(self, ttl: float) -> None:
        """``ttl`` in seconds: a name that was not heard for longer is due."""
        self.ttl = ttl
        self._heard: OrderedDict[str, float] = OrderedDict()

    def __len__(self) -> int:
        return len(self._heard)

    def __contains__(self, name: object) -> bool:
        return name in self._heard

    def heard(self, name: str, now: float) -> None:
        """Note a sign of life; a name that is new is kept from now on. ``now`` never goes back."""
        self._heard[name] = now
        self._heard.move_to_end(name)

    def forget(self, name: str) -> None:
        """Wait for this one no longer."""
        self._heard.pop(name, None)

    def left(self, name: str, now: float) -> float:
        """Give the seconds until it is due; 0 for one that is, or is not known."""
        heard = self._heard.get(name)
        return 0.0 if heard is None else max(0.0, heard + self.ttl - now)

    def due(self, now: float, limit: int) -> list[str]:
        """Give up to ``limit`` names that were not heard for longer than they may, the longest silent first."""
        found: list[str] = []
        for name, heard in self._heard.items():
            if now - heard <= self.ttl or len(found) == limit:
                break
            found.append(name)
        return found
