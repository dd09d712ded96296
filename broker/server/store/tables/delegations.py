"""Standing delegations. Their terms are written once; an end comes once, and stays."""

# ruff: noqa: S608 - the texts are put together from constants of this module only

from datetime import datetime
from typing import Final

from broker.errors import Conflict
from broker.server.store.sql import Duplicate, Row, SqlTables, Value, micros, moment, moment_or_none
from broker.server.store.tables.places import place_after, place_of
from broker.server.store.user_rows import DelegationPage
from broker.spiffe import strictjson
from broker.tasks.causes import Cause
from broker.tasks.standing import StandingDelegation

MAX_PAGE: Final = 500
"""Most delegations of one page: some megabytes at most."""

_COLUMNS: Final = "id, issuer, user_id, terms, auth_time, created_at, expires_at, ended_at, cause"
_ONE: Final = f"SELECT {_COLUMNS} FROM delegations WHERE id = ?"
_LIST: Final = f"SELECT {_COLUMNS} FROM delegations WHERE (created_at, id) > (?, ?)"
_OF_USER: Final = " AND user_id = ?"
_IN_ORDER: Final = " ORDER BY created_at, id LIMIT ?"
_STANDING: Final = f"SELECT {_COLUMNS} FROM delegations WHERE user_id = ? AND ended_at IS NULL ORDER BY created_at, id"
_ADD: Final = f"INSERT INTO delegations ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"
_END: Final = "UPDATE delegations SET ended_at = ?, cause = ? WHERE id = ? AND ended_at IS NULL"


class DelegationReading(SqlTables):
    """Reads standing delegations."""

    def delegation(self, delegation_id: str) -> StandingDelegation | None:
        """Give one, or None."""
        row = self._sql.row(_ONE, (delegation_id,))
        return None if row is None else _read(row)

    def list_delegations(self, user: str | None, *, after: str | None = None, limit: int = 100) -> DelegationPage:
        """Give a page, of one user or of all, oldest first; Invalid for a page token that is not ours."""
        size = max(1, min(limit, MAX_PAGE))
        values: list[Value] = [*place_after(after)]
        text = _LIST
        if user is not None:
            text += _OF_USER
            values.append(user)
        rows = self._sql.rows(text + _IN_ORDER, (*values, size + 1))
        page = tuple(map(_read, rows[:size]))
        return DelegationPage(page, place_of(page[-1].created_at, page[-1].id) if len(rows) > size else None)

    def standing_of(self, user: str) -> tuple[StandingDelegation, ...]:
        """Give those of one user that were not withdrawn."""
        return tuple(map(_read, self._sql.rows(_STANDING, (user,))))


class DelegationWriting(DelegationReading):
    """Writes standing delegations."""

    def add_delegation(self, delegation: StandingDelegation) -> None:
        """Add; Conflict(code="delegation_exists")."""
        values = (
            delegation.id,
            delegation.issuer,
            delegation.user,
            strictjson.canonical(delegation.terms()).decode(),
            micros(delegation.auth_time),
            micros(delegation.created_at),
            micros(delegation.expires_at),
            None,
            None,
        )
        try:
            self._sql.attempt(_ADD, values)
        except Duplicate:
            raise Conflict("a delegation with this id exists already", code="delegation_exists") from None

    def end_delegation(self, delegation_id: str, cause: Cause, at: datetime) -> StandingDelegation | None:
        """End and give it; None when it is unknown or had ended before."""
        return self.delegation(delegation_id) if self._sql.run(_END, (micros(at), cause, delegation_id)) else None


def _read(row: Row) -> StandingDelegation:
    return StandingDelegation.of(
        strictjson.loads(row[3].encode()),
        id=row[0],
        issuer=row[1],
        user=row[2],
        auth_time=moment(row[4]),
        created_at=moment(row[5]),
        expires_at=moment(row[6]),
        ended_at=moment_or_none(row[7]),
        cause=None if row[8] is None else Cause(row[8]),
    )
