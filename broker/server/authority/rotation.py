"""Carries out the plan: makes keys, publishes them, lets them take over, forgets them.

Every step is one transaction, and nothing signs before the commit that published it. A process that dies between two
steps leaves rows that the next process's plan deals with; keys that were never published die with it.
"""

import asyncio
import secrets
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Final

from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from broker.audit.events import Event, Record
from broker.clock import Clock
from broker.errors import BrokerError
from broker.keys import KeyManager, Signer
from broker.server.authority import profile, x509
from broker.server.authority.authorities import Authorities, PublicKeys, public_keys
from broker.server.authority.plan import Activate, Prepare, Prune, Retire, Step, next_due, plan
from broker.server.store.ports import Store, Writer
from broker.server.store.rows import AuthorityKind, AuthorityRow, AuthorityState
from broker.spiffe import TrustDomain
from broker.telemetry.log import get_logger

CHECK_EVERY: Final = 10.0
"""Seconds between two looks at the wall clock: it may jump, and a suspended machine may sleep through a due time."""
RETRY_AFTER: Final = 1.0
"""Seconds until the next try when the store is unavailable."""
AUTHORITY_ID_BYTES: Final = 16
"""Random bytes of an authority's id, which is also the ``kid``: no two servers ever choose the same."""
CHANGE_KIND: Final = "bundle"
"""The change log's word for: the published authorities have changed."""

log = get_logger("authority")
TaskKeysHook = Callable[[Writer, PublicKeys], None]


@dataclass(frozen=True, slots=True)
class RotationRules:
    """Which kinds this replica signs with, and how long an authority lives."""

    trust_domain: TrustDomain
    kinds: tuple[AuthorityKind, ...]
    ttl: timedelta


class Rotation:
    """Keeps the authorities of this replica in step with the plan."""

    def __init__(
        self,
        store: Store,
        keys: KeyManager,
        authorities: Authorities,
        clock: Clock,
        rules: RotationRules,
        *,
        on_task_keys: TaskKeysHook | None = None,
    ) -> None:
        """``on_task_keys`` runs inside the transaction that changes the set of published task-token keys."""
        self._store = store
        self._keys = keys
        self._authorities = authorities
        self._clock = clock
        self._rules = rules
        self._on_task_keys = on_task_keys

    async def settle(self) -> None:
        """Take every step that is due; afterwards each kind has an active authority. Raises Unavailable."""
        await self._refresh()
        while steps := self._due():
            for step in steps:
                await self._take(step)

    async def run(self) -> None:
        """Settle again and again, until cancelled."""
        while True:
            try:
                await self.settle()
                await asyncio.sleep(self._pause())
            except BrokerError as error:
                log.warning("authority_rotation_failed", code=error.reason, error=error.message)
                await asyncio.sleep(RETRY_AFTER)

    def _due(self) -> tuple[Step, ...]:
        held = frozenset(self._keys.ids())
        return plan(self._authorities.rows, held, self._rules.kinds, self._clock.now())

    def _pause(self) -> float:
        now = self._clock.now()
        due = next_due(self._authorities.rows, frozenset(self._keys.ids()), now)
        seconds = CHECK_EVERY if due is None else (due - now).total_seconds()
        return min(max(seconds, 0.05), CHECK_EVERY)

    async def _refresh(self) -> None:
        rows, sequence = await self._store.read(lambda reader: (reader.authorities(), reader.bundle_sequence()))
        self._authorities.replace(rows, sequence)

    async def _take(self, step: Step) -> None:
        match step:
            case Prepare(kind):
                await self._prepare(kind)
            case Activate(row):
                await self._activate(row)
            case Retire(row):
                await self._commit(row.kind, Event.AUTHORITY_RETIRED, row.id, [_old(row)], ())
            case Prune(row):
                await self._commit(row.kind, Event.AUTHORITY_PRUNED, row.id, (), [row])
                self._keys.remove(row.id)

    async def _prepare(self, kind: AuthorityKind) -> None:
        signer = self._keys.generate(secrets.token_hex(AUTHORITY_ID_BYTES))
        row = self._row(kind, signer)
        try:
            await self._commit(kind, Event.AUTHORITY_PREPARED, row.id, [row], ())
        except BaseException:
            # Nobody was told of it, or nobody can know: it never signs.
            self._keys.remove(signer.id)
            raise

    async def _activate(self, row: AuthorityRow) -> None:
        replaced = [
            _old(other)
            for other in self._authorities.rows
            if other.kind is row.kind and other.state is AuthorityState.ACTIVE and other.id in self._keys.ids()
        ]
        active = replace(row, state=AuthorityState.ACTIVE)
        await self._commit(row.kind, Event.AUTHORITY_ACTIVATED, row.id, [*replaced, active], ())
        for other in replaced:
            # What it signed still verifies; it signs nothing more, so the key is of no more use than to a thief.
            self._keys.remove(other.id)

    def _row(self, kind: AuthorityKind, signer: Signer) -> AuthorityRow:
        validity = profile.authority_validity(self._clock.now(), self._rules.ttl)
        if kind is AuthorityKind.X509:
            serial = profile.serial_number(secrets.randbits(profile.SERIAL_BITS))
            public = x509.self_signed(self._rules.trust_domain, signer, serial, validity)
        else:
            public = signer.public_key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        return AuthorityRow(kind, signer.id, public, AuthorityState.PREPARED, validity.not_before, validity.not_after)

    async def _commit(
        self,
        kind: AuthorityKind,
        event: Event,
        subject: str,
        put: Iterable[AuthorityRow],
        removed: Iterable[AuthorityRow],
    ) -> None:
        now = self._clock.now()
        put, removed = tuple(put), tuple(removed)
        is_content = event in (Event.AUTHORITY_PREPARED, Event.AUTHORITY_PRUNED)

        def act(writer: Writer) -> tuple[tuple[AuthorityRow, ...], int]:
            for row in put:
                writer.put_authority(row)
            for row in removed:
                writer.remove_authority(row.kind, row.id)
            rows = writer.authorities()
            if is_content and kind is not AuthorityKind.TASK:
                writer.bump_bundle_sequence()
            if is_content and kind is AuthorityKind.TASK and self._on_task_keys is not None:
                self._on_task_keys(writer, public_keys(rows, kind))
            writer.change(CHANGE_KIND, kind, "")
            writer.record(Record(event, now, "server", subject, {"kind": kind.value}))
            return rows, writer.bundle_sequence()

        rows, sequence = await self._store.write(act)
        self._authorities.replace(rows, sequence)
        log.info(event.value, kind=kind.value, authority=subject, bundle_sequence=sequence)


def _old(row: AuthorityRow) -> AuthorityRow:
    return replace(row, state=AuthorityState.OLD)
