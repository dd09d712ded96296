"""Registration entries. That no two are similar (same identity, parent and selectors) is a unique key of the table."""

# ruff: noqa: S608 - the texts are put together from constants of this module only

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Final

from broker.errors import Conflict, NotFound
from broker.registry.entry import Entry
from broker.server.store.sql import (
    Duplicate,
    Row,
    Sql,
    SqlTables,
    Value,
    digest,
    micros,
    micros_or_none,
    moment,
    moment_or_none,
    read_list,
    text_list,
    text_set,
)
from broker.server.store.tables.known import KEPT_ROWS, Known, Remembered
from broker.spiffe import Selector, SpiffeId

_COLUMNS: Final = (
    "id, spiffe_id, parent_id, selectors, x509_svid_ttl, jwt_svid_ttl, federates_with, admin, downstream, expires_at,"
    " dns_names, revision, store_svid, hint, created_at, allowed_audiences, may_start_tasks, description, owner,"
    " disable_x509_svid_prefetch, jwt_svid_include_jti"
)
_ONE: Final = f"SELECT {_COLUMNS} FROM entries WHERE id = ?"
_SIMILAR: Final = f"SELECT {_COLUMNS} FROM entries WHERE spiffe_id = ? AND parent_id = ? AND selectors_digest = ?"
_ALL: Final = f"SELECT {_COLUMNS} FROM entries ORDER BY created_at, id"
ALL_FEDERATING: Final = f"SELECT {_COLUMNS} FROM entries WHERE federates_with <> '[]' ORDER BY created_at, id"
_ADD: Final = (
    f"INSERT INTO entries ({_COLUMNS}, selectors_digest)"
    " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
)
_REPLACE: Final = (
    "UPDATE entries SET spiffe_id = ?, parent_id = ?, selectors = ?, x509_svid_ttl = ?, jwt_svid_ttl = ?,"
    " federates_with = ?, admin = ?, downstream = ?, expires_at = ?, dns_names = ?, revision = ?, store_svid = ?,"
    " hint = ?, created_at = ?, allowed_audiences = ?, may_start_tasks = ?, description = ?, owner = ?,"
    " disable_x509_svid_prefetch = ?, jwt_svid_include_jti = ?, selectors_digest = ? WHERE id = ? AND revision = ?"
)
_REMOVE: Final = "DELETE FROM entries WHERE id = ?"


class EntryReading(SqlTables):
    """Reads entries."""

    def __init__(self, sql: Sql) -> None:
        """Start with nothing parsed."""
        super().__init__(sql)
        self._entries: Remembered[Row, Entry] = Remembered(lambda row: read_entry(row, Known()), KEPT_ROWS)

    def entry(self, entry_id: str) -> Entry | None:
        """Give one entry, or None."""
        rows = self._sql.ask(_ONE, (entry_id,))
        return self._entries.read(rows[0]) if rows else None

    def similar_entry(self, spiffe_id: SpiffeId, parent_id: SpiffeId, selectors: frozenset[Selector]) -> Entry | None:
        """Give the entry with exactly this identity, parent and selectors, or None."""
        row = self._sql.row(_SIMILAR, (str(spiffe_id), str(parent_id), digest(text_set(selectors))))
        return None if row is None else read_entry(row, Known())

    def entries(self) -> tuple[Entry, ...]:
        """Give all entries, oldest first."""
        with _collector_at_rest():
            return tuple(map(partial(read_entry, known=Known()), self._sql.rows(_ALL)))


class EntryWriting(EntryReading):
    """Writes entries."""

    def add_entry(self, entry: Entry) -> None:
        """Add; Conflict(code="entry_exists") when the id or a similar entry exists."""
        try:
            self._sql.attempt(_ADD, (entry.id, *_values(entry)))
        except Duplicate:
            raise _exists() from None

    def replace_entry(self, entry: Entry) -> None:
        """Replace the entry whose revision is one lower; NotFound, or Conflict (stale_version, entry_exists)."""
        try:
            changed = self._sql.attempt(_REPLACE, (*_values(entry), entry.id, entry.revision - 1))
        except Duplicate:
            raise _exists() from None
        if changed:
            return
        if self.entry(entry.id) is None:
            raise NotFound("there is no such entry")
        raise Conflict("the entry has changed since it was read", code="stale_version", hint="read it again")

    def remove_entry(self, entry_id: str) -> Entry | None:
        """Remove and give what was there, or None."""
        entry = self.entry(entry_id)
        self._sql.run(_REMOVE, (entry_id,))
        return entry


@contextmanager
def _collector_at_rest() -> Iterator[None]:
    # A hundred thousand values come at once and all of them stay: looking for garbage among them doubles the time.
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _exists() -> Conflict:
    return Conflict(
        "an entry with this id, or with this SPIFFE ID, parent and selectors, exists already", code="entry_exists"
    )


def _values(entry: Entry) -> tuple[Value, ...]:
    selectors = text_set(entry.selectors)
    return (
        str(entry.spiffe_id),
        str(entry.parent_id),
        selectors,
        entry.x509_svid_ttl,
        entry.jwt_svid_ttl,
        text_set(entry.federates_with),
        int(entry.admin),
        int(entry.downstream),
        micros_or_none(entry.expires_at),
        text_list(entry.dns_names),
        entry.revision,
        int(entry.store_svid),
        entry.hint,
        micros(entry.created_at),
        text_set(entry.allowed_audiences),
        int(entry.may_start_tasks),
        entry.description,
        entry.owner,
        int(entry.disable_x509_svid_prefetch),
        int(entry.jwt_svid_include_jti),
        digest(selectors),
    )


def read_entry(row: Row, known: Known) -> Entry:
    """Read a row of all columns."""
    return Entry(
        id=row[0],
        spiffe_id=SpiffeId(row[1]),
        parent_id=known.spiffe_id(row[2]),
        selectors=known.selectors(row[3]),
        x509_svid_ttl=row[4],
        jwt_svid_ttl=row[5],
        federates_with=known.trust_domains(row[6]),
        admin=bool(row[7]),
        downstream=bool(row[8]),
        expires_at=moment_or_none(row[9]),
        dns_names=read_list(row[10], str),
        revision=row[11],
        store_svid=bool(row[12]),
        hint=row[13],
        created_at=moment(row[14]),
        allowed_audiences=known.texts(row[15]),
        may_start_tasks=bool(row[16]),
        description=row[17],
        owner=row[18],
        disable_x509_svid_prefetch=bool(row[19]),
        jwt_svid_include_jti=bool(row[20]),
    )
