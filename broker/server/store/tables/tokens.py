"""Issued task tokens: their hashes and bindings, never the tokens."""

# ruff: noqa: S608 - the texts are put together from constants of this module only

from datetime import datetime
from typing import Final

from broker.errors import Conflict, NotFound
from broker.server.store.rows import TokenRow
from broker.server.store.sql import Dangling, Duplicate, Row, SqlTables, micros, micros_or_none, moment, moment_or_none
from broker.spiffe import SpiffeId

_COLUMNS: Final = "jti, task_id, root, resource, scope, agent, session, x5t, issued_at, expires_at, hash, revoked_at"
_ONE: Final = f"SELECT {_COLUMNS} FROM tokens WHERE jti = ?"
_COUNT: Final = "SELECT count(*) FROM tokens WHERE task_id = ?"
_LIVING: Final = (
    f"SELECT {_COLUMNS} FROM tokens WHERE task_id = ? AND expires_at > ? AND revoked_at IS NULL AND jti > ?"
    " ORDER BY jti LIMIT ?"
)
_ADD: Final = f"INSERT INTO tokens ({_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
_REVOKE: Final = "UPDATE tokens SET revoked_at = ? WHERE jti = ? AND revoked_at IS NULL"


class TokenReading(SqlTables):
    """Reads tokens."""

    def token(self, jti: str) -> TokenRow | None:
        """Give one token's row, or None."""
        row = self._sql.row(_ONE, (jti,))
        return None if row is None else _read(row)

    def tokens_issued(self, task_id: str) -> int:
        """Count the tokens of one task."""
        row = self._sql.row(_COUNT, (task_id,))
        return 0 if row is None else int(row[0])

    def living_tokens(self, task_id: str, now: datetime, *, after: str = "", limit: int) -> tuple[TokenRow, ...]:
        """Give up to ``limit`` tokens of one task that have neither expired nor been revoked, by jti, those after ``after``."""
        return tuple(map(_read, self._sql.rows(_LIVING, (task_id, micros(now), after, limit))))


class TokenWriting(TokenReading):
    """Writes tokens."""

    def add_token(self, row: TokenRow) -> None:
        """Add; Conflict(code="token_exists"), NotFound when its task is unknown."""
        values = (
            row.jti,
            row.task_id,
            row.root,
            row.resource,
            row.scope,
            str(row.agent),
            row.session,
            row.x5t,
            micros(row.issued_at),
            micros(row.expires_at),
            row.hash,
            micros_or_none(row.revoked_at),
        )
        try:
            self._sql.append(_ADD, values, attempt=True)
        except Duplicate:
            raise Conflict("a token with this jti exists already", code="token_exists") from None
        except Dangling:
            raise NotFound("there is no such task") from None

    def revoke_token(self, jti: str, at: datetime) -> TokenRow | None:
        """Revoke and give the token's row; None when it is unknown or was revoked before."""
        return self.token(jti) if self._sql.run(_REVOKE, (micros(at), jti)) else None


def _read(row: Row) -> TokenRow:
    return TokenRow(
        jti=row[0],
        task_id=row[1],
        root=row[2],
        resource=row[3],
        scope=row[4],
        agent=SpiffeId(row[5]),
        session=row[6],
        x5t=row[7],
        issued_at=moment(row[8]),
        expires_at=moment(row[9]),
        hash=row[10],
        revoked_at=moment_or_none(row[11]),
    )
