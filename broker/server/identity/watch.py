"""What an agent is told, as it happens: a snapshot or what changed since its cursor, then every change.

A stream holds no queue of changes but the set of entries that were touched and not yet told: a slow agent gets the newest
state of each, once, however much happened. Beyond a bound it starts again from a snapshot. Knows no wire.
"""

import asyncio
from collections.abc import AsyncGenerator, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from broker.registry.entry import Entry
from broker.server.authority.authorities import Authorities
from broker.server.identity.bundles import Bundles, PublishedBundle
from broker.server.identity.changes import ENTRY_KIND, NODE_KIND
from broker.server.identity.directory import Directory, Remembered
from broker.server.store.ports import Store
from broker.spiffe import SpiffeId

HEARTBEAT: Final = 5.0
"""Seconds of silence after which a stream says that it lives, with its cursor."""
PAGE: Final = 500
"""Entries of one message: it stays below gRPC's 4 MiB with room for long ones."""
MAX_PENDING: Final = 5_000
"""Touched entries that a stream holds for a slow agent; with more, a snapshot is no dearer."""
MAX_CATCH_UP: Final = 1_000
"""Changes that are looked up in the store for an agent that comes back after a restart."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A page of everything; the last one has ``more`` off."""

    seq: int
    entries: Sequence[Entry]
    bundles: Sequence[PublishedBundle]
    more: bool


@dataclass(frozen=True, slots=True)
class Delta:
    """What is new since the message before."""

    seq: int
    upserted: Sequence[Entry]
    deleted_ids: Sequence[str]
    bundles: Sequence[PublishedBundle]
    more: bool = False


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """Nothing is new."""

    seq: int


Update = Snapshot | Delta | Heartbeat


class _Subscription:
    """What one stream has yet to tell."""

    def __init__(self) -> None:
        self.touched_ids: set[str] = set()
        self.has_bundle = False
        self.is_upset = False
        self.told = 0
        self.wake = asyncio.Event()

    def touched(self, entry_ids: Iterable[str]) -> None:
        """Note entries whose newest state is to be told."""
        self.touched_ids.update(entry_ids)
        if len(self.touched_ids) > MAX_PENDING:
            self.upset()
        self.wake.set()

    def upset(self) -> None:
        """Note that only a snapshot will do."""
        self.is_upset = True
        self.touched_ids.clear()
        self.wake.set()

    def bundle_changed(self) -> None:
        """Note a new bundle."""
        self.has_bundle = True
        self.wake.set()


class Watch:
    """The streams of all agents."""

    def __init__(self, store: Store, directory: Directory, authorities: Authorities, bundles: Bundles) -> None:
        self._store = store
        self._directory = directory
        self._bundles = bundles
        self._subscriptions: set[_Subscription] = set()
        authorities.subscribe(self._on_authorities)

    @property
    def streams(self) -> int:
        """How many agents are following."""
        return len(self._subscriptions)

    async def follow(self, agent_id: SpiffeId, cursor: int, store_id: str) -> AsyncGenerator[Update, None]:
        """Tell one agent everything, for the life of the stream. The cursor counts only with this store's id."""
        subscription = _Subscription()
        stop = self._directory.follow(agent_id, subscription)
        self._subscriptions.add(subscription)
        try:
            missed = await self._missed(agent_id, cursor) if cursor and store_id == self._store.id else None
            if missed is None:
                subscription.upset()
            else:
                subscription.told = cursor
                subscription.touched(missed)
                # A bundle may have changed in the meantime: it is small, so it is always told.
                subscription.bundle_changed()
            while True:
                for update in self._take(agent_id, subscription):
                    yield update
                if not await _woken(subscription.wake):
                    yield Heartbeat(self._directory.seq)
        finally:
            self._subscriptions.discard(subscription)
            stop()

    def _on_authorities(self) -> None:
        for subscription in self._subscriptions:
            subscription.bundle_changed()

    def _take(self, agent_id: SpiffeId, subscription: _Subscription) -> Iterable[Update]:
        if not subscription.wake.is_set():
            return ()
        subscription.wake.clear()
        touched, subscription.touched_ids = subscription.touched_ids, set()
        has_bundle, subscription.has_bundle = subscription.has_bundle, False
        is_upset, subscription.is_upset = subscription.is_upset, False
        before, subscription.told = subscription.told, self._directory.seq
        if is_upset:
            return self._snapshot(agent_id)
        return self._delta(agent_id, touched, before, has_bundle=has_bundle)

    def _snapshot(self, agent_id: SpiffeId) -> Iterable[Update]:
        seq, entries, bundle = self._directory.seq, self._directory.authorized(agent_id), self._bundles.own()
        starts = range(0, len(entries), PAGE) or range(1)
        return [
            Snapshot(seq, entries[start : start + PAGE], (bundle,) if start == 0 else (), start != starts[-1])
            for start in starts
        ]

    def _delta(self, agent_id: SpiffeId, touched: set[str], before: int, *, has_bundle: bool) -> Iterable[Update]:
        scope = self._directory.scope(agent_id)
        upserted = [entry for entry_id in touched if entry_id in scope and (entry := self._directory.entry(entry_id))]
        there = {entry.id for entry in upserted}
        deleted = [entry_id for entry_id in touched if entry_id not in there]
        seq, bundles = self._directory.seq, (self._bundles.own(),) if has_bundle else ()
        if not upserted and not deleted and not bundles:
            return ()
        pages = range(0, len(upserted), PAGE) or range(1)
        # The cursor moves with the last page only: a stream that breaks in between is resumed from before all of them.
        return [
            Delta(
                seq if start == pages[-1] else before,
                upserted[start : start + PAGE],
                deleted if start == 0 else (),
                bundles if start == 0 else (),
            )
            for start in pages
        ]

    async def _missed(self, agent_id: SpiffeId, cursor: int) -> list[str] | None:
        remembered = self._directory.since(agent_id, cursor)
        if remembered is not None:
            return _relevant(remembered, self._directory.scope(agent_id).ids, self._parents(agent_id))
        head = self._directory.seq
        if cursor > head:
            return None
        changes = await self._store.read(lambda reader: reader.changes_since(cursor, MAX_CATCH_UP))
        # After a restart the old state of entries is not known here; but if none changed, nothing was missed.
        if changes is None or len(changes) == MAX_CATCH_UP:
            return None
        return None if any(change.kind in (ENTRY_KIND, NODE_KIND) for change in changes) else []

    def _parents(self, agent_id: SpiffeId) -> set[SpiffeId]:
        return {agent_id, *(entry.spiffe_id for entry in self._directory.authorized(agent_id))}


def _relevant(changes: Iterable[Remembered], scope: frozenset[str], parents: set[SpiffeId]) -> list[str]:
    # An entry that the agent cannot have held is none of its business, not even its id.
    return [
        change.entry_id
        for change in changes
        if change.entry_id in scope or (change.old is not None and change.old.parent_id in parents)
    ]


async def _woken(event: asyncio.Event) -> bool:
    try:
        async with asyncio.timeout(HEARTBEAT):
            await event.wait()
    except TimeoutError:
        return False
    return True
