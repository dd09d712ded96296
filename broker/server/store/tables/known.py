"""Values met before: parents, selectors and authorities repeat from row to row, and each is parsed and kept once."""

from collections.abc import Callable
from typing import Generic, TypeVar

from broker.server.store.sql import read_list
from broker.spiffe import Selector, SpiffeId, TrustDomain

T = TypeVar("T")


class Remembered(Generic[T]):
    """Frozen values by their stored text, at most ``limit`` of them; then it starts anew."""

    def __init__(self, parse: Callable[[str], T], limit: int) -> None:
        """Remember what this parses."""
        self._parse = parse
        self._limit = limit
        self._values: dict[str, T] = {}

    def read(self, stored: str) -> T:
        """Give the value of a text; raises what parsing raises."""
        value = self._values.get(stored)
        if value is None:
            value = self._parse(stored)
            if len(self._values) >= self._limit:
                self._values.clear()
            self._values[stored] = value
        return value


class Known:
    """The values of one reading of many rows; thrown away with it."""

    LIMIT = 1_000_000
    """Never met in practice: what is read here is kept by the caller anyway."""

    def __init__(self) -> None:
        """Know nothing yet."""
        self._selector = Remembered(Selector, self.LIMIT)
        self.spiffe_id = Remembered(SpiffeId, self.LIMIT).read
        self.selectors = Remembered(self._selector_set, self.LIMIT).read
        self.trust_domains = Remembered(lambda stored: frozenset(read_list(stored, TrustDomain)), self.LIMIT).read
        self.texts = Remembered(lambda stored: frozenset(read_list(stored, str)), self.LIMIT).read

    def _selector_set(self, stored: str) -> frozenset[Selector]:
        return frozenset(read_list(stored, self._selector.read))
