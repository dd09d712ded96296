"""Which entries and nodes a list is of, and where its pages end. Pure; SPIRE's filters and their meaning."""

import heapq
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import Enum, auto
from typing import Final, Generic, TypeVar

from broker.errors import Invalid
from broker.registry.entry import Entry
from broker.server.store.rows import Node
from broker.spiffe import Selector, SpiffeId, TrustDomain

MAX_PAGE: Final = 1000
"""Most items of one page: a page of long entries still fits into one gRPC message of 4 MiB."""

_ENTRY_TOKEN: Final = re.compile(r"[0-9]{12}\.[A-Za-z0-9._-]{1,255}")

T = TypeVar("T")


class SetMatch(Enum):
    """How the set that an item has is compared with the set that is asked for."""

    EXACT = auto()
    SUBSET = auto()
    SUPERSET = auto()
    ANY = auto()

    def holds(self, has: frozenset[T], asked: frozenset[T]) -> bool:
        """Compare: SUBSET means that the item has some of what is asked for, and nothing else."""
        match self:
            case SetMatch.EXACT:
                return has == asked
            case SetMatch.SUBSET:
                return bool(has) and has <= asked
            case SetMatch.SUPERSET:
                return has >= asked
            case SetMatch.ANY:
                return not has.isdisjoint(asked)


@dataclass(frozen=True, slots=True)
class SetFilter(Generic[T]):
    """A set and how to compare with it; raises Invalid when it is empty, which would be true of everything."""

    asked: frozenset[T]
    how: SetMatch

    def __post_init__(self) -> None:
        if not self.asked:
            raise Invalid("a filter over a set names at least one member", code="invalid_filter")

    def holds(self, has: frozenset[T]) -> bool:
        """Apply it to what an item has."""
        return self.how.holds(has, self.asked)


@dataclass(frozen=True, slots=True, kw_only=True)
class EntryFilter:
    """Which entries; a field that is None does not narrow."""

    spiffe_id: SpiffeId | None = None
    parent_id: SpiffeId | None = None
    selectors: SetFilter[Selector] | None = None
    federates_with: SetFilter[TrustDomain] | None = None
    hint: str | None = None
    downstream: bool | None = None
    owner: str | None = None

    def holds(self, entry: Entry) -> bool:
        """Tell whether an entry is meant."""
        return (
            (self.spiffe_id is None or entry.spiffe_id == self.spiffe_id)
            and (self.parent_id is None or entry.parent_id == self.parent_id)
            and (self.hint is None or entry.hint == self.hint)
            and (self.downstream is None or entry.downstream is self.downstream)
            and (self.owner is None or entry.owner == self.owner)
            and (self.selectors is None or self.selectors.holds(entry.selectors))
            and (self.federates_with is None or self.federates_with.holds(entry.federates_with))
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeFilter:
    """Which nodes; a field that is None does not narrow."""

    attestation_type: str | None = None
    selectors: SetFilter[Selector] | None = None
    banned: bool | None = None
    reattestable: bool | None = None
    expires_before: datetime | None = None

    def holds(self, node: Node) -> bool:
        """Tell whether a node is meant."""
        return (
            (self.attestation_type is None or node.attestation_type == self.attestation_type)
            and (self.banned is None or node.banned is self.banned)
            and (self.reattestable is None or node.reattestable is self.reattestable)
            and (self.expires_before is None or node.expires_at < self.expires_before)
            and (self.selectors is None or self.selectors.holds(node.selectors))
        )


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    """Items in order; ``next`` is the token of the following page, empty at the end."""

    items: Sequence[T]
    next: str


def page(items: Iterable[T], key: Callable[[T], str], size: int, token: str) -> Page[T]:
    """Cut a page: items in the order of ``key`` that follow ``token``; size 0 gives all of them, as in SPIRE."""
    if size < 0:
        raise Invalid("a page has no negative size", code="invalid_page_size")
    rest = (item for item in items if key(item) > token) if token else items
    if size == 0:
        return Page(sorted(rest, key=key), "")
    size = min(size, MAX_PAGE)
    # One more than asked for, to tell whether there is a next page.
    found = heapq.nsmallest(size + 1, rest, key=key)
    return Page(found[:size], key(found[size - 1]) if len(found) > size else "")


def page_in_order(
    items: Sequence[T], holds: Callable[[T], bool], key: Callable[[T], str], size: int, token: str
) -> Page[T]:
    """Cut the same page out of items that stand in the order of ``key``: it costs what it looks at, not all there are."""
    if size < 0:
        raise Invalid("a page has no negative size", code="invalid_page_size")
    start = bisect_right(items, token, key=key) if token else 0
    if size == 0:
        return Page([item for item in items[start:] if holds(item)], "")
    size = min(size, MAX_PAGE)
    found: list[T] = []
    for place in range(start, len(items)):
        if holds(items[place]):
            if len(found) == size:
                return Page(found, key(found[-1]))
            found.append(items[place])
    return Page(found, "")


def entry_token(text: str) -> str:
    """Read the token of a page of entries; raises Invalid."""
    if text and _ENTRY_TOKEN.fullmatch(text) is None:
        raise _bad_token(text)
    return text


def node_token(text: str) -> str:
    """Read the token of a page of nodes; raises Invalid."""
    try:
        return str(SpiffeId(text)) if text else text
    except Invalid:
        raise _bad_token(text) from None


def domain_token(text: str) -> str:
    """Read the token of a page of bundles or relationships; raises Invalid."""
    try:
        return str(TrustDomain(text)) if text else text
    except Invalid:
        raise _bad_token(text) from None


def _bad_token(text: str) -> Invalid:
    return Invalid(f"could not parse token '{text[:64]}'", code="invalid_page_token", hint="give next_page_token back")


def entry_order(entry: Entry) -> str:
    """Give an entry's place in lists, as text: oldest first, then by id."""
    return f"{int(entry.created_at.timestamp()):012d}.{entry.id}"


def node_order(node: Node) -> str:
    """Give a node's place in lists."""
    return str(node.id)
