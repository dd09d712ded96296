"""Bundles: the own trust domain's, and those of others as an operator sets them. SPIRE's semantics and words.

A batch is one transaction, and every item of it has its own outcome. A bundle, its change row and its audit record are
one act. What an operator sets stands, whatever its sequence number; what is fetched is judged in ``federation``.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from enum import Enum, auto
from typing import Final

from broker.audit.events import Event
from broker.audit.records import FieldValue, Record
from broker.clock import Clock
from broker.errors import BrokerError, Conflict, Invalid, NotFound
from broker.registry.entry import Entry
from broker.server.authority.authorities import Authorities, BundleKey
from broker.server.authority.rotation import Rotation
from broker.server.identity.changes import GONE
from broker.server.identity.entries import dissociate_entry, remove_entry
from broker.server.identity.federated import BUNDLE_KIND, Federated
from broker.server.identity.filters import Page, page
from broker.server.identity.withdrawals import NOTHING, Withdrawals
from broker.server.store.bundle_rows import PublishedBundle, PublishedKey, jwt_public_key, x509_key
from broker.server.store.ports import Store, Writer
from broker.server.store.rows import AdoptedAuthority, AuthorityKind, Source
from broker.spiffe import TrustDomain

__all__ = ["Bundles", "DeletionMode", "PublishedBundle", "PublishedKey", "drop_bundle", "put_bundle"]

MAX_BATCH: Final = 100
"""Most items of one batch: bundles are large, and it is one transaction that others wait for."""
MAX_FEDERATED: Final = 1000
"""Most other trust domains: each is in memory, and is told to agents."""
FOREVER: Final = datetime(9999, 1, 1, tzinfo=UTC)
"""The end of an appended key that came without one."""

Draft = PublishedBundle | BrokerError
Outcome = PublishedBundle | BrokerError


@dataclass(frozen=True, slots=True)
class _By:
    actor: str
    now: datetime


class DeletionMode(Enum):
    """What becomes of the entries that federate with a trust domain whose bundle is deleted."""

    RESTRICT = auto()
    DELETE = auto()
    DISSOCIATE = auto()


class Bundles:
    """The use cases of bundles."""

    def __init__(
        self,
        store: Store,
        authorities: Authorities,
        rotation: Rotation,
        federated: Federated,
        clock: Clock,
        *,
        trust_domain: TrustDomain,
        withdrawals: Withdrawals = NOTHING,
    ) -> None:
        self._store = store
        self._withdrawals = withdrawals
        self._authorities = authorities
        self._rotation = rotation
        self._federated = federated
        self._clock = clock
        self._trust_domain = trust_domain

    # ---- questions, answered from memory

    def own(self) -> PublishedBundle:
        """Give the own trust domain's bundle."""
        bundle = self._authorities.bundle
        return PublishedBundle(
            self._trust_domain,
            _published(self._authorities.x509_keys),
            _published(self._authorities.jwt_keys),
            bundle.sequence or 0,
            bundle.refresh_hint or 0,
        )

    def federated(self, trust_domain: TrustDomain) -> PublishedBundle:
        """Give another trust domain's bundle; raises Invalid for the own one, NotFound."""
        if trust_domain == self._trust_domain:
            raise Invalid(
                "getting a federated bundle for the server's own trust domain is not allowed", code="bundle_own"
            )
        bundle = self._federated.bundles.get(trust_domain)
        if bundle is None:
            raise _not_found()
        return bundle

    def find(self, size: int = 0, token: str = "") -> Page[PublishedBundle]:
        """Give a page of federated bundles by trust domain."""
        return page(self._federated.bundles.values(), lambda one: one.trust_domain.name, size, token)

    def count(self) -> int:
        """Count the bundles, the own one among them."""
        return 1 + len(self._federated.bundles)

    # ---- the own bundle

    async def append(self, x509: Sequence[PublishedKey], jwt: Sequence[PublishedKey], actor: str) -> PublishedBundle:
        """Publish further authorities as the own trust domain's: nothing here signs with them. Raises Invalid.

        Those that are published already stay as they are. One whose end is near or past is pruned as any other.
        """
        if not x509 and not jwt:
            raise Invalid("no authorities to append", code="no_authorities")
        known = {AuthorityKind.X509: self._authorities.x509_keys, AuthorityKind.JWT: self._authorities.jwt_keys}
        fresh = [row for row in _adopted(x509, jwt) if all(row.public != other.public for other in known[row.kind])]
        if any(row.id == other.id for row in fresh for other in known[row.kind]):
            raise Invalid("another authority has this key ID", code="bundle_key_id")
        if fresh:
            await self._rotation.adopt(fresh, actor=actor)
        return self.own()

    # ---- the bundles of others

    async def create(self, drafts: Sequence[Draft], actor: str) -> list[Outcome]:
        """Add bundles; Conflict for a trust domain that has one."""

        def put(held: PublishedBundle | None, draft: PublishedBundle) -> Outcome:
            return draft if held is None else Conflict("bundle already exists", code="bundle_exists")

        return await self._put([(draft, put) for draft in drafts], "creating", actor)

    async def set(self, drafts: Sequence[Draft], actor: str) -> list[Outcome]:
        """Add bundles, or replace those that are there."""
        return await self._put([(draft, lambda _held, draft: draft) for draft in drafts], "setting", actor)

    async def update(
        self, drafts: Sequence[Draft], edit: Callable[[PublishedBundle, PublishedBundle], PublishedBundle], actor: str
    ) -> list[Outcome]:
        """Change bundles by a function of what is there and what was sent; NotFound where there is none."""

        def put(held: PublishedBundle | None, draft: PublishedBundle) -> Outcome:
            return _not_found() if held is None else edit(held, draft)

        return await self._put([(draft, put) for draft in drafts], "updating", actor)

    async def delete(
        self, trust_domains: Sequence[TrustDomain | BrokerError], mode: DeletionMode, actor: str
    ) -> list[BrokerError | None]:
        """Delete bundles, and as the mode says what becomes of entries; None stands for success."""
        _check_batch(trust_domains)
        by = _By(actor, self._clock.now())

        def act(writer: Writer) -> list[BrokerError | None]:
            return [
                one if isinstance(one, BrokerError) else self._delete(writer, one, mode, by) for one in trust_domains
            ]

        return await self._store.write(act)

    async def _put(
        self,
        drafts: Sequence[tuple[Draft, Callable[[PublishedBundle | None, PublishedBundle], Outcome]]],
        doing: str,
        actor: str,
    ) -> list[Outcome]:
        _check_batch(drafts)
        by = _By(actor, self._clock.now())

        def act(writer: Writer) -> list[Outcome]:
            return [self._put_one(writer, draft, put, doing, by) for draft, put in drafts]

        return await self._store.write(act)

    def _put_one(
        self,
        writer: Writer,
        draft: Draft,
        put: Callable[[PublishedBundle | None, PublishedBundle], Outcome],
        doing: str,
        by: _By,
    ) -> Outcome:
        if isinstance(draft, BrokerError):
            return draft
        if draft.trust_domain == self._trust_domain:
            message = f"{doing} a federated bundle for the server's own trust domain is not allowed"
            return Invalid(message, code="bundle_own")
        outcome = put(writer.federated_bundle(draft.trust_domain), draft)
        if isinstance(outcome, PublishedBundle):
            try:
                put_bundle(writer, outcome, by.actor, by.now)
            except Invalid as error:
                return error
        return outcome

    def _delete(self, writer: Writer, trust_domain: TrustDomain, mode: DeletionMode, by: _By) -> BrokerError | None:
        if trust_domain == self._trust_domain:
            return Invalid("removing the bundle for the server trust domain is not allowed", code="bundle_own")
        if writer.federated_bundle(trust_domain) is None:
            return _not_found()
        entries = writer.entries_federating(trust_domain)
        if entries and mode is DeletionMode.RESTRICT:
            return Conflict(
                "failed to delete federated bundle: cannot delete bundle;"
                f" federated with {len(entries)} registration entries",
                code="bundle_in_use",
                hint="delete with mode dissociate, or delete",
            )
        for entry in entries:
            self._release(writer, entry, trust_domain, mode, by)
        drop_bundle(writer, trust_domain, by.actor, by.now, self._withdrawals)
        return None

    def _release(self, writer: Writer, entry: Entry, trust_domain: TrustDomain, mode: DeletionMode, by: _By) -> None:
        if mode is DeletionMode.DELETE:
            remove_entry(writer, entry.id, by.actor, by.now, self._withdrawals)
        else:
            dissociate_entry(writer, entry, trust_domain, by.actor, by.now)


def put_bundle(writer: Writer, bundle: PublishedBundle, actor: str, now: datetime, code: str = "") -> None:
    """Write one federated bundle with its change row and its record, unless it is there already; part of a larger act.

    Raises InvalidBundle, or Invalid when there are too many.
    """
    bundle.checked()
    held = writer.federated_bundle(bundle.trust_domain)
    if held == bundle:
        return
    if held is None and len(writer.federated_bundles()) >= MAX_FEDERATED:
        raise Invalid(f"there are {MAX_FEDERATED} federated bundles already", code="too_many_bundles")
    writer.put_federated_bundle(bundle)
    writer.change(BUNDLE_KIND, bundle.trust_domain.name, bundle.text())
    record = _changed(bundle.trust_domain, bundle.sequence, (len(bundle.x509), len(bundle.jwt)), actor, now)
    writer.record(replace(record, fields={**record.fields, "code": code}) if code else record)


def drop_bundle(
    writer: Writer, trust_domain: TrustDomain, actor: str, now: datetime, withdrawals: Withdrawals = NOTHING
) -> bool:
    """Remove one federated bundle with its change row, its record, and what hung on it; give whether it was there.

    Part of a larger act.
    """
    if not writer.remove_federated_bundle(trust_domain):
        return False
    writer.change(BUNDLE_KIND, trust_domain.name, GONE)
    fields: dict[str, FieldValue] = {"trust_domain": trust_domain.name}
    writer.record(Record(Event.BUNDLE_DELETED, now, actor, trust_domain.name, fields))
    withdrawals.trust_domain_gone(writer, trust_domain, actor, now)
    return True


def _changed(trust_domain: TrustDomain, sequence: int, keys: tuple[int, int], actor: str, now: datetime) -> Record:
    fields: dict[str, FieldValue] = {
        "trust_domain": trust_domain.name,
        "sequence": str(sequence),
        "x509_authorities": keys[0],
        "jwt_authorities": keys[1],
    }
    return Record(Event.BUNDLE_CHANGED, now, actor, trust_domain.name, fields)


def _adopted(x509: Iterable[PublishedKey], jwt: Iterable[PublishedKey]) -> list[AdoptedAuthority]:
    rows = []
    for key in x509:
        ends = x509_key(key.public).not_after
        assert ends is not None
        name = hashlib.sha256(key.public).hexdigest()[:32]
        rows.append(AdoptedAuthority(AuthorityKind.X509, name, key.public, ends, Source.APPENDED, key.tainted))
    for key in jwt:
        jwt_public_key(key.public)
        ends = key.not_after or FOREVER
        rows.append(AdoptedAuthority(AuthorityKind.JWT, key.id, key.public, ends, Source.APPENDED, key.tainted))
    return rows


def _published(rows: Iterable[BundleKey]) -> tuple[PublishedKey, ...]:
    return tuple(
        PublishedKey(row.id, row.public, None if row.not_after == FOREVER else row.not_after, row.tainted)
        for row in rows
    )


def _not_found() -> NotFound:
    return NotFound("bundle not found", code="bundle_not_found")


def _check_batch(items: Sequence[object]) -> None:
    if len(items) > MAX_BATCH:
        raise Invalid(f"a batch has at most {MAX_BATCH} items", code="batch_too_large")
