"""Entries and nodes in memory, fed by the change log: what every hot path asks instead of the store.

A change costs one entry, and each agent that is being followed O(1). It is applied on the event loop before the write
that made it returns, so whoever got an answer finds it here. Knows no wire and no stream: followers are told ids.
"""

import heapq
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final, Protocol

from broker.clock import Clock
from broker.registry.authorized import AgentScope, Effect, EntryTree
from broker.registry.entry import Entry
from broker.server.identity.changes import ENTRY_KIND, GONE, NODE_KIND, entry_of, node_of
from broker.server.identity.filters import entry_order
from broker.server.store.ports import Reader, Store
from broker.server.store.rows import Change, Node
from broker.spiffe import SpiffeId

MEMORY: Final = 10_000
"""Changes that are remembered for agents that come back: minutes of a busy server, a few megabytes."""


class Follower(Protocol):
    """Whoever wants to know what changes for one agent. Called on the event loop; must not block."""

    def touched(self, entry_ids: Iterable[str]) -> None:
        """These entries came, changed or went, as far as this agent is concerned."""
        ...

    def upset(self) -> None:
        """Everything may have changed: start again."""
        ...


@dataclass(frozen=True, slots=True)
class Remembered:
    """A past change of an entry; ``structural``: others hang on it, so its effect cannot be told from it alone."""

    seq: int
    entry_id: str
    old: Entry | None
    structural: bool


@dataclass(frozen=True, slots=True)
class _NodeChange:
    seq: int
    agent_id: SpiffeId


class Directory:
    """The registry of this moment."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._tree = EntryTree()
        self._privileged: dict[SpiffeId, dict[str, Entry]] = {}
        self._ends: list[tuple[datetime, str]] = []
        self._ordered: list[Entry] | None = None
        self._nodes: dict[SpiffeId, Node] = {}
        self._scopes: dict[SpiffeId, AgentScope] = {}
        self._followers: dict[SpiffeId, set[Follower]] = {}
        self._memory: deque[Remembered | _NodeChange] = deque(maxlen=MEMORY)
        self._remembers_from = 0
        self._seq = 0
        self._node_listeners: list[Callable[[SpiffeId, Node | None], None]] = []

    @property
    def seq(self) -> int:
        """The last change that was applied, of any kind."""
        return self._seq

    def __len__(self) -> int:
        return len(self._tree)

    @property
    def node_count(self) -> int:
        """How many nodes there are."""
        return len(self._nodes)

    async def load(self, store: Store) -> None:
        """Take a snapshot, then follow the change log without a gap between the two."""
        early: list[Change] = []
        stop = store.subscribe(early.extend)
        entries, nodes, head = await store.read(_snapshot)
        self._tree = EntryTree(entries)
        for entry in entries:
            self._note_special(None, entry)
        self._nodes = {node.id: node for node in nodes}
        self._seq = self._remembers_from = head
        stop()
        self.apply([change for change in early if change.seq > head])
        store.subscribe(self.apply)

    # ---- questions

    def entry(self, entry_id: str) -> Entry | None:
        """Give one entry, or None."""
        return self._tree.get(entry_id)

    def entries(self) -> Iterable[Entry]:
        """Give all entries, in no order."""
        return self._tree

    def in_order(self) -> Sequence[Entry]:
        """Give all entries, oldest first. Sorted when asked for after a change; not to be kept."""
        if self._ordered is None:
            self._ordered = sorted(self._tree, key=entry_order)
        return self._ordered

    def expired(self, limit: int) -> list[str]:
        """Give the ids of entries whose own time is over and that are still there, the longest over first.

        Costs what is over, however many have an end.
        """
        now = self._clock.now()
        over: dict[tuple[datetime, str], None] = {}
        while self._ends and self._ends[0][0] <= now and len(over) < limit:
            end = heapq.heappop(self._ends)
            entry = self._tree.get(end[1])
            # Of an entry whose end was moved, the old one is still in the heap.
            if entry is not None and entry.expires_at == end[0]:
                over[end] = None
        # They stay until their deletion is seen: it may fail.
        for end in over:
            heapq.heappush(self._ends, end)
        return [entry_id for _, entry_id in over]

    def children(self, parent: SpiffeId) -> tuple[str, ...]:
        """Give the ids of the entries directly under a parent."""
        return tuple(entry.id for entry in self._tree.children(parent))

    def node(self, agent_id: SpiffeId) -> Node | None:
        """Give one node, or None."""
        return self._nodes.get(agent_id)

    def nodes(self) -> Iterable[Node]:
        """Give all nodes, in no order."""
        return self._nodes.values()

    def authorized(self, agent_id: SpiffeId) -> list[Entry]:
        """Give the entries that an agent may serve now, oldest first."""
        found = [entry for entry_id in self.scope(agent_id) if (entry := self._tree.get(entry_id)) is not None]
        return sorted(found, key=lambda entry: entry.age_key)

    def authorized_entry(self, agent_id: SpiffeId, entry_id: str) -> Entry | None:
        """Give an entry if this agent may serve it now, else None."""
        return self._tree.get(entry_id) if entry_id in self.scope(agent_id) else None

    def scope(self, agent_id: SpiffeId) -> AgentScope:
        """Give what an agent may serve now; nothing for an agent that is not known."""
        now = self._clock.now()
        scope = self._scopes.get(agent_id)
        if scope is not None:
            if scope.next_change_at is not None and scope.next_change_at <= now:
                self._recompute(scope, now)
            return scope
        node = self._nodes.get(agent_id)
        if node is None:
            return AgentScope(agent_id, frozenset(), EntryTree(), now)
        return self._scopes.setdefault(agent_id, AgentScope(agent_id, node.selectors, self._tree, now))

    def privileges(self, spiffe_id: SpiffeId) -> tuple[bool, bool]:
        """Tell whether an ID has an entry that makes it admin, and one that makes it downstream."""
        now = self._clock.now()
        valid = [entry for entry in self._privileged.get(spiffe_id, {}).values() if not entry.is_expired(now)]
        return any(entry.admin for entry in valid), any(entry.downstream for entry in valid)

    def since(self, agent_id: SpiffeId, cursor: int) -> list[Remembered] | None:
        """Give the entry changes after a cursor; None when only a snapshot will do."""
        if not self._remembers_from <= cursor <= self._seq:
            return None
        changes: list[Remembered] = []
        for change in reversed(self._memory):
            if change.seq <= cursor:
                break
            if isinstance(change, _NodeChange):
                if change.agent_id == agent_id:
                    return None
            elif change.structural:
                return None
            else:
                changes.append(change)
        return changes

    # ---- followers

    def follow(self, agent_id: SpiffeId, follower: Follower) -> Callable[[], None]:
        """Tell a follower what changes for an agent; gives the function that ends it."""
        self.scope(agent_id)
        self._followers.setdefault(agent_id, set()).add(follower)

        def stop() -> None:
            followers = self._followers.get(agent_id, set())
            followers.discard(follower)
            if not followers:
                self._followers.pop(agent_id, None)
                # A scope that nobody follows would still cost at every change.
                self._scopes.pop(agent_id, None)

        return stop

    def on_node(self, listener: Callable[[SpiffeId, Node | None], None]) -> None:
        """Call after each change of a node, on the event loop, with the node or None when it is gone."""
        self._node_listeners.append(listener)

    # ---- changes

    def apply(self, changes: Sequence[Change]) -> None:
        """Take in committed changes, in order."""
        for change in changes:
            if change.kind == ENTRY_KIND:
                self._apply_entry(change)
            elif change.kind == NODE_KIND:
                self._apply_node(change)
            self._seq = change.seq

    def _apply_entry(self, change: Change) -> None:
        new = None if change.body == GONE else entry_of(change.body)
        old = self._tree.remove(change.key) if new is None else self._tree.add(new)
        self._note_special(old, new)
        self._remember(Remembered(change.seq, change.key, old, self._is_structural(old, new)))
        now = self._clock.now()
        for agent_id, scope in self._scopes.items():
            touched = self._effect(scope, old, new, now)
            if touched:
                self._tell(agent_id, touched)

    def _effect(self, scope: AgentScope, old: Entry | None, new: Entry | None, now: datetime) -> Iterable[str]:
        changed = {entry.id for entry in (old, new) if entry is not None}
        effect = scope.apply(old, new, self._tree, now)
        if effect is Effect.RECOMPUTE:
            before = scope.ids
            scope.recompute(self._tree, now)
            return (before ^ scope.ids) | changed
        if effect is Effect.NONE and not (new is None and old is not None and old.expires_at is not None):
            return ()
        # One that had expired before left the scope by itself, perhaps while the agent was away: say it again.
        return changed

    def _apply_node(self, change: Change) -> None:
        agent_id = SpiffeId(change.key)
        node = None if change.body == GONE else node_of(change.body)
        before = self._nodes.pop(agent_id, None)
        if node is not None:
            self._nodes[agent_id] = node
        self._remember(_NodeChange(change.seq, agent_id))
        if (before and before.selectors) != (node and node.selectors):
            self._scopes.pop(agent_id, None)
            for follower in tuple(self._followers.get(agent_id, ())):
                follower.upset()
        for listener in self._node_listeners:
            listener(agent_id, node)

    def _recompute(self, scope: AgentScope, now: datetime) -> None:
        before = scope.ids
        scope.recompute(self._tree, now)
        self._tell(scope.agent_id, before ^ scope.ids)

    def _tell(self, agent_id: SpiffeId, entry_ids: Iterable[str]) -> None:
        for follower in tuple(self._followers.get(agent_id, ())):
            follower.touched(entry_ids)

    def _remember(self, change: Remembered | _NodeChange) -> None:
        if len(self._memory) == MEMORY:
            self._remembers_from = self._memory[0].seq
        self._memory.append(change)

    def _is_structural(self, old: Entry | None, new: Entry | None) -> bool:
        return any(
            entry is not None and (entry.is_alias or self._tree.has_children(entry.spiffe_id)) for entry in (old, new)
        )

    def _note_special(self, old: Entry | None, new: Entry | None) -> None:
        if old is not None and (old.admin or old.downstream):
            held = self._privileged.get(old.spiffe_id, {})
            held.pop(old.id, None)
            if not held:
                self._privileged.pop(old.spiffe_id, None)
        if new is not None and (new.admin or new.downstream):
            self._privileged.setdefault(new.spiffe_id, {})[new.id] = new
        self._ordered = None
        if new is not None and new.expires_at is not None and (old is None or old.expires_at != new.expires_at):
            heapq.heappush(self._ends, (new.expires_at, new.id))
            if len(self._ends) > 2 * len(self._tree) + MEMORY:
                # Ends that were moved again and again: keep those that still are.
                self._ends = [(e.expires_at, e.id) for e in self._tree if e.expires_at is not None]
                heapq.heapify(self._ends)


def _snapshot(reader: Reader) -> tuple[tuple[Entry, ...], tuple[Node, ...], int]:
    return reader.entries(), reader.nodes(), reader.change_head()
