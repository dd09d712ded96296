"""Signs the revocation lists that are due, writes them down, and tells who listens.

Every list is committed, and numbered by what was committed before it, before anybody sees it. A server that restarts goes on
from the store: lists whose authority's key is gone stay as they are until the authority has ended.
"""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import datetime
from typing import Final

from cryptography import x509

from broker.audit.events import Event
from broker.audit.records import FieldValue, Record
from broker.clock import Clock
from broker.errors import BrokerError, NotFound
from broker.keys import KeyManager
from broker.server.authority.authorities import Authorities
from broker.server.authority.crl import CrlIssuer, count, is_due, listed, sign_crl
from broker.server.store.ports import Store, Writer
from broker.server.store.revocation_rows import CrlRow, RevokedSvid
from broker.server.store.rows import AuthorityKind, AuthorityRow, AuthorityState, Change
from broker.telemetry.log import get_logger

CRL_KIND: Final = "crl"
"""The change log's word for: an authority's revocation list is a new one."""
REVOKED_KIND: Final = "svid_revoked"
"""The change log's word for: these serial numbers of these authorities were revoked."""
CHECK_EVERY: Final = 10.0
"""Seconds between two looks at the wall clock for lists whose time is half over."""

log = get_logger("crl")
_Key = tuple[str, bool]


class CrlPublisher:
    """The revocation lists of this moment."""

    def __init__(self, store: Store, keys: KeyManager, authorities: Authorities, clock: Clock) -> None:
        self._store = store
        self._keys = keys
        self._authorities = authorities
        self._clock = clock
        self._rows: dict[_Key, CrlRow] = {}
        self._turn = asyncio.Lock()
        self._news = asyncio.Event()
        self._listeners: list[Callable[[], None]] = []

    @property
    def crls(self) -> tuple[bytes, ...]:
        """The newest list of each published authority, in DER, the complete ones first."""
        there = {row.id for row in self._published()}
        rows = sorted(self._rows.values(), key=lambda row: (row.indirect, row.authority))
        return tuple(row.der for row in rows if row.authority in there)

    def subscribe(self, listener: Callable[[], None]) -> None:
        """Call on the event loop after every new list; it must not block."""
        self._listeners.append(listener)

    async def start(self) -> None:
        """Sign what is due, and follow what happens; raises Unavailable."""
        self._store.subscribe(self._committed)
        self._authorities.subscribe(self._news.set)
        await self.settle()

    async def run(self) -> None:
        """Settle whenever something happened, until cancelled."""
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(CHECK_EVERY):
                    await self._news.wait()
            self._news.clear()
            try:
                await self.settle()
            except BrokerError as error:
                log.warning("crl_not_published", code=error.reason, error=error.message)
                await asyncio.sleep(1)
                self._news.set()

    async def settle(self) -> None:
        """Sign every list that is due and take in those of others; raises Unavailable."""
        async with self._turn:
            revoked, rows = await self._store.read(lambda reader: (reader.revoked_svids(), reader.crls()))
            known = {(row.authority, row.indirect): row for row in rows}
            # Long lists take a while; whoever else is on the loop does not wait for them.
            signed = await asyncio.to_thread(self._signed, self._published(), revoked, known)
            if signed:
                signed = await self._store.write(self._publication(signed))
                known |= {(row.authority, row.indirect): row for row in signed}
            if known != self._rows:
                self._rows = known
                for listener in tuple(self._listeners):
                    listener()

    def _signed(
        self, published: Sequence[AuthorityRow], revoked: Sequence[RevokedSvid], known: dict[_Key, CrlRow]
    ) -> list[CrlRow]:
        now, signed = self._clock.now(), list[CrlRow]()
        certificates = {row.id: x509.load_der_x509_certificate(row.public) for row in published}
        issuers = {row.id: issuer for row in published if (issuer := self._issuer(row, certificates[row.id]))}
        for issuer in issuers.values():
            previous = known.get((issuer.id, False))
            own = listed((one for one in revoked if one.authority == issuer.id), previous)
            if is_due(own, previous, now):
                signed.append(sign_crl(issuer, own, previous, now))
        # One that is not held here and not old is another replica's, which signs its list itself.
        orphans = {row.id for row in published if row.state is AuthorityState.OLD and row.id not in issuers}
        for issuer in (
            issuers[row.id] for row in published if row.state is AuthorityState.ACTIVE and row.id in issuers
        ):
            previous = known.get((issuer.id, True))
            others = listed((one for one in revoked if one.authority in orphans), previous)
            if (others or previous) and is_due(others, previous, now):
                signed.append(sign_crl(issuer, others, previous, now, certificates))
        return signed

    def _publication(self, signed: Sequence[CrlRow]) -> Callable[[Writer], list[CrlRow]]:
        now = self._clock.now()

        def act(writer: Writer) -> list[CrlRow]:
            numbers = {(row.authority, row.indirect): row.number for row in writer.crls()}
            next_ones = [row for row in signed if row.number == numbers.get((row.authority, row.indirect), 0) + 1]
            for row in next_ones:
                writer.put_crl(row)
                writer.change(CRL_KIND, row.authority, "")
                writer.record(_published_record(row, now))
            return next_ones

        return act

    def _published(self) -> Sequence[AuthorityRow]:
        return [row for row in self._authorities.rows if row.kind is AuthorityKind.X509]

    def _issuer(self, row: AuthorityRow, certificate: x509.Certificate) -> CrlIssuer | None:
        try:
            return CrlIssuer(row.id, certificate, self._keys.signer(row.id))
        except NotFound:
            return None

    def _committed(self, changes: Sequence[Change]) -> None:
        if any(change.kind in {CRL_KIND, REVOKED_KIND} for change in changes):
            self._news.set()


def _published_record(row: CrlRow, now: datetime) -> Record:
    fields: dict[str, FieldValue] = {
        "number": row.number,
        "indirect": row.indirect,
        "revoked": count(row),
        "expires_at": int(row.next_update.timestamp()),
    }
    return Record(Event.CRL_PUBLISHED, now, "server", row.authority, fields)
