"""Workload sessions. A session id belongs to the agent, entry and identity that first came with it, and ends once."""

# ruff: noqa: S608 - the texts are put together from constants of this module only

from datetime import datetime
from typing import Final

from broker.errors import Conflict
from broker.server.store.rows import SessionRow
from broker.server.store.sql import Row, Sql, SqlTables, micros, micros_or_none, moment, moment_or_none
from broker.server.store.tables.known import KEPT_ROWS, Remembered
from broker.spiffe import SpiffeId

_COLUMNS: Final = "id, agent, spiffe_id, entry_id, x5t, not_after, started_at, ended_at, serial, run"
_ONE: Final = f"SELECT {_COLUMNS} FROM sessions WHERE id = ?"
_BY_X5T: Final = (
    f"SELECT {_COLUMNS} FROM sessions WHERE x5t = ?"
    " ORDER BY CASE WHEN ended_at IS NULL THEN 0 ELSE 1 END, started_at DESC, id LIMIT 1"
)
_OF_AGENT: Final = f"SELECT {_COLUMNS} FROM sessions WHERE agent = ? AND ended_at IS NULL ORDER BY started_at, id"
_OF_ENTRY: Final = f"SELECT {_COLUMNS} FROM sessions WHERE entry_id = ? AND ended_at IS NULL ORDER BY started_at, id"
_PUT: Final = (
    f"INSERT INTO sessions ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
    " ON CONFLICT (id) DO UPDATE SET x5t = excluded.x5t, not_after = excluded.not_after, serial = excluded.serial,"
    " run = excluded.run"
    " WHERE sessions.ended_at IS NULL AND sessions.agent = excluded.agent"
    " AND sessions.spiffe_id = excluded.spiffe_id AND sessions.entry_id = excluded.entry_id"
)
# An earlier leaf stays until it expires: what the process presents may be older than what its agent has told since.
_KEEP_LEAF: Final = (
    "INSERT INTO session_leaves (session, x5t, not_after, serial)"
    " SELECT id, x5t, not_after, serial FROM sessions WHERE id = ? AND x5t <> ? AND ended_at IS NULL"
    " ON CONFLICT (session, x5t) DO NOTHING"
)
_BY_EARLIER_X5T: Final = (
    "SELECT s.id, s.agent, s.spiffe_id, s.entry_id, s.x5t, s.not_after, s.started_at, s.ended_at, s.serial, s.run"
    " FROM session_leaves l JOIN sessions s ON s.id = l.session WHERE l.x5t = ?"
    " ORDER BY CASE WHEN s.ended_at IS NULL THEN 0 ELSE 1 END, s.started_at DESC, s.id LIMIT 1"
)
_END: Final = "UPDATE sessions SET ended_at = ? WHERE id = ? AND ended_at IS NULL"


class SessionReading(SqlTables):
    """Reads sessions."""

    def __init__(self, sql: Sql) -> None:
        """Start with nothing parsed."""
        super().__init__(sql)
        self._sessions: Remembered[Row, SessionRow] = Remembered(_read, KEPT_ROWS)

    def session(self, session_id: str) -> SessionRow | None:
        """Give one session, living or ended, or None."""
        rows = self._sql.ask(_ONE, (session_id,))
        return self._sessions.read(rows[0]) if rows else None

    def session_by_x5t(self, x5t: str) -> SessionRow | None:
        """Give the session that holds this leaf, or held it before: living before ended, the youngest first; or None."""
        rows = self._sql.ask(_BY_X5T, (x5t,)) or self._sql.ask(_BY_EARLIER_X5T, (x5t,))
        return self._sessions.read(rows[0]) if rows else None

    def sessions_of_agent(self, agent: SpiffeId) -> tuple[SessionRow, ...]:
        """Give the living sessions of a node agent, oldest first."""
        return tuple(_read(row) for row in self._sql.rows(_OF_AGENT, (str(agent),)))

    def sessions_of_entry(self, entry_id: str) -> tuple[SessionRow, ...]:
        """Give the living sessions of an entry, oldest first."""
        return tuple(_read(row) for row in self._sql.rows(_OF_ENTRY, (entry_id,)))


class SessionWriting(SessionReading):
    """Writes sessions."""

    def put_session(self, row: SessionRow) -> None:
        """Add, or renew the leaf of the same session; Conflict (session_ended, session_taken)."""
        values = (
            row.id,
            str(row.agent),
            str(row.spiffe_id),
            row.entry_id,
            row.x5t,
            micros(row.not_after),
            micros(row.started_at),
            micros_or_none(row.ended_at),
            row.serial,
            row.run,
        )
        self._sql.run(_KEEP_LEAF, (row.id, row.x5t))
        if self._sql.run(_PUT, values):
            return
        there = self.session(row.id)
        if there is not None and there.ended_at is not None:
            raise Conflict("the session has ended", code="session_ended", hint="a process that starts is a new session")
        raise Conflict("the session id belongs to another agent, entry or identity", code="session_taken")

    def end_session(self, session_id: str, at: datetime) -> SessionRow | None:
        """End and give the session; None when it is unknown or had ended before."""
        return self.session(session_id) if self._sql.run(_END, (micros(at), session_id)) else None


def _read(row: Row) -> SessionRow:
    return SessionRow(
        id=row[0],
        agent=SpiffeId(row[1]),
        spiffe_id=SpiffeId(row[2]),
        entry_id=row[3],
        x5t=row[4],
        not_after=moment(row[5]),
        started_at=moment(row[6]),
        ended_at=moment_or_none(row[7]),
        serial=row[8],
        run=row[9],
    )
