"""Who goes next: what waits is taken by its holders in turn, and nobody has more than a share of the places.

Knows neither what waits nor who its holders are.
"""

from collections import Counter, OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

T = TypeVar("T", bound=Hashable)


class Turns(Generic[T]):
    """Used from one event loop. Whoever is taken has a place until it is given back."""

    def __init__(self, places: int, share: float) -> None:
        """``share`` of the places is what one holder may have at once."""
        self._places = places
        self._places_of_one = max(1, int(places * share))
        self._taken: Counter[Hashable] = Counter()
        self._waiting: OrderedDict[Hashable, OrderedDict[T, None]] = OrderedDict()

    def __len__(self) -> int:
        """How many wait."""
        return sum(map(len, self._waiting.values()))

    def put(self, holder: Hashable, one: T) -> None:
        """Have one wait, behind its holder's others."""
        self._waiting.setdefault(holder, OrderedDict())[one] = None

    def withdraw(self, holder: Hashable, one: T) -> None:
        """Let one wait no longer. Harmless when it does not."""
        queue = self._waiting.get(holder)
        if queue is not None:
            queue.pop(one, None)
            if not queue:
                del self._waiting[holder]

    def take(self) -> T | None:
        """Give the next one, which has a place from now on; None where nobody waits who may have one."""
        if self._taken.total() >= self._places:
            return None
        for holder, queue in self._waiting.items():
            if self._taken[holder] < self._places_of_one:
                one, _ = queue.popitem(last=False)
                self._taken[holder] += 1
                self._waiting.move_to_end(holder)
                if not queue:
                    del self._waiting[holder]
                return one
        return None

    def leave(self, holder: Hashable) -> None:
        """Give a place back."""
        self._taken[holder] -= 1
        if not self._taken[holder]:
            del self._taken[holder]

    def drain(self) -> list[T]:
        """Take out all who wait, without places."""
        waiting = [one for queue in self._waiting.values() for one in queue]
        self._waiting.clear()
        return waiting
