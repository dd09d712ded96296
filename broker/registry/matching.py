"""Which entries a set of selectors earns: all of an entry's selectors must be among the caller's.

Two faces of one rule. :func:`match` looks at every entry and keeps the reasons; :class:`EntryIndex` gives the same
answer fast and without them. An entry that nobody but the workload itself vouches for is never issued. Where selectors come
from, who vouches for them, and what is done with an entry, is not known here.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime

from broker.errors import NoIdentity
from broker.registry.entry import Entry
from broker.spiffe import Selector

Vouched = Callable[[Selector], bool]
"""Tells whether somebody other than the workload stands behind a selector."""


def everything_is_vouched_for(selector: Selector) -> bool:
    """Say yes: for rules that know no attestors."""
    del selector
    return True


@dataclass(frozen=True, slots=True)
class Considered:
    """One entry that was looked at, and what spoke against it.

    ``unvouched``: nobody but the workload stands behind any of its selectors. ``withheld``: a code; it matches, but its
    user does not serve it here.
    """

    entry: Entry
    missing: frozenset[Selector]
    expired: bool
    unvouched: bool = False
    withheld: str = ""

    @property
    def is_issued(self) -> bool:
        """Tell whether nothing spoke against it."""
        return not (self.missing or self.expired or self.unvouched or self.withheld)


@dataclass(frozen=True, slots=True)
class Decision:
    """What a set of selectors earns, with the reasons; ``issued`` and ``considered`` are oldest first."""

    selectors: frozenset[Selector]
    issued: tuple[Entry, ...]
    considered: tuple[Considered, ...]

    def require(self) -> tuple[Entry, ...]:
        """Give the entries that match; raises NoIdentity where none does, always in the same words."""
        if not self.issued:
            raise NoIdentity("no identity issued")
        return self.issued

    @property
    def refused(self) -> tuple[Considered, ...]:
        """The entries that do not match, nearest first: fewest missing selectors, then oldest."""
        against = [each for each in self.considered if not each.is_issued]
        return tuple(sorted(against, key=lambda each: (len(each.missing), each.entry.age_key)))


def match(
    entries: Iterable[Entry],
    selectors: frozenset[Selector],
    now: datetime,
    vouched: Vouched = everything_is_vouched_for,
) -> Decision:
    """Judge every entry against the selectors; the definition, linear in the number of entries."""
    return _judged(entries, selectors, now, lambda entry: is_unvouched(entry, vouched))


def _judged(
    entries: Iterable[Entry], selectors: frozenset[Selector], now: datetime, unvouched: Callable[[Entry], bool]
) -> Decision:
    considered = tuple(
        Considered(entry, entry.selectors - selectors, entry.is_expired(now), unvouched(entry))
        for entry in sorted(entries, key=lambda entry: entry.age_key)
    )
    return Decision(selectors, tuple(each.entry for each in considered if each.is_issued), considered)


def is_unvouched(entry: Entry, vouched: Vouched) -> bool:
    """Tell whether all selectors of the entry are the workload's own word: anybody could claim them."""
    return not any(map(vouched, entry.selectors))


def oldest_of_each_hint(entries: Iterable[Entry]) -> tuple[Entry, ...]:
    """Drop every entry whose non-empty hint an older one has already: hints in one answer are unique (Workload API)."""
    seen: set[str] = set()
    kept: list[Entry] = []
    for entry in sorted(entries, key=lambda entry: entry.age_key):
        if entry.hint not in seen:
            kept.append(entry)
            # No hint is not a name: any number of entries may have none.
            seen.update({entry.hint} - {""})
    return tuple(kept)


class EntryIndex:
    """Entries filed for matching. Adding and removing one costs the number of its selectors, not of the entries.

    An entry can only match a caller who has every one of its selectors, so it is filed under a single one: the one
    that the fewest entries had when it came. Not for use by several threads at once.
    """

    __slots__ = ("_by_selector", "_entries", "_frequency", "_unvouched", "_vouched")

    def __init__(self, entries: Iterable[Entry] = (), *, vouched: Vouched = everything_is_vouched_for) -> None:
        """File the entries; the later of two with the same id stays."""
        self._vouched = vouched
        self._unvouched: set[str] = set()
        # Texts, not selectors: their hash is kept, and sets of them are compared without calling Python.
        self._by_selector: dict[str, dict[str, frozenset[str]]] = {}
        self._entries: dict[str, tuple[Entry, str]] = {}
        self._frequency: Counter[str] = Counter()
        for entry in entries:
            self.add(entry)

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Entry]:
        return (entry for entry, _ in self._entries.values())

    def __contains__(self, entry_id: object) -> bool:
        return entry_id in self._entries

    def get(self, entry_id: str) -> Entry | None:
        """Give the entry with this id, or None."""
        found = self._entries.get(entry_id)
        return None if found is None else found[0]

    def add(self, entry: Entry) -> Entry | None:
        """File an entry in the place of the one with its id, which is given back (or None)."""
        replaced = self.remove(entry.id)
        needed = frozenset(map(str, entry.selectors))
        # By text on a tie, so that the same entries are always filed the same way.
        key = min(needed, key=lambda text: (self._frequency[text], text))
        self._frequency.update(needed)
        self._by_selector.setdefault(key, {})[entry.id] = needed
        self._entries[entry.id] = (entry, key)
        if is_unvouched(entry, self._vouched):
            self._unvouched.add(entry.id)
        return replaced

    def remove(self, entry_id: str) -> Entry | None:
        """Take the entry with this id out and give it back; None where there is none."""
        found = self._entries.pop(entry_id, None)
        if found is None:
            return None
        entry, key = found
        self._unvouched.discard(entry_id)
        filed = self._by_selector[key]
        for text in filed.pop(entry_id):
            self._frequency[text] -= 1
            if not self._frequency[text]:
                del self._frequency[text]
        if not filed:
            del self._by_selector[key]
        return entry

    def match(self, selectors: frozenset[Selector], now: datetime, *, are_vouched: bool = False) -> tuple[Entry, ...]:
        """Give the entries that the selectors earn, oldest first: what :func:`match` calls ``issued``.

        ``are_vouched``: somebody whom the operator trusts for it stands for the selectors, whatever their kind.
        """
        held = frozenset(map(str, selectors))
        issued = [
            self._entries[entry_id][0]
            for text in held
            for entry_id, needed in self._by_selector.get(text, _NOTHING).items()
            if needed <= held and (are_vouched or entry_id not in self._unvouched)
        ]
        return tuple(sorted((entry for entry in issued if not entry.is_expired(now)), key=lambda entry: entry.age_key))

    def explain(self, selectors: frozenset[Selector], now: datetime) -> Decision:
        """Judge every entry, with the reasons; linear in their number."""
        return _judged(self, selectors, now, lambda entry: entry.id in self._unvouched)


_NOTHING: dict[str, frozenset[str]] = {}
