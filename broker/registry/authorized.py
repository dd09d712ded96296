"""Which entries a node agent may serve: SPIRE's walk from the agent down the parents.

An agent is a parent. So is every node alias whose selectors it has, and so is the SPIFFE ID of every entry that it may
serve. Whether the agent is banned, and what is sent to it, is not known here.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from datetime import datetime
from enum import StrEnum

from broker.registry.entry import SERVER_PATH, Entry
from broker.registry.matching import EntryIndex
from broker.spiffe import Selector, SpiffeId


class Effect(StrEnum):
    """What a change of one entry means for one agent."""

    NONE = "none"
    ADDED = "added"
    CHANGED = "changed"
    REMOVED = "removed"
    RECOMPUTE = "recompute"
    """The change touches a parent or an alias: :meth:`AgentScope.recompute`, then compare."""


class EntryTree:
    """All entries by parent, and the node aliases by selectors. One change costs one entry."""

    __slots__ = ("_aliases", "_children", "_entries")

    def __init__(self, entries: Iterable[Entry] = ()) -> None:
        """File the entries; the later of two with the same id stays."""
        self._entries: dict[str, Entry] = {}
        self._children: dict[SpiffeId, dict[str, Entry]] = {}
        self._aliases = EntryIndex()
        for entry in entries:
            self.add(entry)

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._entries.values())

    def get(self, entry_id: str) -> Entry | None:
        """Give the entry with this id, or None."""
        return self._entries.get(entry_id)

    def add(self, entry: Entry) -> Entry | None:
        """File an entry in the place of the one with its id, which is given back (or None)."""
        replaced = self.remove(entry.id)
        self._entries[entry.id] = entry
        self._children.setdefault(entry.parent_id, {})[entry.id] = entry
        if entry.is_alias:
            self._aliases.add(entry)
        return replaced

    def remove(self, entry_id: str) -> Entry | None:
        """Take the entry with this id out and give it back; None where there is none."""
        entry = self._entries.pop(entry_id, None)
        if entry is None:
            return None
        siblings = self._children[entry.parent_id]
        del siblings[entry_id]
        if not siblings:
            del self._children[entry.parent_id]
        self._aliases.remove(entry_id)
        return entry

    def children(self, parent: SpiffeId) -> Iterable[Entry]:
        """Give the entries directly under a parent."""
        return self._children.get(parent, _NOTHING).values()

    def has_children(self, parent: SpiffeId) -> bool:
        """Tell whether any entry has this parent."""
        return parent in self._children

    def aliases(self, agent_selectors: frozenset[Selector], now: datetime) -> tuple[Entry, ...]:
        """Give the node aliases whose selectors an agent has."""
        return self._aliases.match(agent_selectors, now)


class AgentScope:
    """The ids of the entries that one agent may serve at this moment, kept up to date entry by entry.

    Apply a change to the :class:`EntryTree` first, then here. Leaf entries cost O(1). ``next_change_at`` is the first
    time at which an entry of the walk expires: recompute then, for what hangs below it expires with it.
    """

    __slots__ = ("_ids", "_parents", "agent_id", "agent_selectors", "next_change_at")

    def __init__(
        self, agent_id: SpiffeId, agent_selectors: frozenset[Selector], tree: EntryTree, now: datetime
    ) -> None:
        """Walk the tree for this agent."""
        self.agent_id = agent_id
        self.agent_selectors = agent_selectors
        self.recompute(tree, now)

    def __contains__(self, entry_id: object) -> bool:
        return entry_id in self._ids

    def __len__(self) -> int:
        return len(self._ids)

    def __iter__(self) -> Iterator[str]:
        return iter(self._ids)

    @property
    def ids(self) -> frozenset[str]:
        """The ids of the entries that the agent may serve."""
        return frozenset(self._ids)

    def recompute(self, tree: EntryTree, now: datetime) -> None:
        """Walk the whole tree anew. Expired entries are neither served nor parents."""
        aliases = tree.aliases(self.agent_selectors, now)
        self.next_change_at: datetime | None = None
        self._ids: set[str] = set()
        # How many reasons there are for each parent: the agent, its aliases, and the entries that it serves.
        self._parents: Counter[SpiffeId] = Counter()
        for alias in aliases:
            self._note_expiry(alias)
        waiting = [self.agent_id, *(alias.spiffe_id for alias in aliases)]
        while waiting:
            parent = waiting.pop()
            self._parents[parent] += 1
            # Entries may name each other as parents: each is walked once. Nobody walks down from the server itself.
            if self._parents[parent] > 1 or parent.path == SERVER_PATH:
                continue
            for entry in tree.children(parent):
                if not entry.is_expired(now):
                    self._ids.add(entry.id)
                    self._note_expiry(entry)
                    waiting.append(entry.spiffe_id)

    def apply(self, old: Entry | None, new: Entry | None, tree: EntryTree, now: datetime) -> Effect:
        """Take in one change that the tree has already; tells what to send, or that a walk is needed.

        ``old`` is None for a new entry and ``new`` for a removed one. After RECOMPUTE nothing has been taken in.
        """
        if self._touches_alias(old) or self._touches_alias(new) or self._touches_parent(old, new, tree, now):
            return Effect.RECOMPUTE
        served = new is not None and self._serves(new, now)
        held = old is not None and old.id in self._ids
        if old is not None and held:
            self._ids.remove(old.id)
            self._parents[old.spiffe_id] -= 1
            if not self._parents[old.spiffe_id]:
                # NOTE(security): else an entry that comes later under this ID would be served without a reason.
                del self._parents[old.spiffe_id]
        if new is not None and served:
            self._ids.add(new.id)
            self._parents[new.spiffe_id] += 1
            self._note_expiry(new)
        if held:
            return Effect.CHANGED if served else Effect.REMOVED
        return Effect.ADDED if served else Effect.NONE

    def _serves(self, entry: Entry, now: datetime) -> bool:
        return not entry.is_alias and entry.parent_id in self._parents and not entry.is_expired(now)

    def _touches_alias(self, entry: Entry | None) -> bool:
        return entry is not None and entry.is_alias and entry.selectors <= self.agent_selectors

    def _touches_parent(self, old: Entry | None, new: Entry | None, tree: EntryTree, now: datetime) -> bool:
        if old is not None and new is not None and _stays(old, new) and not new.is_expired(now):
            return False
        held = old is not None and old.id in self._ids and tree.has_children(old.spiffe_id)
        return held or (new is not None and self._serves(new, now) and tree.has_children(new.spiffe_id))

    def _note_expiry(self, entry: Entry) -> None:
        expires = entry.expires_at
        if expires is not None and (self.next_change_at is None or expires < self.next_change_at):
            self.next_change_at = expires


def authorized_ids(
    agent_id: SpiffeId, agent_selectors: frozenset[Selector], entries: Iterable[Entry], now: datetime
) -> frozenset[str]:
    """Give the ids of the entries that an agent may serve, by one walk over all of them."""
    return AgentScope(agent_id, agent_selectors, EntryTree(entries), now).ids


def _stays(old: Entry, new: Entry) -> bool:
    return (old.parent_id, old.spiffe_id, old.expires_at) == (new.parent_id, new.spiffe_id, new.expires_at)


_NOTHING: dict[str, Entry] = {}
