"""How many calls may be in progress at once: in all, and of one holder, so that nobody takes every place.

A connection is cheap to hold open and a stream on it cheaper, for the caller; each costs us a task and gRPC's own state.
Knows neither calls nor holders.
"""

from collections import Counter
from collections.abc import Hashable

from broker.errors import Unavailable

MAX_CALLS = 16_384  # some 40 KiB each with everything behind it: about 640 MiB at the worst
SHARE_OF_ONE_HOLDER = 0.75  # as of connections: the rest is for the others


class CallRoom:
    """Counts calls by holder; used from one event loop."""

    def __init__(self, calls: int, share: float = SHARE_OF_ONE_HOLDER) -> None:
        self._calls = calls
        self._calls_of_one = max(1, int(calls * share))
        self._taken = 0
        self._by_holder: Counter[Hashable] = Counter()

    def __len__(self) -> int:
        """How many places are taken."""
        return self._taken

    def enter(self, holder: Hashable) -> None:
        """Take a place; raises Unavailable (``too_many_calls``)."""
        if self._taken >= self._calls or self._by_holder[holder] >= self._calls_of_one:
            raise Unavailable("too many calls are in progress", code="too_many_calls", hint="end some, then try again")
        self._taken += 1
        self._by_holder[holder] += 1

    def leave(self, holder: Hashable) -> None:
        """Give a place back that was taken."""
        self._taken -= 1
        self._by_holder[holder] -= 1
        if not self._by_holder[holder]:
            del self._by_holder[holder]
