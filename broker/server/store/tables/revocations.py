"""What was signed and has not expired, what of it was taken back, and the lists that say so.

Signing is the hot path: a batch is one row, appended, with one short index. Whoever revokes looks through all of them.
"""

# ruff: noqa: S608 - the texts are put together from constants of this module only

import json
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Final

from broker.server.store.revocation_rows import CrlRow, IssuedSvid, RevokedSvid
from broker.server.store.sql import Row, SqlTables, micros, moment
from broker.spiffe import SpiffeId

_ISSUED: Final = "SELECT authority, agent, svids FROM issued_svids WHERE not_after > ? AND svids LIKE ? ORDER BY seq"
_ADD_ISSUED: Final = "INSERT INTO issued_svids (seq, authority, agent, svids, not_after) VALUES (?, ?, ?, ?, ?)"
_REVOKED_COLUMNS: Final = "authority, serial, spiffe_id, entry_id, not_after, revoked_at, reason"
_REVOKED: Final = f"SELECT {_REVOKED_COLUMNS} FROM revoked_svids ORDER BY authority, serial"
_IS_REVOKED: Final = "SELECT 1 FROM revoked_svids WHERE serial = ?"
_ADD_REVOKED: Final = f"INSERT INTO revoked_svids ({_REVOKED_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT (authority, serial) DO NOTHING"
_CRL_COLUMNS: Final = "authority, indirect, number, this_update, next_update, der"
_CRLS: Final = f"SELECT {_CRL_COLUMNS} FROM crls ORDER BY authority, indirect"
_PUT_CRL: Final = (
    f"INSERT INTO crls ({_CRL_COLUMNS}) VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (authority, indirect) DO UPDATE SET"
    " number = excluded.number, this_update = excluded.this_update, next_update = excluded.next_update, der = excluded.der"
)
_WRITER: Final = json.JSONEncoder(separators=(",", ":"))


class RevocationReading(SqlTables):
    """Reads signed and revoked SVIDs and revocation lists."""

    def issued_svids(self, wanted: str, now: datetime) -> tuple[IssuedSvid, ...]:
        """Give the living SVIDs of which ``wanted`` is the serial number, the entry id or the SPIFFE ID, oldest first."""
        if not wanted:
            return ()
        # The database finds the batches that may hold it: an underscore matches anything there. Which do is judged here.
        batches = self._sql.rows(_ISSUED, (micros(now), f'%"{wanted}"%'))
        return tuple(
            one
            for batch in batches
            for one in _read_batch(batch)
            if one.not_after > now and wanted in {one.serial, one.entry_id, str(one.spiffe_id)}
        )

    def revoked_svids(self) -> tuple[RevokedSvid, ...]:
        """Give all that are kept, by authority and serial number."""
        return tuple(
            RevokedSvid(row[0], row[1], row[2], row[3], moment(row[4]), moment(row[5]), row[6])
            for row in self._sql.rows(_REVOKED)
        )

    def is_revoked(self, serial: str) -> bool:
        """Say whether an SVID of this serial number was revoked, whoever signed it."""
        return bool(self._sql.ask(_IS_REVOKED, (serial,)))

    def crls(self) -> tuple[CrlRow, ...]:
        """Give the newest list of each authority."""
        return tuple(
            CrlRow(row[0], bool(row[1]), row[2], moment(row[3]), moment(row[4]), row[5])
            for row in self._sql.rows(_CRLS)
        )


class RevocationWriting(RevocationReading):
    """Writes signed and revoked SVIDs and revocation lists."""

    def add_issued(self, seq: int, svids: Sequence[IssuedSvid]) -> None:
        """Keep one batch of one authority and agent, under the number of its last audit record."""
        first, last = svids[0], max(one.not_after for one in svids)
        batch = [[one.serial, one.entry_id, str(one.spiffe_id), int(one.not_after.timestamp())] for one in svids]
        self._sql.run(_ADD_ISSUED, (seq, first.authority, first.agent, _WRITER.encode(batch), micros(last)))

    def add_revoked(self, row: RevokedSvid) -> bool:
        """Keep; False when it was revoked before, and then nothing changes."""
        times = (micros(row.not_after), micros(row.revoked_at))
        values = (row.authority, row.serial, row.spiffe_id, row.entry_id, *times, row.reason)
        return self._sql.run(_ADD_REVOKED, values) == 1

    def put_crl(self, row: CrlRow) -> None:
        """Add, or replace the one of the same authority and kind."""
        times = (micros(row.this_update), micros(row.next_update))
        self._sql.run(_PUT_CRL, (row.authority, int(row.indirect), row.number, *times, row.der))


def _read_batch(batch: Row) -> Iterator[IssuedSvid]:
    authority, agent, svids = batch
    for serial, entry_id, spiffe_id, end in json.loads(svids):
        yield IssuedSvid(authority, serial, SpiffeId(spiffe_id), entry_id, agent, datetime.fromtimestamp(end, UTC))
