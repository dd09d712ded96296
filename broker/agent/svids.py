"""Keeps the SVIDs of every session: its own keys, rotation at half-life, and one signed spare per entry lately used.

The spare makes the first answer instant: it is handed to one new session, then replaced. While the server is away a new
session may share it, which is marked, reported to nobody, and replaced when the server is back. An entry may say that it wants
no spare, or a new JWT-SVID for each call (SPIRE's additional attributes). An SVID that has expired or was revoked, or whose
authority is no longer trusted, is never handed out. A process whose SVID was revoked goes on with a new key as another
session: what hangs on the old one has ended.
"""

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any, Final, TypeVar

from broker.agent.backoff import Backoff
from broker.agent.cache import EstateCache
from broker.agent.estate_file import KeptSpare
from broker.agent.holdings import JwtHolding, X509Holding
from broker.agent.sessions import Identity, WorkloadSession
from broker.agent.signing import Signing
from broker.agent.workloads import NO_IDENTITY
from broker.clock import Clock
from broker.errors import BrokerError, InvalidSvid, NoIdentity, Unavailable
from broker.registry import Entry
from broker.telemetry.log import get_logger

T = TypeVar("T")

RETRY_LONGEST: Final = 30.0  # seconds between attempts to rotate one SVID
SPARE_UNUSED: Final = timedelta(hours=24)  # an entry that nobody used for so long gets no spare any more
MAX_SPARES: Final = 1000  # keys and chains in memory, some 4 KiB each
REFILL_PAUSE: Final = 0.01  # seconds before the next spare is asked for
MAINTAIN_EVERY: Final = 30.0  # seconds
OFFLINE_TRY: Final = 1.0  # seconds that a new session waits for a server that is not heard, when a spare can be shared
JWT_REFRESH: Final = 1.0  # seconds that a caller waits for a younger token while an older one is still valid

_log = get_logger("agent.svids")


class SvidKeeper:
    """Gives sessions their SVIDs. ``is_online`` says whether the server is being heard."""

    def __init__(
        self,
        signing: Signing,
        cache: EstateCache,
        clock: Clock,
        *,
        is_online: Callable[[], bool],
        share_when_offline: bool,
        on_new_leaf: Callable[[Identity], None],
        on_revoked: Callable[[Identity], None] = lambda _: None,
        on_spares: Callable[[], None] = lambda: None,
    ) -> None:
        """``on_new_leaf`` is called with an identity that holds a new leaf, ``on_spares`` when other spares are held."""
        self._signing = signing
        self._cache = cache
        self._clock = clock
        self._is_online = is_online
        self._share_when_offline = share_when_offline
        self._on_new_leaf = on_new_leaf
        self._on_revoked = on_revoked
        self._on_spares = on_spares
        self._spares: dict[str, X509Holding] = {}
        self._used_at: dict[str, datetime] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._refilling: set[str] = set()

    @property
    def spares(self) -> int:
        """How many spares are held."""
        return len(self._spares)

    # ---- X.509

    async def x509(self, session: WorkloadSession, entries: Sequence[Entry]) -> tuple[Identity, ...]:
        """Give the session's identities for these entries, each with a valid SVID, in their order.

        An entry for which none can be had is left out; raises the first failure when that leaves nothing.
        """
        for entry in entries:
            self._let_go_of_revoked(session, entry)
        identities = [session.identity(entry) for entry in entries]
        lacking = [one for one in identities if not self._is_settled(one)]
        if not lacking:
            # Each was looked at just now, and is valid.
            return tuple(identities)
        failures: list[BrokerError] = []
        outcomes = await asyncio.gather(*(self._once(session, one) for one in lacking), return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, BrokerError):
                failures.append(outcome)
            elif isinstance(outcome, BaseException):
                raise outcome
        now = self._clock.now()
        ready = tuple(one for one in identities if one.x509 is not None and one.x509.is_valid(self._cache, now))
        if not ready and identities:
            raise failures[0] if failures else Unavailable("no valid SVID can be had now", code="svid_not_signed")
        return ready

    def due_in(self, session: WorkloadSession, entries: Iterable[Entry]) -> float | None:
        """Give the seconds until the session needs looking after again; None: not by time."""
        now, monotonic = self._clock.now(), self._clock.monotonic()
        moments: list[float] = []
        for entry in entries:
            if entry.expires_at is not None:
                moments.append((entry.expires_at - now).total_seconds())
            identity = session.identities.get(entry.id)
            if identity is None:
                continue
            if identity.x509 is None or identity.retry_at > monotonic:
                moments.append(max(identity.retry_at - monotonic, 0.1))
            if identity.x509 is not None:
                held = identity.x509
                moments.append((held.svid.expires_at - now).total_seconds())
                if identity.retry_at <= monotonic:
                    moments.append((held.rotate_at - now).total_seconds())
        return max(min(moments), 0.05) if moments else None

    def _let_go_of_revoked(self, session: WorkloadSession, entry: Entry) -> None:
        identity = session.identities.get(entry.id)
        if identity is None or identity.x509 is None or not self._cache.is_revoked(identity.x509.svid):
            return
        _log.info("svid_revoked", entry=entry.id, session=identity.id, serial=f"{identity.x509.svid.serial:x}")
        del session.identities[entry.id]
        if not identity.x509.shared:
            self._on_revoked(identity)

    def _is_settled(self, identity: Identity) -> bool:
        """Whether the identity needs no signing now."""
        held = identity.x509
        if held is None:
            return False
        now = self._clock.now()
        if not held.is_valid(self._cache, now) or held.entry.spiffe_id != identity.entry.spiffe_id:
            identity.x509 = None
            return False
        if not held.is_due(identity.entry, self._cache, now) and not (held.shared and self._is_online()):
            return True
        return self._clock.monotonic() < identity.retry_at

    def _once(self, session: WorkloadSession, identity: Identity) -> "asyncio.Future[None]":
        """Look after one identity, one task however many streams ask; a stream that goes away stops nothing."""
        return asyncio.shield(self._single(session, ("x509", identity.id), lambda: self._renew(session, identity)))

    async def _renew(self, session: WorkloadSession, identity: Identity) -> None:
        entry, old = identity.entry, identity.x509
        try:
            holding = self._take_spare(entry) if old is None else None
            if holding is None:
                holding = await self._signed(entry, may_share=old is None)
        except BrokerError as error:
            holding = self._shared_spare(entry) if old is None else None
            if holding is None:
                identity.retry_at = self._clock.monotonic() + _retry_delay(identity, old)
                _log.warning("svid_not_renewed", entry=entry.id, code=error.reason)
                if old is None:
                    raise
                return
        if session.is_ended:
            raise Unavailable("the session has ended", code="session_ended")
        if session.identities.get(entry.id) is not identity:
            # Told to the server it would outlive its withdrawal there.
            raise NoIdentity(NO_IDENTITY)
        identity.x509, identity.retry_at = holding, 0.0
        self._used_at[entry.id] = self._clock.now()
        if not holding.shared:
            self._on_new_leaf(identity)
            self._refill(entry)

    async def _signed(self, entry: Entry, *, may_share: bool) -> X509Holding:
        if not may_share or self._is_online() or self._shareable(entry) is None:
            return await self._signing.x509(entry)
        try:
            async with asyncio.timeout(OFFLINE_TRY):
                return await self._signing.x509(entry)
        except TimeoutError:
            raise Unavailable("the server does not answer", code="svid_not_signed") from None

    # ---- spares

    def _take_spare(self, entry: Entry) -> X509Holding | None:
        spare = self._spares.get(entry.id)
        if spare is None or spare.shared or not spare.is_fresh(entry, self._cache, self._clock.now()):
            return None
        if not self._is_online():
            # It may be the last: who can be served by signing is, and who cannot shares it.
            return None
        del self._spares[entry.id]
        self._on_spares()
        return spare

    def _shareable(self, entry: Entry) -> X509Holding | None:
        spare = None if entry.disable_x509_svid_prefetch else self._spares.get(entry.id)
        if spare is None or not self._share_when_offline or spare.entry.spiffe_id != entry.spiffe_id:
            return None
        return spare if spare.is_valid(self._cache, self._clock.now()) else None

    def _shared_spare(self, entry: Entry) -> X509Holding | None:
        spare = self._shareable(entry)
        # A server that is heard and refuses has spoken; only its absence is bridged.
        if spare is None or self._is_online():
            return None
        _log.warning("spare_svid_shared", entry=entry.id, spiffe_id=str(entry.spiffe_id))
        # NOTE(security): marked where it lies, too: whoever comes after the outage must not get it for its own.
        shared = self._spares[entry.id] = replace(spare, shared=True)
        return shared

    def _refill(self, entry: Entry) -> None:
        spare = self._spares.get(entry.id)
        if (
            entry.disable_x509_svid_prefetch
            or entry.id in self._refilling
            or (spare is None and len(self._spares) >= MAX_SPARES)
        ):
            return
        if spare is not None and not spare.shared and spare.is_fresh(entry, self._cache, self._clock.now()):
            return
        self._refilling.add(entry.id)
        self._spawn(self._sign_spare(entry))

    async def _sign_spare(self, entry: Entry) -> None:
        try:
            # The caller who took the last one is answered first: a key and a request are made on the same loop.
            await asyncio.sleep(REFILL_PAUSE)
            with suppress(BrokerError):  # tried again by maintain(); a caller without a spare is signed for directly
                self._spares[entry.id] = await self._signing.x509(entry)
                self._on_spares()
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
            if entry is None or entry.disable_x509_svid_prefetch or now - used_at > SPARE_UNUSED:
                del self._used_at[entry_id]
                self._spares.pop(entry_id, None)
            elif self._is_online():
                self._refill(entry)

    def forget(self) -> None:
        """Drop every spare and its key: this agent may serve nobody."""
        self._spares.clear()
        self._used_at.clear()
        self._on_spares()

    def kept(self) -> tuple[KeptSpare, ...]:
        """Give every spare that the next run of this agent could share; none where it may not."""
        if not self._share_when_offline:
            return ()
        now = self._clock.now()
        return tuple(
            KeptSpare(entry_id, spare.chain, spare.key_der, self._used_at.get(entry_id, now))
            for entry_id, spare in self._spares.items()
            if spare.is_valid(self._cache, now)
        )

    def resume(self, kept: Iterable[KeptSpare]) -> None:
        """Take up the spares of an earlier run that are still good, after its entries and bundles.

        They can be shared and no more: the file may be older than the moment in which one was handed out.
        """
        for one in kept:
            entry = self._cache.entry(one.entry_id)
            if entry is None or entry.id in self._spares or len(self._spares) >= MAX_SPARES:
                continue
            try:
                holding = self._signing.held(entry, one.chain_der, one.key_der)
            except InvalidSvid as error:
                _log.info("kept_svid_unusable", entry=entry.id, code=error.reason)
                continue
            self._spares[entry.id] = replace(holding, shared=True)
            self._used_at[entry.id] = min(one.used_at, self._clock.now())

    # ---- JWT

    def cached_jwt(self, session: WorkloadSession, entry: Entry, audiences: tuple[str, ...]) -> JwtHolding | None:
        """Give the session's own token for these sorted audiences while it is before its half-life: no waiting."""
        if entry.jwt_svid_include_jti:
            return None  # its readers take each token once
        held = session.jwts.get((entry.id, audiences))
        if held is None or not held.is_fresh(entry, self._cache, self._clock.now()):
            return None
        session.jwts.move_to_end((entry.id, audiences))
        return held

    async def jwt(self, session: WorkloadSession, entry: Entry, audiences: tuple[str, ...]) -> JwtHolding:
        """Give the session's token for these sorted audiences, signing one where needed; raises what the server said."""
        if entry.jwt_svid_include_jti:
            return await self._signing.jwt(entry, audiences)
        if (fresh := self.cached_jwt(session, entry, audiences)) is not None:
            return fresh
        held = session.jwts.get((entry.id, audiences))
        may_stay = (
            held is not None
            and held.entry.spiffe_id == entry.spiffe_id
            and held.is_valid(self._cache, self._clock.now())
        )
        signed = self._single(session, (entry.id, audiences), lambda: self._sign_jwt(session, entry, audiences))
        try:
            async with asyncio.timeout(JWT_REFRESH if may_stay else None):
                return await asyncio.shield(signed)
        except (Unavailable, TimeoutError):
            if held is not None and may_stay and held.is_valid(self._cache, self._clock.now()):
                return held
            raise

    async def _sign_jwt(self, session: WorkloadSession, entry: Entry, audiences: tuple[str, ...]) -> JwtHolding:
        holding = await self._signing.jwt(entry, audiences)
        if not session.is_ended:
            session.remember((entry.id, audiences), holding)
        return holding

    # ---- tasks of its own

    async def close(self) -> None:
        """Give up what is under way."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _single(
        self, session: WorkloadSession, key: object, work: Callable[[], Coroutine[Any, Any, T]]
    ) -> "asyncio.Task[T]":
        task: asyncio.Task[T] | None = session.pending.get(key)
        if task is None:
            task = self._spawn(work())
            session.pending[key] = task
            task.add_done_callback(lambda _: session.pending.pop(key, None))
        return task

    def _spawn(self, work: Coroutine[Any, Any, T]) -> "asyncio.Task[T]":
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)
        return task

    def _finished(self, task: "asyncio.Task[Any]") -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # told to whoever waits; if nobody does any more, it is no news


def _retry_delay(identity: Identity, old: X509Holding | None) -> float:
    # Without any SVID the caller itself asks again; with one that is valid there is time.
    return Backoff(RETRY_LONGEST, attempt=0 if old is None else 4).next()
