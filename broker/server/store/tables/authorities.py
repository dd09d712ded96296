"""Public halves of the authorities, and the bundle's sequence number. Private keys are never near the store."""

# ruff: noqa: S608 - the texts are put together from constants of this module only

from typing import Final

from broker.server.store.rows import AuthorityKind, AuthorityRow, AuthorityState
from broker.server.store.sql import Row, SqlTables, micros, moment

_COLUMNS: Final = "kind, id, public, state, not_before, not_after, tainted"
_ONE: Final = f"SELECT {_COLUMNS} FROM authorities WHERE kind = ? AND id = ?"
_ALL: Final = f"SELECT {_COLUMNS} FROM authorities ORDER BY not_before, id, kind"
_PUT: Final = (
    f"INSERT INTO authorities ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?)"
    " ON CONFLICT (kind, id) DO UPDATE SET public = excluded.public, state = excluded.state,"
    " not_before = excluded.not_before, not_after = excluded.not_after, tainted = excluded.tainted"
)
_REMOVE: Final = "DELETE FROM authorities WHERE kind = ? AND id = ?"
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


class AuthorityWriting(AuthorityReading):
    """Writes authorities."""

    def put_authority(self, row: AuthorityRow) -> None:
        """Add, or replace the one of the same kind and id."""
        times = (micros(row.not_before), micros(row.not_after))
        self._sql.run(_PUT, (row.kind, row.id, row.public, row.state, *times, int(row.tainted)))

    def remove_authority(self, kind: AuthorityKind, authority_id: str) -> AuthorityRow | None:
        """Remove and give what was there, or None."""
        row = self._sql.row(_ONE, (kind, authority_id))
        self._sql.run(_REMOVE, (kind, authority_id))
        return None if row is None else _read(row)

    def bump_bundle_sequence(self) -> int:
        """Raise the number by one and give it."""
        self._sql.run(_COUNT_UP, (_BUNDLE,))
        return self.bundle_sequence()


def _read(row: Row) -> AuthorityRow:
    return AuthorityRow(
        kind=AuthorityKind(row[0]),
        id=row[1],
        public=row[2],
        state=AuthorityState(row[3]),
        not_before=moment(row[4]),
        not_after=moment(row[5]),
        tainted=bool(row[6]),
    )
