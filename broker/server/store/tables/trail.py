"""The audit chain and the change log: two append-only tables numbered by the one writer.

Both heads are kept while the writer's transactions succeed, and read again after any rollback or foreign write: a number or a
link that was never committed is never built upon.
"""

from collections.abc import Sequence
from typing import Final

from broker.audit.chain import GENESIS, ChainedRecord, ChainHead, append
from broker.audit.records import Record
from broker.server.store.rows import Change
from broker.server.store.sql import Sql, SqlTables

_CHAIN_HEAD: Final = "SELECT seq, hash FROM audit_records ORDER BY seq DESC LIMIT 1"
_RECORDS: Final = "SELECT seq, prev, body, hash FROM audit_records WHERE seq > ? ORDER BY seq LIMIT ?"
_RECORD: Final = "INSERT INTO audit_records (seq, prev, body, hash) VALUES (?, ?, ?, ?)"
_CHANGE_HEAD: Final = "SELECT coalesce(max(seq), 0) FROM changes"
_CHANGE_TAIL: Final = "SELECT coalesce(min(seq), 0) FROM changes"
_CHANGES: Final = "SELECT seq, kind, key, body FROM changes WHERE seq > ? ORDER BY seq LIMIT ?"
_CHANGE: Final = "INSERT INTO changes (seq, kind, key, body) VALUES (?, ?, ?, ?)"


class TrailReading(SqlTables):
    """Reads the audit chain and the change log."""

    def chain_head(self) -> ChainHead:
        """Give the last link of the audit chain; ``GENESIS`` when it is empty."""
        row = self._sql.row(_CHAIN_HEAD)
        return GENESIS if row is None else ChainHead(row[0], row[1])

    def records(self, after: int, limit: int) -> tuple[ChainedRecord, ...]:
        """Give up to ``limit`` audit rows after a number, in order."""
        return tuple(ChainedRecord(*row) for row in self._sql.rows(_RECORDS, (after, limit)))

    def change_head(self) -> int:
        """Give the last change's number; 0 when there is none."""
        return _number(self._sql, _CHANGE_HEAD)

    def changes_since(self, seq: int, limit: int) -> tuple[Change, ...] | None:
        """Give up to ``limit`` changes after a number; None when the log does not reach back, or not that far ahead."""
        tail, head = _number(self._sql, _CHANGE_TAIL), self.change_head()
        # A number beyond our head is another history's (a restored backup): it cannot be resumed either.
        if seq > head or seq < 0 or (head and seq + 1 < tail):
            return None
        return tuple(Change(*row) for row in self._sql.rows(_CHANGES, (seq, limit)))


class TrailWriting(TrailReading):
    """Appends to the audit chain and the change log, and keeps what is to be published."""

    def __init__(self, sql: Sql) -> None:
        """Start with nothing known and nothing to publish."""
        super().__init__(sql)
        self._chain: ChainHead | None = None
        self._last: int | None = None
        self._noted: list[Change] = []

    def record(self, record: Record) -> int:
        """Append to the audit chain and give the row's number."""
        link = append(super().chain_head() if self._chain is None else self._chain, record)
        self._sql.append(_RECORD, (link.seq, link.prev, link.body, link.hash))
        self._chain = ChainHead(link.seq, link.hash)
        return link.seq

    def change(self, kind: str, key: str, body: str) -> int:
        """Append to the change log and give the number."""
        seq = (super().change_head() if self._last is None else self._last) + 1
        self._sql.run(_CHANGE, (seq, kind, key, body))
        self._last = seq
        self._noted.append(Change(seq, kind, key, body))
        return seq

    def last_change(self) -> int | None:
        """Give the number of the last change that was noted since the last take; None when there is none."""
        return self._noted[-1].seq if self._noted else None

    def last_record(self) -> int | None:
        """Give the number of the last audit row that is known; None when nobody asked since the last undo."""
        return None if self._chain is None else self._chain.seq

    def pending(self) -> int:
        """Count the changes noted since the last take."""
        return len(self._noted)

    def undo(self, keep: int) -> None:
        """Forget the changes beyond ``keep``, and both heads."""
        del self._noted[keep:]
        self._chain = None
        self._last = None

    def take(self) -> Sequence[Change]:
        """Hand out the noted changes and start anew."""
        noted, self._noted = self._noted, []
        return noted


def _number(sql: Sql, text: str) -> int:
    row = sql.row(text)
    return 0 if row is None else int(row[0])
