"""SQLite connections: how they are opened, what their errors mean, and the :class:`Sql` and :class:`Schema` over them.

Knows the settings that durability rests on (WAL, ``synchronous=FULL``) and reads each of them back. Knows no table.
"""

import sqlite3
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Final, NoReturn
from urllib.parse import quote

from sqlite_utils import Database
from typing_extensions import override

from broker.errors import Misconfigured, Unavailable
from broker.server.store.schema import Schema
from broker.server.store.sql import Dangling, Duplicate, Row, Sql, Value, not_storable

BUSY_TIMEOUT_MS: Final = 2_000
"""How long to wait for another process's lock (a backup, a checkpoint): what a caller still waits for."""
CACHED_STATEMENTS: Final = 256
"""More than the store has statements, so that each is prepared once per connection."""
CHECKPOINT_PAGES: Final = 8_000
"""Copy the log back every 32 MiB: rarely enough to cost little, often enough that a start replays it in a moment."""
WAL_KEPT_BYTES: Final = 64 << 20
"""What the log file may keep after a long reader let it grow."""
WRITER_CACHE_KIB: Final = 65_536
"""Page cache of the writer: the unique indexes of a busy day fit, so that an insert reads no page."""

_FULL: Final = 2
_PRIMARY: Final = 0xFF
_FAULTS: Final = {
    sqlite3.SQLITE_FULL: ("store_full", "free space on the store's file system; the server goes on by itself"),
    sqlite3.SQLITE_READONLY: ("store_readonly", "the store's file system or file is read-only"),
    sqlite3.SQLITE_IOERR: ("store_io", "the store's file system reports errors"),
    sqlite3.SQLITE_CANTOPEN: ("store_io", "the store's files cannot be opened"),
    sqlite3.SQLITE_BUSY: ("store_busy", "another process holds the database locked"),
    sqlite3.SQLITE_LOCKED: ("store_busy", "another process holds the database locked"),
    sqlite3.SQLITE_PROTOCOL: ("store_busy", "another process holds the database locked"),
    sqlite3.SQLITE_NOMEM: ("store_memory", "the server is out of memory"),
    sqlite3.SQLITE_INTERRUPT: ("store_closed", "the server is stopping"),
    sqlite3.SQLITE_CORRUPT: ("store_corrupt", "restore the database from a backup"),
    sqlite3.SQLITE_NOTADB: ("store_corrupt", "restore the database from a backup"),
}
_DUPLICATE: Final = (sqlite3.SQLITE_CONSTRAINT_UNIQUE, sqlite3.SQLITE_CONSTRAINT_PRIMARYKEY)


def storage_fault(error: sqlite3.Error) -> Unavailable | None:
    """Give what a caller is told when the storage refuses; None when the error is a defect of ours."""
    code = getattr(error, "sqlite_errorcode", None)
    fault = None if code is None else _FAULTS.get(code & _PRIMARY)
    if fault is None:
        return None
    return Unavailable(f"the store cannot do this now ({error.sqlite_errorname})", code=fault[0], hint=fault[1])


class SqliteSql(Sql):
    """One SQLite connection as the tables see it."""

    def __init__(self, db: Database) -> None:
        """Speak through this connection."""
        # The driver's own method: sqlite-utils wraps it in checks of a transaction that the engine keeps itself.
        self._execute = db.conn.execute

    @override
    def run(self, text: str, values: Sequence[Value] = ()) -> int:
        _require_storable(values)
        try:
            return self._execute(text, values).rowcount
        except (sqlite3.Error, UnicodeEncodeError) as error:
            _refuse(error)

    @override
    def attempt(self, text: str, values: Sequence[Value] = ()) -> int:
        # A statement that a constraint refuses is undone by itself here.
        try:
            return self.run(text, values)
        except sqlite3.IntegrityError as error:
            if error.sqlite_errorcode in _DUPLICATE:
                raise Duplicate from error
            if error.sqlite_errorcode == sqlite3.SQLITE_CONSTRAINT_FOREIGNKEY:
                raise Dangling from error
            raise

    @override
    def row(self, text: str, values: Sequence[Value] = ()) -> Row | None:
        _require_storable(values)
        try:
            row: Row | None = self._execute(text, values).fetchone()
        except (sqlite3.Error, UnicodeEncodeError) as error:
            _refuse(error)
        return row

    @override
    def rows(self, text: str, values: Sequence[Value] = ()) -> list[Row]:
        _require_storable(values)
        try:
            return self._execute(text, values).fetchall()
        except (sqlite3.Error, UnicodeEncodeError) as error:
            _refuse(error)


def _require_storable(values: Sequence[Value]) -> None:
    # SQLite would keep a NUL; no other store does, and a path that is cut off at one is another path.
    for value in values:
        if isinstance(value, str) and "\0" in value:
            raise not_storable()


def _refuse(error: sqlite3.Error | UnicodeEncodeError) -> NoReturn:
    if isinstance(error, UnicodeEncodeError):
        raise not_storable() from None
    fault = storage_fault(error)
    if fault is None:
        raise error
    raise fault from error


class SqliteSchema(Schema):
    """What migrating asks of SQLite; the texts are in its dialect. The caller holds the file's lock."""

    def __init__(self, db: Database) -> None:
        """Migrate through this connection."""
        self._db = db
        self._sql = SqliteSql(db)

    @property
    @override
    def sql(self) -> Sql:
        return self._sql

    @override
    def table_names(self) -> Collection[str]:
        return self._db.table_names()

    @override
    def define(self, statement: str) -> None:
        self._db.execute(statement)

    @override
    def alone(self) -> AbstractContextManager[object]:
        return nullcontext()

    @override
    def atomic(self) -> AbstractContextManager[object]:
        return self._db.atomic()


def open_writer(path: Path) -> Database:
    """Open the connection that writes; raises Misconfigured when the file system cannot do what durability needs."""
    db = _open(path, same_thread=True)
    _set(db, "journal_mode", "WAL", "wal")
    # NORMAL would lose acknowledged rows at power loss: a revocation could come undone.
    _set(db, "synchronous", "FULL", _FULL)
    _set(db, "foreign_keys", "ON", 1)
    # Savepoints undo in memory, not through files of a temporary directory that may be full.
    _set(db, "temp_store", "MEMORY", 2)
    _set(db, "cache_size", str(-WRITER_CACHE_KIB), -WRITER_CACHE_KIB)
    _set(db, "wal_autocheckpoint", str(CHECKPOINT_PAGES), CHECKPOINT_PAGES)
    _set(db, "journal_size_limit", str(WAL_KEPT_BYTES), WAL_KEPT_BYTES)
    return db


def open_reader(path: Path) -> Database:
    """Open a connection that only reads; it is used by one thread at a time."""
    db = _open(path, same_thread=False)
    _set(db, "query_only", "ON", 1)
    return db


def _open(path: Path, *, same_thread: bool) -> Database:
    # mode=rw: opening never makes a file; the one that was locked is there, or the open fails.
    connection = sqlite3.connect(
        f"file:{quote(str(path))}?mode=rw",
        uri=True,
        isolation_level=None,
        check_same_thread=same_thread,
        cached_statements=CACHED_STATEMENTS,
        timeout=BUSY_TIMEOUT_MS / 1000,
    )
    # No plug-ins: what other distributions hook into sqlite-utils has no business in here.
    db = Database(connection, execute_plugins=False)
    _set(db, "busy_timeout", str(BUSY_TIMEOUT_MS), BUSY_TIMEOUT_MS)
    _set(db, "trusted_schema", "OFF", 0)
    _set(db, "cell_size_check", "ON", 1)
    return db


def _set(db: Database, name: str, value: str, expected: object) -> None:
    db.execute(f"PRAGMA {name} = {value}").fetchall()
    found = db.execute(f"PRAGMA {name}").fetchone()[0]
    if found != expected:
        raise Misconfigured(
            f"SQLite did not take the setting {name} = {value}",
            code="store_setting",
            hint="put the database on a local file system, and use a SQLite of 3.37 or later",
        )
