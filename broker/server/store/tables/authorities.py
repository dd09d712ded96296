"""Public halves of the authorities, what the bundle has adopted, the bundle's sequence number, and the replicas.

Private keys are never near the store.
"""

# ruff: noqa: S608 - the texts are put together from constants of this module only

from datetime import datetime
from typing import Final

from broker.server.store.rows import (
    AdoptedAuthority,
    AuthorityKind,
    AuthorityRow,
    AuthorityState,
    Published,
    Source,
)
from broker.server.store.sql import Row, SqlTables, micros, moment

_COLUMNS: Final = "kind, id, public, state, not_before, not_after, tainted, replica, upstream, chain"
_ONE: Final = f"SELECT {_COLUMNS} FROM authorities WHERE kind = ? AND id = ?"
_ALL: Final = f"SELECT {_COLUMNS} FROM authorities ORDER BY not_before, id, kind"
_PUT: Final = (
    f"INSERT INTO authorities ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
    " ON CONFLICT (kind, id) DO UPDATE SET public = excluded.public, state = excluded.state,"
    " not_before = excluded.not_before, not_after = excluded.not_after, tainted = excluded.tainted,"
    " replica = excluded.replica, upstream = excluded.upstream, chain = excluded.chain"
)
_REMOVE: Final = "DELETE FROM authorities WHERE kind = ? AND id = ?"
_ADOPTED: Final = "kind, id, public, not_after, tainted, source"
_ONE_ADOPTED: Final = f"SELECT {_ADOPTED} FROM adopted_authorities WHERE kind = ? AND id = ?"
_ALL_ADOPTED: Final = f"SELECT {_ADOPTED} FROM adopted_authorities ORDER BY kind, id"
_PUT_ADOPTED: Final = (
    f"INSERT INTO adopted_authorities ({_ADOPTED}) VALUES (?, ?, ?, ?, ?, ?)"
    " ON CONFLICT (kind, id) DO UPDATE SET public = excluded.public, not_after = excluded.not_after,"
    " tainted = excluded.tainted, source = excluded.source"
)
_REMOVE_ADOPTED: Final = "DELETE FROM adopted_authorities WHERE kind = ? AND id = ?"
_REPLICAS: Final = "SELECT id, seen_at FROM replicas ORDER BY id"
_SEE: Final = (
    "INSERT INTO replicas (id, seen_at) VALUES (?, ?) ON CONFLICT (id) DO UPDATE SET seen_at = excluded.seen_at"
)
_FORGET: Final = "DELETE FROM replicas WHERE seen_at < ?"
_COUNT: Final = "SELECT value FROM counters WHERE name = ?"
_COUNT_UP: Final = (
    "INSERT INTO counters (name, value) VALUES (?, 1) ON CONFLICT (name) DO UPDATE SET value = counters.value + 1"
)
_BUNDLE: Final = "bundle_sequence"


class AuthorityReading(SqlTables):
    """Reads authorities."""

    def authorities(self, kind: AuthorityKind | None = None) -> tuple[AuthorityRow, ...]:
        """Give all, or those of one kind, oldest first."""
        rows = tuple(_read(row) for row in self._sql.rows(_ALL))
        return rows if kind is None else tuple(row for row in rows if row.kind is kind)

    def bundle_sequence(self) -> int:
        """Give the bundle's sequence number; 0 before the first."""
        row = self._sql.row(_COUNT, (_BUNDLE,))
        return 0 if row is None else int(row[0])

    def published(self) -> Published:
        """Give all that stands in our bundle, or signs."""
        return Published(
            self.authorities(),
            tuple(_read_adopted(row) for row in self._sql.rows(_ALL_ADOPTED)),
            self.bundle_sequence(),
            {row[0]: moment(row[1]) for row in self._sql.rows(_REPLICAS)},
        )


class AuthorityWriting(AuthorityReading):
    """Writes authorities."""

    def put_authority(self, row: AuthorityRow) -> None:
        """Add, or replace the one of the same kind and id."""
        times = (micros(row.not_before), micros(row.not_after))
        standing = (row.replica, row.upstream, row.chain or None)
        self._sql.run(_PUT, (row.kind, row.id, row.public, row.state, *times, int(row.tainted), *standing))

    def remove_authority(self, kind: AuthorityKind, authority_id: str) -> AuthorityRow | None:
        """Remove and give what was there, or None."""
        row = self._sql.row(_ONE, (kind, authority_id))
        self._sql.run(_REMOVE, (kind, authority_id))
        return None if row is None else _read(row)

    def bump_bundle_sequence(self) -> int:
        """Raise the number by one and give it."""
        self._sql.run(_COUNT_UP, (_BUNDLE,))
        return self.bundle_sequence()

    def put_adopted(self, row: AdoptedAuthority) -> None:
        """Add, or replace the one of the same kind and id."""
        values = (row.kind, row.id, row.public, micros(row.not_after), int(row.tainted), row.source)
        self._sql.run(_PUT_ADOPTED, values)

    def remove_adopted(self, kind: AuthorityKind, authority_id: str) -> AdoptedAuthority | None:
        """Remove and give what was there, or None."""
        row = self._sql.row(_ONE_ADOPTED, (kind, authority_id))
        self._sql.run(_REMOVE_ADOPTED, (kind, authority_id))
        return None if row is None else _read_adopted(row)

    def see_replica(self, replica: str, now: datetime, silent_since: datetime) -> None:
        """Note that a replica lives, and forget those that were last heard before."""
        self._sql.run(_SEE, (replica, micros(now)))
        self._sql.run(_FORGET, (micros(silent_since),))


def _read(row: Row) -> AuthorityRow:
    return AuthorityRow(
        kind=AuthorityKind(row[0]),
        id=row[1],
        public=row[2],
        state=AuthorityState(row[3]),
        not_before=moment(row[4]),
        not_after=moment(row[5]),
        tainted=bool(row[6]),
        replica=row[7],
        upstream=row[8],
        chain=row[9] or b"",
    )


def _read_adopted(row: Row) -> AdoptedAuthority:
    return AdoptedAuthority(
        kind=AuthorityKind(row[0]),
        id=row[1],
        public=row[2],
        not_after=moment(row[3]),
        tainted=bool(row[4]),
        source=Source(row[5]),
    )
