"""Keeps the SVIDs of every session: its own keys, rotation at half-life, a spare where there is one.

An entry may want a new JWT-SVID for each call (SPIRE's additional attributes). An SVID that has expired or was revoked, or
whose authority is no longer trusted, is never handed out. A process whose SVID was revoked goes on with a new key as another
session: what hangs on the old one has ended.
"""

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Any, Final, TypeVar

from broker.agent.backoff import Backoff
from broker.agent.cache import EstateCache
from broker.agent.holdings import JwtHolding, X509Holding
from broker.agent.sessions import Identity, WorkloadSession
from broker.agent.signing import Signing
from broker.agent.spares import Spares
from broker.agent.workloads import NO_IDENTITY
from broker.clock import Clock
from broker.errors import BrokerError, NoIdentity, Unavailable
from broker.registry import Entry
from broker.telemetry.log import get_logger

T = TypeVar("T")

RETRY_LONGEST: Final = 30.0  # seconds between attempts to rotate one SVID
RETRY_FIRST: Final = 1.6  # seconds, at the least
RETRY_ATTEMPT: Final = 4  # of the back-off, at which its step is that
RETRY_SHARE: Final = 0.25  # of what is left of the SVID's life: before its end there are several attempts
OFFLINE_TRY: Final = 1.0  # seconds that a new session waits for a server that is not heard, when a spare can be shared
ONLINE_PAUSE: Final = 0.1  # seconds before a server that is heard is asked again
X509_REFRESH: Final = 1.0  # seconds that a caller waits for a younger X.509-SVID while each older one is still valid
X509_MISSING: Final = 10.0  # seconds for one that is not there at all, while others are
JWT_REFRESH: Final = 0.8  # seconds that a caller waits for a younger token while an older one is valid: no second

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
        self._on_new_leaf = on_new_leaf
        self._on_revoked = on_revoked
        self._tasks: set[asyncio.Task[Any]] = set()
        self.spares = Spares(
            signing,
            cache,
            clock,
            is_online=is_online,
            share_when_offline=share_when_offline,
            on_change=on_spares,
            spawn=self._spawn,
        )

    # ---- X.509

    async def x509(self, session: WorkloadSession, entries: Sequence[Entry]) -> tuple[Identity, ...]:
        """Give the session's identities for these entries, each with a valid SVID, in their order.

        An entry for which none can be had is left out; raises the first failure when that leaves nothing.
        """
        for entry in entries:
            self._let_go_of_revoked(session, entry)
        identities = [session.identity(entry) for entry in entries]
        lacking = [one for one in identities if not self._is_settled(one) and not self._settle_by_spare(session, one)]
        if not lacking:
            # Each was looked at just now, and is valid.
            return tuple(identities)
        failures = await self._look_after(session, lacking, self._patience(identities, lacking))
        now = self._clock.now()
        ready = tuple(one for one in identities if one.x509 is not None and one.x509.is_valid(self._cache, now))
        if not ready and identities:
            raise failures[0] if failures else Unavailable("no valid SVID can be had now", code="svid_not_signed")
        return ready

    def _patience(self, identities: Iterable[Identity], lacking: Iterable[Identity]) -> float | None:
        """Give the seconds to wait for what is lacking: None, as long as the server may take, where there is nothing else.

        One answer that hangs must not keep the others from being renewed, handed out, or withdrawn at their end. But a
        message without an identity takes it from the workload: only what does not come for long is left out.
        """
        now = self._clock.now()
        if not any(one.is_late or (one.x509 is not None and one.x509.is_valid(self._cache, now)) for one in identities):
            return None
        return X509_MISSING if any(one.x509 is None for one in lacking) else X509_REFRESH

    async def _look_after(
        self, session: WorkloadSession, lacking: Sequence[Identity], patience: float | None
    ) -> list[BrokerError]:
        """Have these signed for, together, and give what failed; what comes after ``patience`` seconds rings.

        What was waited for in vain is not waited for again.
        """
        work = {self._once(session, one): one for one in lacking}
        awaited = [task for task, one in work.items() if not one.is_late]
        if not awaited:
            return []
        done, late = await asyncio.wait(awaited, timeout=patience)
        for task in late:
            work[task].is_late = True
        failures: list[BrokerError] = []
        for one in done:
            error = Unavailable("the agent is stopping") if one.cancelled() else one.exception()
            if isinstance(error, BrokerError):
                failures.append(error)
            elif error is not None:
                raise error
        return failures

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
            if not identity.is_late and (identity.x509 is None or identity.retry_at > monotonic):
                moments.append(max(identity.retry_at - monotonic, 0.1))
            if identity.x509 is not None:
                held = identity.x509
                moments.append((held.svid.expires_at - now).total_seconds())
                if not identity.is_late and identity.retry_at <= monotonic:
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

    def _once(self, session: WorkloadSession, identity: Identity) -> "asyncio.Task[None]":
        """Look after one identity, one task however many streams ask; a stream that goes away stops nothing."""
        return self._single(session, ("x509", identity.id), lambda: self._renewed(session, identity))

    async def _renewed(self, session: WorkloadSession, identity: Identity) -> None:
        try:
            await self._renew(session, identity)
        finally:
            if identity.is_late:
                identity.is_late = False
                for bell in session.bells:
                    bell.ring()

    async def _renew(self, session: WorkloadSession, identity: Identity) -> None:
        entry, old = identity.entry, identity.x509
        holding: X509Holding | None
        try:
            holding = await self._signed(entry, may_share=old is None)
        except BrokerError as error:
            holding = self.spares.share(entry) if old is None else None
            if holding is None:
                identity.retry_at = self._clock.monotonic() + self._retry_delay(identity)
                _log.warning("svid_not_renewed", entry=entry.id, code=error.reason)
                if old is None:
                    raise
                return
        if session.is_ended:
            raise Unavailable("the session has ended", code="session_ended")
        if session.identities.get(entry.id) is not identity:
            # Told to the server it would outlive its withdrawal there.
            raise NoIdentity(NO_IDENTITY)
        self._settle(identity, holding)

    def _settle_by_spare(self, session: WorkloadSession, identity: Identity) -> bool:
        """Settle an identity here and now, if nobody is about to: a spare is there, and the caller's answer waits for nothing."""
        if identity.x509 is not None or session.is_ended or ("x509", identity.id) in session.pending:
            return False
        spare = self.spares.take(identity.entry)
        if spare is None:
            return False
        self._settle(identity, spare)
        return True

    def _settle(self, identity: Identity, holding: X509Holding) -> None:
        identity.x509, identity.retry_at, identity.failures = holding, 0.0, 0
        self.spares.used(identity.entry)
        if not holding.shared:
            self._on_new_leaf(identity)
            self.spares.refill(identity.entry)

    def _retry_delay(self, identity: Identity) -> float:
        # Without any SVID the caller itself asks again; with one that is valid there is time, of which a part may be used.
        if identity.x509 is None:
            return Backoff(RETRY_LONGEST, attempt=0).next()
        left = (identity.x509.svid.expires_at - self._clock.now()).total_seconds()
        longest = max(RETRY_FIRST, min(RETRY_LONGEST, left * RETRY_SHARE))
        delay = Backoff(longest, attempt=RETRY_ATTEMPT + identity.failures).next()
        identity.failures += 1
        return delay

    async def _signed(self, entry: Entry, *, may_share: bool) -> X509Holding:
        """Have one signed; ``may_share``: the session has none by this entry, and could use the spare in an outage."""
        if may_share and not self._is_online() and self.spares.can_share(entry):
            try:
                async with asyncio.timeout(OFFLINE_TRY):
                    return await self._signing.x509(entry)
            except TimeoutError:
                if not self._is_online():
                    raise Unavailable("the server does not answer", code="svid_not_signed") from None
        try:
            return await self._signing.x509(entry)
        except Unavailable:
            # A connection that went and is there again is no outage: without a second attempt the workload would be told
            # that it has lost an identity, at each forced rotation of the authorities.
            if not may_share or not self._is_online():
                raise
        await asyncio.sleep(ONLINE_PAUSE)
        return await self._signing.x509(entry)

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
        if held is not None and may_stay:
            try:
                async with asyncio.timeout(JWT_REFRESH):
                    return await asyncio.shield(signed)
            except (Unavailable, TimeoutError):
                # It may have ended while the other was waited for.
                if held.is_valid(self._cache, self._clock.now()):
                    return held
        return await asyncio.shield(signed)

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
