"""One signed spare for each entry that was lately used on this node: the next process is answered at once.

It is handed to one new session, then replaced. While the server is away a new session may share it, which is marked, reported
to nobody, and replaced when the server is back. An entry may say that it wants no spare (SPIRE's additional attributes).
"""

import asyncio
from collections.abc import Callable, Coroutine, Iterable
from contextlib import suppress
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any, Final

from broker.agent.cache import EstateCache
from broker.agent.estate_file import KeptSpare
from broker.agent.holdings import X509Holding
from broker.agent.signing import Signing
from broker.clock import Clock
from broker.errors import BrokerError, InvalidSvid
from broker.registry import Entry
from broker.telemetry.log import get_logger

UNUSED: Final = timedelta(hours=24)  # an entry that nobody used for so long gets no spare any more
MAX_SPARES: Final = 1000  # keys and chains in memory, some 4 KiB each
REFILL_PAUSE: Final = 0.01  # seconds before the next spare is asked for
MAINTAIN_EVERY: Final = 30.0  # seconds

_log = get_logger("agent.spares")


class Spares:
    """The spares of this node. ``is_online`` says whether the server is being heard."""

    def __init__(
        self,
        signing: Signing,
        cache: EstateCache,
        clock: Clock,
        *,
        is_online: Callable[[], bool],
        share_when_offline: bool,
        on_change: Callable[[], None],
        spawn: Callable[[Coroutine[Any, Any, None]], object],
    ) -> None:
        """``on_change`` is called when other spares are held; ``spawn`` runs what is signed for nobody in particular."""
        self._signing = signing
        self._cache = cache
        self._clock = clock
        self._is_online = is_online
        self._share_when_offline = share_when_offline
        self._on_change = on_change
        self._spawn = spawn
        self._held: dict[str, X509Holding] = {}
        self._used_at: dict[str, datetime] = {}
        self._refilling: set[str] = set()

    def __len__(self) -> int:
        """How many are held."""
        return len(self._held)

    def used(self, entry: Entry) -> None:
        """Note that a process holds an SVID of this entry: it is worth a spare."""
        self._used_at[entry.id] = self._clock.now()

    def take(self, entry: Entry) -> X509Holding | None:
        """Give the entry's spare away, for one session alone; None: there is none for that."""
        spare = self._held.get(entry.id)
        if spare is None or spare.shared or not spare.is_fresh(entry, self._cache, self._clock.now()):
            return None
        if not self._is_online():
            # It may be the last: who can be served by signing is, and who cannot shares it.
            return None
        del self._held[entry.id]
        self._on_change()
        return spare

    def can_share(self, entry: Entry) -> bool:
        """Say whether there is a spare that several sessions could use while the server is away."""
        return self._shareable(entry) is not None

    def share(self, entry: Entry) -> X509Holding | None:
        """Give the entry's spare to one more session while the server is away; None: there is none for that."""
        spare = self._shareable(entry)
        # A server that is heard and refuses has spoken; only its absence is bridged.
        if spare is None or self._is_online():
            return None
        _log.warning("spare_svid_shared", entry=entry.id, spiffe_id=str(entry.spiffe_id))
        # NOTE(security): marked where it lies, too: whoever comes after the outage must not get it for its own.
        shared = self._held[entry.id] = replace(spare, shared=True)
        return shared

    def _shareable(self, entry: Entry) -> X509Holding | None:
        spare = None if entry.disable_x509_svid_prefetch else self._held.get(entry.id)
        if spare is None or not self._share_when_offline or spare.entry.spiffe_id != entry.spiffe_id:
            return None
        return spare if spare.is_valid(self._cache, self._clock.now()) else None

    def refill(self, entry: Entry) -> None:
        """See to it that the entry has a fresh spare soon, where it may have one."""
        spare = self._held.get(entry.id)
        if (
            entry.disable_x509_svid_prefetch
            or entry.id in self._refilling
            or (spare is None and len(self._held) >= MAX_SPARES)
        ):
            return
        if spare is not None and not spare.shared and spare.is_fresh(entry, self._cache, self._clock.now()):
            return
        self._refilling.add(entry.id)
        self._spawn(self._sign(entry))

    async def _sign(self, entry: Entry) -> None:
        try:
            # The caller who took the last one is answered first: a key and a request are made on the same loop.
            await asyncio.sleep(REFILL_PAUSE)
            with suppress(BrokerError):  # tried again by maintain(); a caller without a spare is signed for directly
                self._held[entry.id] = await self._signing.x509(entry)
                self._on_change()
        finally:
            self._refilling.discard(entry.id)

    async def maintain(self) -> None:
        """Keep spares fresh, and drop those of entries that are gone or unused; runs until cancelled."""
        while True:
            await asyncio.sleep(MAINTAIN_EVERY)
            self.tidy()

    def tidy(self) -> None:
        """One round of :meth:`maintain`."""
        now = self._clock.now()
        for entry_id, used_at in list(self._used_at.items()):
            entry = self._cache.entry(entry_id)
            if entry is None or entry.disable_x509_svid_prefetch or now - used_at > UNUSED:
                del self._used_at[entry_id]
                self._held.pop(entry_id, None)
            elif self._is_online():
                self.refill(entry)

    def forget(self) -> None:
        """Drop every spare and its key: this agent may serve nobody."""
        self._held.clear()
        self._used_at.clear()
        self._on_change()

    def kept(self) -> tuple[KeptSpare, ...]:
        """Give every spare that the next run of this agent could share; none where it may not."""
        if not self._share_when_offline:
            return ()
        now = self._clock.now()
        return tuple(
            KeptSpare(entry_id, spare.chain, spare.key_der, self._used_at.get(entry_id, now))
            for entry_id, spare in self._held.items()
            if spare.is_valid(self._cache, now)
        )

    def resume(self, kept: Iterable[KeptSpare]) -> None:
        """Take up the spares of an earlier run that are still good, after its entries and bundles.

        They can be shared and no more: the file may be older than the moment in which one was handed out.
        """
        for one in kept:
            entry = self._cache.entry(one.entry_id)
            if entry is None or entry.id in self._held or len(self._held) >= MAX_SPARES:
                continue
            try:
                holding = self._signing.held(entry, one.chain_der, one.key_der)
            except InvalidSvid as error:
                _log.info("kept_svid_unusable", entry=entry.id, code=error.reason)
                continue
            self._held[entry.id] = replace(holding, shared=True)
            self._used_at[entry.id] = min(one.used_at, self._clock.now())
