"""Policies that were put in force."""

# ruff: noqa: S608 - the texts are put together from constants of this module only

from typing import Final

from broker.errors import Conflict
from broker.server.store.policy_ports import PolicyRow, PolicySource
from broker.server.store.sql import Duplicate, SqlTables, micros, moment

KEPT: Final = 50
"""Policies kept: some MiB at most. A decision older than those is explained by the file that was pushed."""

_COLUMNS: Final = "version, hash, text, source, put_by, put_at"
_NEWEST: Final = f"SELECT {_COLUMNS} FROM policies ORDER BY version DESC LIMIT 1"
_BY_HASH: Final = f"SELECT {_COLUMNS} FROM policies WHERE hash = ? ORDER BY version DESC LIMIT 1"
_ADD: Final = f"INSERT INTO policies ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?)"
_FORGET: Final = "DELETE FROM policies WHERE version <= ?"


class PolicyReading(SqlTables):
    """Reads policies."""

    def policy(self, hash_: str = "") -> PolicyRow | None:
        """Give the policy in force, or the newest of this hash that is kept; None where there is none."""
        row = self._sql.row(_BY_HASH, (hash_,)) if hash_ else self._sql.row(_NEWEST)
        return None if row is None else PolicyRow(row[0], row[1], row[2], PolicySource(row[3]), row[4], moment(row[5]))


class PolicyWriting(PolicyReading):
    """Writes policies."""

    def put_policy(self, row: PolicyRow) -> None:
        """Put in force; Conflict(code="stale_version") when the version is not above all others."""
        newest = self.policy()
        if newest is not None and newest.version >= row.version:
            raise _stale()
        try:
            self._sql.attempt(_ADD, (row.version, row.hash, row.text, row.source, row.put_by, micros(row.put_at)))
        except Duplicate:
            raise _stale() from None
        self._sql.run(_FORGET, (row.version - KEPT,))


def _stale() -> Conflict:
    return Conflict(
        "another policy was put in force meanwhile", code="stale_version", hint="read it again and decide anew"
    )
