"""What an agent is told, as it happens: a snapshot or what changed since its cursor, then every change.

A stream holds no queue of changes but the set of entries that were touched and not yet told: a slow agent gets the newest
state of each, once, however much happened. Beyond a bound it starts again from a snapshot. Knows no wire.
"""

import asyncio
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from broker.registry.entry import Entry
from broker.server.authority.authorities import Authorities
from broker.server.authority.crl_publisher import CrlPublisher
from broker.server.identity.bundles import Bundles, PublishedBundle
from broker.server.identity.changes import ENTRY_KIND, NODE_KIND
from broker.server.identity.directory import Directory, Remembered
from broker.server.identity.federated import BUNDLE_KIND, Federated
from broker.server.store.ports import Store
from broker.spiffe import SpiffeId, TrustDomain

HEARTBEAT: Final = 5.0
"""Seconds of silence after which a stream says that it lives, with its cursor."""
PAGE: Final = 500
"""Entries of one message: it stays below gRPC's 4 MiB with room for long ones."""
SMALL_LISTS: Final = 256 * 1024
"""Bytes of revocation lists that travel with the bundle; longer ones have a message of their own, so that none outgrows it."""
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
    crls: Sequence[bytes] | None = None


@dataclass(frozen=True, slots=True)
class Delta:
    """What is new since the message before."""

    seq: int
    upserted: Sequence[Entry]
    deleted_ids: Sequence[str]
    bundles: Sequence[PublishedBundle]
    deleted_bundles: Sequence[TrustDomain] = ()
    more: bool = False
    crls: Sequence[bytes] | None = None


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
        self.federating: dict[str, frozenset[TrustDomain]] = {}
        self.told_bundles: Mapping[TrustDomain, PublishedBundle | None] = {}
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
        """Note a new bundle of the own trust domain."""
        self.has_bundle = True
        self.wake.set()

    def federated_changed(self, trust_domain: TrustDomain) -> None:
        """Note that the bundle of another trust domain came, changed or went; it may be none of this stream's business."""
        if trust_domain in self.told_bundles or any(trust_domain in one for one in self.federating.values()):
            self.wake.set()

    def federates(self, entry_id: str, entry: Entry | None) -> None:
        """Note which trust domains an entry of this stream federates with; None: it is not, or no longer, here."""
        if entry is None or not entry.federates_with:
            self.federating.pop(entry_id, None)
        else:
            self.federating[entry_id] = entry.federates_with


class Watch:
    """The streams of all agents."""

    def __init__(
        self,
        store: Store,
        directory: Directory,
        authorities: Authorities,
        bundles: Bundles,
        federated: Federated,
        *,
        crls: CrlPublisher | None = None,
    ) -> None:
        self._store = store
        self._directory = directory
        self._bundles = bundles
        self._federated = federated
        self._subscriptions: set[_Subscription] = set()
        self._crls = crls
        authorities.subscribe(self._on_authorities)
        federated.subscribe(self._on_federated)
        if crls is not None:
            crls.subscribe(self._on_authorities)

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
                for entry in self._directory.authorized(agent_id):
                    subscription.federates(entry.id, entry)
                # Which of the others' bundles it holds is not known: it is told anew what it needs, and to drop the rest.
                subscription.told_bundles = dict.fromkeys(self._federated.bundles)
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

    def _on_federated(self, kind: str, trust_domain: TrustDomain) -> None:
        if kind == BUNDLE_KIND:
            for subscription in self._subscriptions:
                subscription.federated_changed(trust_domain)

    def _take(self, agent_id: SpiffeId, subscription: _Subscription) -> Iterable[Update]:
        if not subscription.wake.is_set():
            return ()
        subscription.wake.clear()
        touched, subscription.touched_ids = subscription.touched_ids, set()
        has_bundle, subscription.has_bundle = subscription.has_bundle, False
        is_upset, subscription.is_upset = subscription.is_upset, False
        before, subscription.told = subscription.told, self._directory.seq
        if is_upset:
            return self._snapshot(agent_id, subscription)
        own = (self._bundles.own(),) if has_bundle else ()
        return self._delta(agent_id, subscription, touched, before, own)

    def _snapshot(self, agent_id: SpiffeId, subscription: _Subscription) -> Iterable[Update]:
        seq, entries = self._directory.seq, self._directory.authorized(agent_id)
        subscription.federating.clear()
        subscription.told_bundles = {}
        for entry in entries:
            subscription.federates(entry.id, entry)
        bundles = [(self._bundles.own(),), *((one,) for one in self._wanted_bundles(subscription))]
        starts = range(0, len(entries), PAGE) or range(1)
        pages = [entries[start : start + PAGE] for start in starts]
        # A bundle may be large: each of the others has a page of its own, so that none outgrows a message.
        pages = [*([] for _ in bundles[1:]), *pages]
        told = [*bundles, *(() for _ in pages[len(bundles) :])]
        snapshots = [
            Snapshot(seq, page, with_it, number != len(pages) - 1)
            for number, (page, with_it) in enumerate(zip(pages, told, strict=True))
        ]
        lists = self._lists()
        if lists is not None and _are_small(lists):
            snapshots[0] = replace(snapshots[0], crls=lists)
        elif lists is not None:
            snapshots.insert(0, Snapshot(seq, (), (), True, lists))
        return snapshots

    def _wanted_bundles(self, subscription: _Subscription) -> list[PublishedBundle]:
        """Give the bundles that are new for a stream, and note them as told; nothing but what its entries federate with."""
        names = frozenset[TrustDomain]().union(*subscription.federating.values())
        known = self._federated.bundles
        wanted = {name: known[name] for name in sorted(names) if name in known}
        fresh = [bundle for name, bundle in wanted.items() if subscription.told_bundles.get(name) is not bundle]
        subscription.told_bundles = wanted
        return fresh

    def _delta(
        self,
        agent_id: SpiffeId,
        subscription: _Subscription,
        touched: set[str],
        before: int,
        own: Sequence[PublishedBundle],
    ) -> Iterable[Update]:
        scope = self._directory.scope(agent_id)
        upserted = [entry for entry_id in touched if entry_id in scope and (entry := self._directory.entry(entry_id))]
        there = {entry.id for entry in upserted}
        deleted = [entry_id for entry_id in touched if entry_id not in there]
        for entry_id in deleted:
            subscription.federates(entry_id, None)
        for entry in upserted:
            subscription.federates(entry.id, entry)
        held = frozenset(subscription.told_bundles)
        fresh = self._wanted_bundles(subscription)
        withdrawn = sorted(held - frozenset(subscription.told_bundles))
        # Bundles first, each in a message of its own: what an entry federates with is there when the entry comes.
        deltas = [Delta(before, (), (), (bundle,)) for bundle in fresh]
        if upserted or deleted or own or withdrawn:
            rest = [upserted[start : start + PAGE] for start in range(0, len(upserted), PAGE)] or [[]]
            deltas.append(Delta(before, rest[0], deleted, own, withdrawn))
            deltas += [Delta(before, page, (), ()) for page in rest[1:]]
        lists = self._lists() if own else None
        if lists is not None and _are_small(lists):
            # In the message of the bundle under which they are read.
            deltas = [replace(one, crls=lists) if one.bundles == own else one for one in deltas]
        if deltas:
            # The cursor moves with the last page only: a stream that breaks in between is resumed from before all of them.
            deltas[-1] = replace(deltas[-1], seq=self._directory.seq)
        if lists is not None and not _are_small(lists):
            deltas.append(Delta(self._directory.seq, (), (), (), crls=lists))
        return deltas

    def _lists(self) -> Sequence[bytes] | None:
        return None if self._crls is None else self._crls.crls

    async def _missed(self, agent_id: SpiffeId, cursor: int) -> list[str] | None:
        if self._federated.withdrew_after(cursor):
            # What the agent was told of bundles by another stream is not known here: a snapshot withdraws what is gone.
            return None
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
        return None if any(change.kind in (ENTRY_KIND, NODE_KIND, BUNDLE_KIND) for change in changes) else []

    def _parents(self, agent_id: SpiffeId) -> set[SpiffeId]:
        return {agent_id, *(entry.spiffe_id for entry in self._directory.authorized(agent_id))}


def _are_small(lists: Sequence[bytes]) -> bool:
    return sum(map(len, lists)) <= SMALL_LISTS


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
