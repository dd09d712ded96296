"""Answers kept for repeated requests, by who asked (owner), their key, and a digest of what they asked."""

from datetime import datetime
from typing import Final

from broker.errors import Conflict
from broker.server.store.sql import Duplicate, SqlTables, micros

_RECALL: Final = "SELECT digest, result FROM idempotency WHERE owner = ? AND key = ?"
_REMEMBER: Final = "INSERT INTO idempotency (owner, key, digest, result, expires_at) VALUES (?, ?, ?, ?, ?)"


class IdempotencyWriting(SqlTables):
    """Keeps and gives answers."""

    def recall(self, owner: str, key: str, digest: str) -> str | None:
        """Give the kept answer, or None; Conflict(code="idempotency_mismatch") when the request was another one."""
        row = self._sql.row(_RECALL, (owner, key))
        if row is None:
            return None
        if row[0] != digest:
            raise _mismatch()
        result: str = row[1]
        return result

    def remember(self, owner: str, key: str, digest: str, result: str, expires_at: datetime) -> None:
        """Keep an answer; Conflict(code="idempotency_mismatch") when the key is in use."""
        try:
            self._sql.attempt(_REMEMBER, (owner, key, digest, result, micros(expires_at)))
        except Duplicate:
            raise _mismatch() from None


def _mismatch() -> Conflict:
    return Conflict(
        "the idempotency key was used for another request",
        code="idempotency_mismatch",
        hint="a new request needs a new key; repeat a request unchanged",
    )
