"""Values met before: what is stored alike means the same, so each value is parsed and kept once.

Parents, selectors and authorities repeat from row to row; whole rows (an entry, a node, a session, a task) are read again with
every token. The row itself is the key: one that has changed is another.
"""

from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

from broker.server.store.sql import read_list
from broker.spiffe import Selector, SpiffeId, TrustDomain

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")

KEPT_ROWS = 4_096
"""Rows of one kind kept parsed per connection: the busy ones are read again and again."""


class Remembered(Generic[K, T]):
    """Frozen values by what is stored of them, at most ``limit`` of them; then it starts anew."""

    def __init__(self, parse: Callable[[K], T], limit: int) -> None:
        """Remember what this parses."""
        self._parse = parse
        self._limit = limit
        self._values: dict[K, T] = {}

    def read(self, stored: K) -> T:
        """Give the value of a text or a row; raises what parsing raises."""
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
        self.trust_domains = Remembered(_trust_domain_set, self.LIMIT).read
        self.texts = Remembered(_text_set, self.LIMIT).read

    def _selector_set(self, stored: str) -> frozenset[Selector]:
        return frozenset(read_list(stored, self._selector.read))


def _trust_domain_set(stored: str) -> frozenset[TrustDomain]:
    return frozenset(read_list(stored, TrustDomain))


def _text_set(stored: str) -> frozenset[str]:
    return frozenset(read_list(stored, str))
