"""What the agent knows of the estate: its entries and the bundles, as the server last told them.

Streams wait on a :class:`Bell`. A bell says that something may concern its listener, never what, and any number of
changes is one ring: however slow a stream is, nothing piles up behind it. Knows no processes and no SVIDs.
"""

import asyncio
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime

from broker.agent.wire import ToldBundle
from broker.registry import Decision, Entry, EntryIndex, Vouched, oldest_of_each_hint
from broker.registry.matching import everything_is_vouched_for
from broker.spiffe import Bundle, BundleSet, Selector, TrustDomain, X509Svid
from broker.spiffe.revocation import NOTHING, read_crls


@dataclass(slots=True, eq=False)
class Bell:
    """Rings when a stream should look again. ``selectors`` None: it hears everything."""

    selectors: frozenset[Selector] | None = None
    _rung: asyncio.Event = field(default_factory=asyncio.Event)

    def ring(self) -> None:
        """Wake the listener, now or at its next wait."""
        self._rung.set()

    async def wait(self, seconds: float | None) -> bool:
        """Wait for a ring, at most so long; give whether it rang. The ring is used up."""
        if not self._rung.is_set():
            try:
                async with asyncio.timeout(seconds):
                    await self._rung.wait()
            except TimeoutError:
                return False
        self._rung.clear()
        return True


class EstateCache:
    """Entries and bundles of this agent. Changed by one writer on the event loop, read by everybody there."""

    def __init__(self, trust_domain: TrustDomain, *, vouched: Vouched = everything_is_vouched_for) -> None:
        """``vouched``: an entry that has no such selector is matched by nobody."""
        self.trust_domain = trust_domain
        self._vouched = vouched
        self.version = 0  # grows with every change
        self.is_synced = False  # whether a whole snapshot has been applied, or taken up, and may be served by
        self.is_partial = False  # whether there may be entries that are not here
        self._index = EntryIndex(vouched=vouched)
        self._bundles = BundleSet()
        self._own: Bundle | None = None
        self._told: dict[TrustDomain, ToldBundle] = {}
        self.crls: tuple[bytes, ...] = ()  # of the own trust domain's X.509 authorities, in DER
        self._bells: set[Bell] = set()
        self._written: dict[tuple[str, TrustDomain], bytes] = {}

    @property
    def bundles(self) -> BundleSet:
        """Every bundle that is known, the trust domain's own included once there is one."""
        return self._bundles

    @property
    def told(self) -> tuple[ToldBundle, ...]:
        """Every bundle, with what the server told of its authorities."""
        return tuple(self._told.values())

    @property
    def entries(self) -> tuple[Entry, ...]:
        """Every entry that is known."""
        return tuple(self._index)

    @property
    def own_bundle(self) -> Bundle | None:
        """The bundle of the agent's own trust domain."""
        return self._own

    def is_tainted(self, authority: object) -> bool:
        """Say whether the server wants nothing signed by this own authority in use."""
        told = self._told.get(self.trust_domain)
        # Nearly always there is none, and a certificate's hash is made of all its fields.
        return told is not None and bool(told.tainted) and authority in told.tainted

    def is_tainted_kid(self, kid: str) -> bool:
        """Say the same of a JWT authority's key ID."""
        told = self._told.get(self.trust_domain)
        return told is not None and kid in told.tainted_kids

    def x509_der(self, bundle: Bundle) -> bytes:
        """Write a bundle's X.509 authorities for the Workload API; written once per change."""
        key = ("x509", bundle.trust_domain)
        if key not in self._written:
            self._written[key] = bundle.x509_der()
        return self._written[key]

    def jwks(self, bundle: Bundle) -> bytes:
        """Write a bundle's JWT authorities for the Workload API; written once per change."""
        key = ("jwt", bundle.trust_domain)
        if key not in self._written:
            self._written[key] = bundle.jwks().encode()
        return self._written[key]

    def entry(self, entry_id: str) -> Entry | None:
        """Find an entry by its id."""
        return self._index.get(entry_id)

    def __len__(self) -> int:
        """How many entries are known."""
        return len(self._index)

    def match(self, selectors: frozenset[Selector], now: datetime, *, are_vouched: bool = False) -> tuple[Entry, ...]:
        """Give the entries a workload with these selectors may hold, oldest first, hints unique.

        ``are_vouched``: as :meth:`broker.registry.EntryIndex.match` has it.
        """
        found = self._index.match(selectors, now, are_vouched=are_vouched)
        return oldest_of_each_hint(entry for entry in found if not _not_for_workloads(entry))

    def explain(self, selectors: frozenset[Selector], now: datetime) -> Decision:
        """Give the same answer with the reasons; linear in the number of entries."""
        decision = self._index.explain(selectors, now)
        served = self.match(selectors, now)
        kept = {entry.id for entry in served}
        considered = tuple(
            replace(each, withheld=_not_for_workloads(each.entry) or "hint_taken")
            if _not_for_workloads(each.entry) or (each.is_issued and each.entry.id not in kept)
            else each
            for each in decision.considered
        )
        return Decision(selectors, served, considered)

    def is_revoked(self, svid: X509Svid) -> bool:
        """Say whether an own SVID is on a revocation list."""
        own = self._own
        return own is not None and own.revoked is not NOTHING and own.revoked.names_any((*svid.chain, svid.authority))

    def replace(self, entries: Iterable[Entry], bundles: Iterable[ToldBundle], crls: Sequence[bytes] = ()) -> None:
        """Put a snapshot in the place of everything; raises InvalidBundle for a revocation list that is none."""
        told = {one.bundle.trust_domain: one for one in bundles}
        known = self._verified_by(told, crls)
        # An entry that is the same stays the same object: what is held by it need not be compared field by field.
        before = self._index
        self._index = EntryIndex(
            (_the_known_one(before.get(entry.id), entry) for entry in entries), vouched=self._vouched
        )
        self._told, self.crls, self._bundles = told, tuple(crls), known
        self.is_synced, self.is_partial = True, False
        self._changed(None)

    def resume(
        self, entries: Iterable[Entry], bundles: Iterable[ToldBundle], crls: Sequence[bytes] = (), *, is_partial: bool
    ) -> None:
        """Take up what an earlier run was told, until there is a snapshot; raises as :meth:`replace` does."""
        self.replace(entries, bundles, crls)
        self.is_partial = is_partial

    def suspend(self) -> None:
        """Serve nobody for now: the server's word is too old."""
        self.is_synced = False
        self._changed(None)

    def unsuspend(self) -> None:
        """Serve again: the server has been heard, and what is held is what it says."""
        self.is_synced = True
        self._changed(None)

    def apply(
        self,
        *,
        upserted: Iterable[Entry] = (),
        deleted: Iterable[str] = (),
        bundles: Iterable[ToldBundle] = (),
        deleted_bundles: Iterable[TrustDomain] = (),
        crls: Sequence[bytes] | None = None,
    ) -> None:
        """Apply a delta; ``crls`` None: as before. The own trust domain's bundle cannot be deleted.

        Raises InvalidBundle for a revocation list that is none; then nothing of the bundles is changed.
        """
        touched: list[Entry] = []
        for entry in upserted:
            touched.append(entry)
            if (replaced := self._index.add(entry)) is not None:
                touched.append(replaced)
        touched += filter(None, map(self._index.remove, deleted))
        now_told, now_crls = dict(self._told), self.crls if crls is None else tuple(crls)
        for told in bundles:
            now_told[told.bundle.trust_domain] = told
        for name in deleted_bundles:
            if name != self.trust_domain:
                now_told.pop(name, None)
        if (now_told, now_crls) != (self._told, self.crls):
            self._bundles = self._verified_by(now_told, now_crls)
            self._told, self.crls = now_told, now_crls
            self._changed(None)
        elif touched:
            self._changed(touched)

    def start_with(self, bundle: Bundle) -> None:
        """Know the own bundle before the first snapshot."""
        self._told[self.trust_domain] = ToldBundle(bundle, frozenset(), frozenset())
        self._bundles = self._verified_by(self._told, self.crls)
        self._changed(None)

    def withdraw(self) -> None:
        """Forget every entry: this agent may serve nobody. Bundles stay."""
        self._index = EntryIndex(vouched=self._vouched)
        self._changed(None)

    def ring_all(self) -> None:
        """Have every listener look again, for instance because the wall clock was stepped."""
        for bell in self._bells:
            bell.ring()

    @contextmanager
    def listening(self, selectors: frozenset[Selector] | None = None) -> Iterator[Bell]:
        """Listen to changes of bundles and of those entries that these selectors earn (None: of all)."""
        bell = Bell(selectors)
        self._bells.add(bell)
        try:
            yield bell
        finally:
            self._bells.discard(bell)

    def _verified_by(self, told: Mapping[TrustDomain, ToldBundle], crls: Sequence[bytes]) -> BundleSet:
        """Give the bundles, the own one with what its authorities took back."""
        bundles = BundleSet(one.bundle for one in told.values())
        own = bundles.get(self.trust_domain)
        if own is None or not crls:
            return bundles
        return bundles.with_bundle(own.with_revoked(read_crls(crls, own.x509_authorities)))

    def _changed(self, entries: list[Entry] | None) -> None:
        self.version += 1
        self._own = self._bundles.get(self.trust_domain)
        if entries is None:
            self._written.clear()
        for bell in self._bells:
            if entries is None or bell.selectors is None or _earns_any(bell.selectors, entries):
                bell.ring()


def _not_for_workloads(entry: Entry) -> str:
    """Give the code of the reason why an entry is not for the Workload API, or ""."""
    if entry.is_alias:
        return "names_nodes"
    return "store_svid" if entry.store_svid else ""


def _earns_any(selectors: frozenset[Selector], entries: list[Entry]) -> bool:
    return any(entry.selectors <= selectors for entry in entries)


def _the_known_one(known: Entry | None, told: Entry) -> Entry:
    return known if known is not None and known == told else told
