"""How SQLite's transactions go: the steps of a group for the writer's thread, and snapshots for the readers'."""

import sqlite3
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, TypeVar

from sqlite_utils import Database
from typing_extensions import override

from broker.errors import Unavailable
from broker.server.store.asking import RememberingSql
from broker.server.store.group import Bench, EntangledError
from broker.server.store.ports import Reader
from broker.server.store.reading import Snapshots
from broker.server.store.rows import Change
from broker.server.store.sqlite_connection import SqliteSql, open_reader, storage_fault
from broker.server.store.tables import SqlReader, SqlWriter

T = TypeVar("T")

CAREFUL_GROUPS: Final = 1_000
"""Groups with savepoints after one that had to run again: whoever provokes that slows others by a thousandth."""


class SqliteWriting(Bench):
    """The one connection that writes. ``check`` raises when the file is not ours any more.

    A savepoint copies every page that its act writes, and nearly no act needs it: one that is refused has seldom written
    anything before. So a group runs without, and where an act does raise after it wrote, all of it is undone and runs again with them.
    """

    def __init__(self, db: Database, check: Callable[[], None]) -> None:
        """Work on an open, migrated database."""
        self._db = db
        self._execute = db.conn.execute
        self._check = check
        self._sql = RememberingSql(SqliteSql(db))
        self._tables = SqlWriter(self._sql)
        self._kept = self._wrote = 0
        self._careful = 0
        self._apart = False
        self._version = self._data_version()

    @property
    @override
    def tables(self) -> SqlWriter:
        return self._tables

    @property
    @override
    def in_transaction(self) -> bool:
        return self._db.conn.in_transaction

    @override
    def begin(self) -> None:
        self._require_ours()
        self._apart = self._careful > 0
        self._careful -= self._apart
        self._execute("BEGIN IMMEDIATE")
        version = self._data_version()
        if version != self._version:
            # Rows written by another process (a repair by hand): what is known of rows is read again.
            self._version = version
            self._tables.undo(0)

    @override
    def begin_act(self) -> None:
        self._kept, self._wrote = self._tables.pending(), self._sql.writes
        if self._apart:
            self._execute("SAVEPOINT act")

    @override
    def keep_act(self) -> None:
        if self._apart:
            self._execute("RELEASE act")

    @override
    def undo_act(self) -> None:
        if self._apart:
            self._execute("ROLLBACK TO act")
            self._execute("RELEASE act")
        elif self._sql.writes != self._wrote:
            self._careful = CAREFUL_GROUPS
            raise EntangledError
        self._tables.undo(self._kept)

    @override
    def commit(self) -> Sequence[Change]:
        self._execute("COMMIT")
        return self._tables.take()

    @override
    def rollback(self) -> None:
        try:
            if self._db.conn.in_transaction:
                self._execute("ROLLBACK")
        except sqlite3.Error:
            # Then BEGIN fails as well, each caller is told, and the next rollback tries again.
            pass
        self._tables.undo(0)

    @override
    def fault(self, error: BaseException) -> Unavailable | None:
        cause = error.__cause__ if isinstance(error, Unavailable) else error
        return storage_fault(cause) if isinstance(cause, sqlite3.Error) else None

    @override
    def may_repeat(self, error: BaseException) -> bool:
        # Nobody else writes: what the storage refuses once it refuses again.
        return isinstance(error, EntangledError)

    @override
    def close(self) -> None:
        self._db.close()

    def _require_ours(self) -> None:
        try:
            self._check()
        except Unavailable:
            # If it is the log that is gone, what it holds is still open here: bring it home while that lasts.
            self._execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
            raise

    def _data_version(self) -> object:
        return self._execute("PRAGMA data_version").fetchone()[0]


class SqliteSnapshots(Snapshots):
    """One connection that reads."""

    def __init__(self, path: Path) -> None:
        """Open it."""
        self._db = open_reader(path)
        self._tables = SqlReader(SqliteSql(self._db))
        # The log is opened by the first question: ask it now, while the files are surely ours.
        self._tables.change_head()

    @override
    def read(self, query: Callable[[Reader], T]) -> T:
        try:
            self._db.conn.execute("BEGIN")
            try:
                return query(self._tables)
            finally:
                if self._db.conn.in_transaction:
                    self._db.conn.execute("ROLLBACK")
        except sqlite3.Error as error:
            fault = storage_fault(error)
            if fault is None:
                raise
            raise fault from error

    @override
    def close(self) -> None:
        self._db.close()
