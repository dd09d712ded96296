"""Whether a look at the store can find anything: a store in which nothing changes is not asked.

Who looks after what becomes due by itself says when that is; who wrote since the last look is counted by the store.
"""

from datetime import datetime
from typing import Final

from broker.clock import Clock
from broker.server.store.ports import Store

AT_LEAST_EVERY: Final = 60.0
"""Seconds between two looks at a store that other servers write to, of which some may have stopped."""


class Stillness:
    """What one loop knows since its last look."""

    def __init__(self, store: Store, clock: Clock) -> None:
        """Begin with everything possible."""
        self._store = store
        self._clock = clock
        self._seen = -1
        self._before = -1
        self._due: datetime | None = None
        self._looked_at = clock.monotonic()

    def may_have_ended(self) -> bool:
        """Tell whether there can be anything to find; a look is to follow if so."""
        self._before = self._store.written
        return (
            self._before != self._seen
            or (self._due is not None and self._due <= self._clock.now())
            or (self._store.is_shared and self._clock.monotonic() - self._looked_at >= AT_LEAST_EVERY)
        )

    def looked(self, due: datetime | None) -> None:
        """Note a look that found nothing, and when something will be due. Its own acts are marked, so they do not count."""
        self._due = due
        self._looked_at = self._clock.monotonic()
        # As it was before the look: what somebody wrote since then may have been too late for it.
        self._seen = self._before
