"""Carries out the plan: makes keys, publishes them, lets them take over, forgets them, and follows who stands above.

Nothing signs before the commit that published it. A process that dies between two steps leaves rows that the next
process's plan deals with; a key that was never published, or whose row is gone, never signs and is forgotten.
"""

import asyncio
import secrets
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Final

from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from broker.audit.events import Event
from broker.audit.records import FieldValue
from broker.clock import Clock
from broker.errors import BrokerError, Conflict, Unavailable
from broker.keys import KeyManager, Signer
from broker.server import failpoints
from broker.server.authority import profile
from broker.server.authority.adoption import adopt, differs
from broker.server.authority.authorities import root_key_id
from broker.server.authority.journal import CHANGE_KIND, SERVER, Journal, activate, find
from broker.server.authority.plan import (
    LEASE,
    Activate,
    Prepare,
    Prune,
    Retire,
    Standing,
    Step,
    next_due,
    plan,
)
from broker.server.authority.upstream import Minted, PublicJwtKey, Upstream
from broker.server.store.ports import Store, Writer
from broker.server.store.rows import (
    AdoptedAuthority,
    AuthorityKind,
    AuthorityRow,
    AuthorityState,
    Change,
    Source,
)
from broker.spiffe import TrustDomain
from broker.telemetry.log import get_logger

CHECK_EVERY: Final = 10.0
"""Seconds between two looks at the wall clock: it may jump, and a suspended machine may sleep through a due time.
Also between two heartbeats of a replica."""
FOLLOW_EVERY: Final = 5.0
"""Seconds between two looks at what is published above: SPIRE's own."""
RETRY_AFTER: Final = 1.0
"""Seconds until the next try when the store, or who stands above, is unavailable."""
SHORTEST: Final = 0.05
AUTHORITY_ID_BYTES: Final = 16
"""Random bytes of the id of a JWT or task-token authority, which is its ``kid``: no two servers ever choose the same."""

log = get_logger("authority")


@dataclass(frozen=True, slots=True)
class RotationRules:
    """Which replica this is, the kinds that it signs with, and how long an authority lives."""

    trust_domain: TrustDomain
    kinds: tuple[AuthorityKind, ...]
    ttl: timedelta
    replica: str


class Rotation:
    """Keeps the authorities of this replica in step with the plan."""

    def __init__(
        self, journal: Journal, keys: KeyManager, upstream: Upstream, clock: Clock, rules: RotationRules
    ) -> None:
        self._journal = journal
        self._keys = keys
        self._upstream = upstream
        self._clock = clock
        self._rules = rules
        self._turn = asyncio.Lock()
        self._news = asyncio.Event()

    @property
    def rules(self) -> RotationRules:
        """What it goes by."""
        return self._rules

    def follow(self, store: Store) -> None:
        """Learn from the store what other replicas change, from now on."""

        def told(changes: Sequence[Change]) -> None:
            if any(change.kind == CHANGE_KIND for change in changes):
                self._news.set()

        store.subscribe(told)

    async def start(self) -> None:
        """Settle until each kind has an active authority, which beside other replicas takes a few seconds.

        Raises Unavailable, and Misconfigured for a key that is not the published one.
        """
        await self._beat()
        await self._journal.refresh()
        await self._forget_strays()
        await self.settle()
        while not self._is_complete():
            await asyncio.sleep(self._pause())
            await self.settle()

    async def settle(self) -> None:
        """Take every step that is due; raises Unavailable."""
        async with self._turn:
            await self._journal.refresh()
            while steps := self._due():
                for step in steps:
                    # Who was faster has changed the rows: the next plan sees them.
                    with suppress(Conflict):
                        await self._take(step)

    async def run(self) -> None:
        """Settle again and again, until cancelled."""
        while True:
            try:
                await self._beat()
                await self.settle()
                await self._wait(self._pause())
            except BrokerError as error:
                log.warning("authority_rotation_failed", code=error.reason, error=error.message)
                await asyncio.sleep(RETRY_AFTER)

    async def run_following(self) -> None:
        """Keep our bundle as whoever stands above has it, until cancelled."""
        while True:
            try:
                found = await self._upstream.bundle()
                if found is None:
                    return
                await self.adopt(found, all_from_above=True)
                await asyncio.sleep(FOLLOW_EVERY)
            except BrokerError as error:
                log.warning("upstream_not_followed", code=error.reason, error=error.message)
                await asyncio.sleep(RETRY_AFTER)

    async def adopt(
        self, rows: Iterable[AdoptedAuthority], *, all_from_above: bool = False, actor: str = SERVER
    ) -> None:
        """Put authorities into the bundle that are not ours; with ``all_from_above`` drop what is not among them."""
        wanted = {(row.kind, row.id): row for row in rows}
        if not differs(self._journal.published.adopted, wanted, all_from_above=all_from_above):
            return

        def alter(writer: Writer) -> bool:
            return adopt(writer, wanted, all_from_above=all_from_above)

        name = self._rules.trust_domain.name
        fields: dict[str, FieldValue] = {"trust_domain": name, "reason": "adopted"}
        await self._journal.commit(Event.BUNDLE_CHANGED, AuthorityKind.X509, name, alter, actor=actor, fields=fields)
        # A tainted root has to be left at once.
        self._news.set()

    async def forsake(self) -> None:
        """Take back the authorities whose keys are held here, by which nothing was signed for anybody; raises Unavailable."""
        async with self._turn:
            held = frozenset(self._keys.ids())
            for row in self._journal.published.authorities:
                if row.replica == self._rules.replica and row.id in held:
                    await self._prune(row)

    async def prepare(self, kind: AuthorityKind, actor: str) -> AuthorityRow:
        """Make and publish a successor now, in the place of one that is prepared already; raises Unavailable."""
        async with self._turn:
            return await self._prepare(kind, actor=actor)

    async def activate(self, row: AuthorityRow, actor: str) -> None:
        """Let a prepared authority take over now; raises Conflict, Unavailable."""
        async with self._turn:
            await self._activate(row, actor=actor)

    def _due(self) -> tuple[Step, ...]:
        return plan(self._journal.published, self._standing(), self._clock.now())

    def _standing(self) -> Standing:
        published = self._journal.published
        tainted = {row.id for row in published.adopted if row.tainted or row.source is Source.REVOKED}
        ours = {row.id for row in published.authorities if row.upstream and root_key_id(row) in tainted}
        return Standing(self._rules.replica, frozenset(self._keys.ids()), self._rules.kinds, frozenset(ours))

    def _is_complete(self) -> bool:
        rows = self._journal.published.authorities
        held = frozenset(self._keys.ids())
        active = {row.kind for row in rows if row.state is AuthorityState.ACTIVE and row.id in held}
        return active >= frozenset(self._rules.kinds)

    def _pause(self) -> float:
        now = self._clock.now()
        due = next_due(self._journal.published, self._standing(), now)
        seconds = CHECK_EVERY if due is None else (due - now).total_seconds()
        return min(max(seconds, SHORTEST), CHECK_EVERY)

    async def _wait(self, seconds: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._news.wait()
        self._news.clear()

    async def _beat(self) -> None:
        await self._journal.beat(self._rules.replica, self._clock.now() - LEASE)

    async def _forget_strays(self) -> None:
        # Keys from another day than the rows: one whose certificate is not published must never sign (K06).
        rows = {row.id: row for row in self._journal.published.authorities}
        for key_id in tuple(self._keys.ids()):
            row = rows.get(key_id)
            if row is None or row.state is AuthorityState.OLD or row.replica != self._rules.replica:
                log.warning("stray_key_forgotten", authority=key_id, published=row is not None)
                await self._keys.remove(key_id)

    async def _take(self, step: Step) -> None:
        match step:
            case Prepare(kind):
                await self._prepare(kind)
            case Activate(row):
                await self._activate(row)
            case Retire(row):
                await self._retire(row)
            case Prune(row):
                await self._prune(row)

    async def _prepare(self, kind: AuthorityKind, *, actor: str = SERVER) -> AuthorityRow:
        signer = await self._keys.generate(
            profile.key_identifier if kind is AuthorityKind.X509 else secrets.token_hex(AUTHORITY_ID_BYTES)
        )
        try:
            row, adopted = await self._certified(kind, signer)
            failpoints.reach("authority.before_prepare")
            replaced = await self._commit_prepared(row, adopted, actor)
        except BaseException:
            # Nobody was told of it, or nobody can know: it never signs.
            await self._keys.remove(signer.id)
            raise
        failpoints.reach("authority.after_prepare")
        for key_id in replaced:
            await self._keys.remove(key_id)
        return row

    async def _commit_prepared(
        self, row: AuthorityRow, adopted: tuple[AdoptedAuthority, ...], actor: str
    ) -> tuple[str, ...]:
        replaced: tuple[str, ...] = ()

        def alter(writer: Writer) -> bool:
            nonlocal replaced
            before = [
                one
                for one in writer.authorities(row.kind)
                if one.state is AuthorityState.PREPARED and one.replica == row.replica
            ]
            replaced = tuple(one.id for one in before)
            for one in before:
                writer.remove_authority(one.kind, one.id)
            writer.put_authority(row)
            adopt(writer, {(one.kind, one.id): one for one in adopted}, all_from_above=False)
            return True

        await self._journal.commit(Event.AUTHORITY_PREPARED, row.kind, row.id, alter, actor=actor)
        return replaced

    async def _certified(
        self, kind: AuthorityKind, signer: Signer
    ) -> tuple[AuthorityRow, tuple[AdoptedAuthority, ...]]:
        if kind is AuthorityKind.X509:
            minted = await self._upstream.mint(signer, self._rules.ttl)
            return self._x509_row(signer, minted), minted.roots
        life = profile.authority_validity(self._clock.now(), self._rules.ttl)
        public = signer.public_key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        row = AuthorityRow(
            kind,
            signer.id,
            public,
            AuthorityState.PREPARED,
            life.not_before,
            life.not_after,
            replica=self._rules.replica,
        )
        if kind is not AuthorityKind.JWT:
            return row, ()
        above = await self._upstream.publish(PublicJwtKey(row.id, row.public, row.not_after))
        return row, tuple(one for one in above if one.id != row.id)

    def _x509_row(self, signer: Signer, minted: Minted) -> AuthorityRow:
        life = profile.life_of(minted.certificate)
        if life.not_after <= self._clock.now():
            raise Unavailable("the authority from above has ended already", code="authority_ended")
        return AuthorityRow(
            AuthorityKind.X509,
            signer.id,
            minted.certificate,
            AuthorityState.PREPARED,
            life.not_before,
            life.not_after,
            replica=self._rules.replica,
            upstream=minted.upstream,
            chain=minted.above,
        )

    async def _activate(self, row: AuthorityRow, *, actor: str = SERVER) -> None:
        replaced: tuple[AuthorityRow, ...] = ()

        def alter(writer: Writer) -> bool:
            nonlocal replaced
            replaced = activate(writer, row)
            return False

        failpoints.reach("authority.before_activate")
        await self._journal.commit(Event.AUTHORITY_ACTIVATED, row.kind, row.id, alter, actor=actor)
        failpoints.reach("authority.after_activate")
        for other in replaced:
            # What it signed still verifies; it signs nothing more, so the key is of no more use than to a thief.
            await self._keys.remove(other.id)

    async def _retire(self, row: AuthorityRow) -> None:
        def alter(writer: Writer) -> bool:
            current = find(writer, row.kind, row.id)
            if current is not None and current.state is AuthorityState.ACTIVE:
                writer.put_authority(replace(current, state=AuthorityState.OLD))
            return False

        failpoints.reach("authority.before_retire")
        await self._journal.commit(Event.AUTHORITY_RETIRED, row.kind, row.id, alter)
        failpoints.reach("authority.after_retire")
        await self._keys.remove(row.id)

    async def _prune(self, row: AuthorityRow | AdoptedAuthority) -> None:
        def alter(writer: Writer) -> bool:
            if isinstance(row, AdoptedAuthority):
                return writer.remove_adopted(row.kind, row.id) is not None
            return writer.remove_authority(row.kind, row.id) is not None

        failpoints.reach("authority.before_prune")
        await self._journal.commit(Event.AUTHORITY_PRUNED, row.kind, row.id, alter)
        failpoints.reach("authority.after_prune")
        await self._keys.remove(row.id)
