"""Registration entries: create, change, delete, list. SPIRE's semantics; every item of a batch has its own outcome.

A batch is one transaction. Writing the entry, its change row and its audit record are one act, and the directory has it
before the caller is answered.
"""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Final

from broker.audit.events import Event
from broker.audit.records import FieldValue, Record
from broker.clock import Clock
from broker.errors import BrokerError, Conflict, Invalid, NotFound
from broker.registry.entry import Entry
from broker.server.identity.changes import ENTRY_KIND, GONE, entry_text
from broker.server.identity.directory import Directory
from broker.server.identity.filters import EntryFilter, Page, entry_order, page_in_order
from broker.server.identity.withdrawals import NOTHING, Withdrawals
from broker.server.store.ports import Store, Writer
from broker.spiffe import TrustDomain
from broker.telemetry.log import get_logger

MAX_BATCH: Final = 1000
"""Most items of one batch: it is one transaction, and others wait for it."""
PRUNE_EVERY: Final = 1.0
"""Seconds between two looks for entries whose own time is over."""

PRUNER: Final = "server"
"""Who deletes an entry whose time is over, in the record."""

STRANGER: Final = "federated_bundle_not_found"
"""The code of an entry that federates with a trust domain of which nothing is known."""

log = get_logger("entries")
Draft = Entry | BrokerError
Outcome = Entry | BrokerError
Edit = Callable[[Entry], Entry]


@dataclass(frozen=True, slots=True)
class Similar:
    """The entry was there already: SPIRE answers ALREADY_EXISTS and shows it."""

    existing: Entry


class Entries:
    """The use cases of registration entries."""

    def __init__(
        self,
        store: Store,
        directory: Directory,
        clock: Clock,
        trust_domain: TrustDomain,
        withdrawals: Withdrawals = NOTHING,
    ) -> None:
        self._store = store
        self._withdrawals = withdrawals
        self._directory = directory
        self._clock = clock
        self._trust_domain = trust_domain

    @property
    def trust_domain(self) -> TrustDomain:
        """Where every entry's SPIFFE ID lies."""
        return self._trust_domain

    # ---- questions, answered from memory

    def get(self, entry_id: str) -> Entry:
        """Give one entry; raises NotFound."""
        entry = self._directory.entry(entry_id)
        if entry is None:
            raise NotFound("entry not found", code="entry_not_found")
        return entry

    def find(self, wanted: EntryFilter, size: int = 0, token: str = "") -> Page[Entry]:
        """Give a page of entries, oldest first."""
        return page_in_order(self._directory.in_order(), wanted.holds, entry_order, size, token)

    def count(self, wanted: EntryFilter) -> int:
        """Count entries."""
        return sum(1 for entry in self._directory.entries() if wanted.holds(entry))

    # ---- changes

    async def create(self, drafts: Sequence[Draft], actor: str) -> list[Outcome | Similar]:
        """Add entries, each with its own outcome, in the order given."""
        _check_batch(drafts)
        now = self._clock.now()
        checked = [self._checked(draft) for draft in drafts]

        def act(writer: Writer) -> list[Outcome | Similar]:
            return [draft if isinstance(draft, BrokerError) else _add(writer, draft, actor, now) for draft in checked]

        return await self._store.write(act)

    async def update(self, edits: Sequence[tuple[str, Edit | BrokerError]], actor: str) -> list[Outcome]:
        """Change entries by a function of what they are now; it may raise Invalid. Each update raises the revision.

        An error in the place of a function is that item's outcome.
        """
        _check_batch(edits)
        now = self._clock.now()

        def act(writer: Writer) -> list[Outcome]:
            return [
                edit if isinstance(edit, BrokerError) else self._edit(writer, entry_id, edit, actor, now)
                for entry_id, edit in edits
            ]

        return await self._store.write(act)

    async def delete(self, entry_ids: Sequence[str], actor: str) -> list[Outcome]:
        """Delete entries; what they earned is withdrawn from the agents at once."""
        _check_batch(entry_ids)
        now = self._clock.now()

        def act(writer: Writer) -> list[Outcome]:
            return [remove_entry(writer, entry_id, actor, now, self._withdrawals) for entry_id in entry_ids]

        return await self._store.write(act)

    async def prune(self) -> int:
        """Delete entries whose own time is over, a bounded number at a time; gives how many went.

        Judged again in the transaction: an entry that was given more time a moment ago stays.
        """
        over = self._directory.expired(MAX_BATCH)
        if not over:
            return 0
        now = self._clock.now()

        def act(writer: Writer) -> int:
            there = (writer.entry(entry_id) for entry_id in over)
            gone = [entry.id for entry in there if entry is not None and entry.is_expired(now)]
            for entry_id in gone:
                remove_entry(writer, entry_id, PRUNER, now, self._withdrawals)
            return len(gone)

        return await self._store.write(act)

    async def run(self) -> None:
        """Prune again and again, until cancelled."""
        while True:
            try:
                pruned = await self.prune()
            except BrokerError as error:
                log.warning("entries_not_pruned", code=error.reason, error=error.message)
                pruned = 0
            if pruned:
                log.info("entries_pruned", count=pruned)
            if pruned < MAX_BATCH:
                await asyncio.sleep(PRUNE_EVERY)

    def _checked(self, draft: Draft) -> Draft:
        if isinstance(draft, BrokerError):
            return draft
        try:
            return draft.validated(self._trust_domain)
        except Invalid as error:
            return error

    def _edit(self, writer: Writer, entry_id: str, edit: Edit, actor: str, now: datetime) -> Outcome:
        current = writer.entry(entry_id)
        if current is None:
            return NotFound("entry not found", code="entry_not_found")
        try:
            edited = replace(edit(current), id=current.id, created_at=current.created_at, revision=current.revision + 1)
            edited = edited.validated(self._trust_domain)
        except Invalid as error:
            return error
        similar = writer.similar_entry(edited.spiffe_id, edited.parent_id, edited.selectors)
        if similar is not None and similar.id != edited.id:
            return _similar_exists()
        if stranger := _stranger(writer, edited.federates_with - current.federates_with):
            return stranger
        writer.replace_entry(edited)
        writer.change(ENTRY_KIND, edited.id, entry_text(edited))
        writer.record(_record(Event.ENTRY_UPDATED, edited, actor, now))
        self._withdrawals.entry_changed(writer, current, edited, actor, now)
        return edited


def _add(writer: Writer, entry: Entry, actor: str, now: datetime) -> Outcome | Similar:
    similar = writer.similar_entry(entry.spiffe_id, entry.parent_id, entry.selectors)
    if similar is not None:
        return Similar(similar)
    if writer.entry(entry.id) is not None:
        return Conflict("an entry with this id exists", code="entry_exists")
    if stranger := _stranger(writer, entry.federates_with):
        return stranger
    add_entry(writer, entry, actor, now)
    return entry


def add_entry(writer: Writer, entry: Entry, actor: str, now: datetime) -> None:
    """Write one entry with its change row and its record; part of a larger act."""
    writer.add_entry(entry)
    writer.change(ENTRY_KIND, entry.id, entry_text(entry))
    writer.record(_record(Event.ENTRY_CREATED, entry, actor, now))


def remove_entry(
    writer: Writer, entry_id: str, actor: str, now: datetime, withdrawals: Withdrawals = NOTHING
) -> Outcome:
    """Remove one entry with its change row, its record, and what hung on it; part of a larger act.

    What is not there is an outcome.
    """
    if not entry_id:
        return Invalid("missing entry ID", code="missing_id")
    removed = writer.remove_entry(entry_id)
    if removed is None:
        return NotFound("entry not found", code="entry_not_found")
    writer.change(ENTRY_KIND, entry_id, GONE)
    writer.record(_record(Event.ENTRY_DELETED, removed, actor, now))
    withdrawals.entry_gone(writer, removed, actor, now)
    return removed


def dissociate_entry(writer: Writer, entry: Entry, trust_domain: TrustDomain, actor: str, now: datetime) -> None:
    """Take a trust domain out of what an entry federates with; part of a larger act."""
    edited = replace(entry, federates_with=entry.federates_with - {trust_domain}, revision=entry.revision + 1)
    writer.replace_entry(edited)
    writer.change(ENTRY_KIND, edited.id, entry_text(edited))
    writer.record(_record(Event.ENTRY_UPDATED, edited, actor, now))


def _record(event: Event, entry: Entry, actor: str, now: datetime) -> Record:
    fields: dict[str, FieldValue] = {
        "entry_id": entry.id,
        "spiffe_id": str(entry.spiffe_id),
        "parent_id": str(entry.parent_id),
        "selectors": sorted(map(str, entry.selectors)),
        "revision": entry.revision,
        "admin": entry.admin,
        "downstream": entry.downstream,
        "may_start_tasks": entry.may_start_tasks,
        "allowed_audiences": sorted(entry.allowed_audiences),
    }
    return Record(event, now, actor, entry.id, fields)


def _stranger(writer: Writer, federates_with: frozenset[TrustDomain]) -> NotFound | None:
    """Name a trust domain of which nothing is known: no bundle, and no relationship that will fetch one."""
    for domain in sorted(federates_with, key=str):
        if writer.federated_bundle(domain) is None and writer.relationship(domain) is None:
            return NotFound(
                f'unable to find federated bundle "spiffe://{domain}"',
                code=STRANGER,
                hint="broker federation create, or broker bundle set, for that trust domain first",
            )
    return None


def _similar_exists() -> Conflict:
    return Conflict(
        "similar entry already exists",
        code="entry_exists",
        hint="an entry is unique by SPIFFE ID, parent and selectors",
    )


def _check_batch(items: Sequence[object]) -> None:
    if len(items) > MAX_BATCH:
        raise Invalid(f"a batch has at most {MAX_BATCH} items", code="batch_too_large")
