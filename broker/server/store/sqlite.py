"""The SQLite adapter of the store: one writer thread with group commit, a few reading threads, one feed of changes.

Acknowledged means durable: WAL with ``synchronous=FULL``, and nothing is told to anyone, neither a result nor a change, before the
COMMIT that holds it has returned. One process per file, held by a lock. All public methods belong to the event loop's thread.
"""

import asyncio
import secrets
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Final, Self, TypeVar

from sqlite_utils import Database
from typing_extensions import override

from broker.audit.chain import GENESIS, ChainHead
from broker.audit.verify import ChainBroken, verify_chain
from broker.clock import Clock, SystemClock
from broker.errors import Misconfigured, Unavailable
from broker.server.store.connection import SqliteSql, open_writer
from broker.server.store.group import Bench, Group, GroupWriter
from broker.server.store.location import LockedFile
from broker.server.store.ports import Reader, Store, Writer
from broker.server.store.reading import ReadPool
from broker.server.store.rows import Change
from broker.server.store.schema import Migration, known_migrations, migrate
from broker.server.store.tables import SqlWriter
from broker.server.store.writing import WriteQueue

CHECKED_AT_START: Final = 1_000
"""Audit records checked when the store opens: the end is what a crash or a half-restored copy would damage."""

SWITCH_SECONDS: Final = 0.0005
"""How soon a busy event loop must hand the interpreter to a thread that waits, such as the writer after its COMMIT.

At Python's 5 ms, a loop that turns faster than that restarts the wait at each turn: COMMITs were seen to wait for seconds.
"""

T = TypeVar("T")


class SqliteStore(Store):
    """A store in one SQLite file. Made by :meth:`open` only."""

    def __init__(self, file: LockedFile, clock: Clock, migrations: Sequence[Migration]) -> None:
        """Prepare; nothing is opened yet."""
        self._file = file
        self._clock = clock
        self._migrations = migrations
        self._writer = GroupWriter(self._open_bench, self._hand_over)
        self._writes = WriteQueue(self._writer.submit, asyncio.get_running_loop())
        self._readers = ReadPool(file.path)
        self._is_open = True
        self._id = ""

    @classmethod
    @asynccontextmanager
    async def open(
        cls, path: Path, *, clock: Clock | None = None, migrations: Sequence[Migration] | None = None
    ) -> AsyncIterator[Self]:
        """Open (or make) the database at a path, and close it at the end; raises Misconfigured, Unavailable.

        Closing finishes every act that was accepted.
        """
        file = await asyncio.to_thread(LockedFile, path)
        try:
            store = cls(file, clock or SystemClock(), known_migrations() if migrations is None else migrations)
            try:
                await asyncio.to_thread(store._writer.start)
                await asyncio.to_thread(store._readers.open)
                with _short_turns():
                    yield store
            finally:
                await store._close()
        finally:
            file.release()

    @property
    @override
    def id(self) -> str:
        """The store's own name, made with it."""
        return self._id

    @property
    @override
    def head(self) -> int:
        """The number of the last change that subscribers were told of."""
        return self._writes.head

    @override
    async def write(self, act: Callable[[Writer], T]) -> T:
        """Run one act and give its result once it is durable; Unavailable (store_overloaded, store_full, …)."""
        self._require_open()
        return await self._writes.put(act)

    @override
    async def read(self, query: Callable[[Reader], T]) -> T:
        """Run one query on a committed snapshot; Unavailable (store_overloaded, …)."""
        self._require_open()
        return await self._readers.run(query)

    @override
    def subscribe(self, callback: Callable[[Sequence[Change]], None]) -> Callable[[], None]:
        """Have committed changes told, in order, on the event loop; give the function that ends it."""
        return self._writes.subscribe(callback)

    @override
    async def check(self) -> None:
        """Raise Unavailable when the store cannot be read or written, or its file is not the one that was opened."""
        self._file.check()
        if not self._writer.is_alive:
            raise Unavailable("the store's writer has ended", code="store_closed", hint="restart the server")
        await self.read(lambda reader: reader.change_head())

    def _require_open(self) -> None:
        if not self._is_open:
            raise Unavailable("the store is closed", code="store_closed", hint="the server is stopping")

    def _open_bench(self) -> Bench:
        """Open, migrate, check and name the database; in the writer's thread."""
        db = open_writer(self._file.path)
        try:
            migrate(db, self._migrations, self._clock)
            self._id = _store_id(db)
            tables = SqlWriter(SqliteSql(db))
            _check_chain_end(tables)
            self._writes.head = tables.change_head()
            self._file.remember_wal()
        except BaseException:
            db.close()
            raise
        return Bench(db, tables, self._file.check)

    def _hand_over(self, group: Group) -> None:
        self._writes.settle_soon(group)

    async def _close(self) -> None:
        self._is_open = False
        await self._writes.drained()
        await asyncio.to_thread(self._writer.stop)
        await self._readers.close()


@contextmanager
def _short_turns() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(min(before, SWITCH_SECONDS))
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def _store_id(db: Database) -> str:
    made = "INSERT INTO store_facts (name, value) VALUES ('id', ?) ON CONFLICT (name) DO NOTHING"
    db.execute(made, (secrets.token_hex(16),))
    name: str = db.execute("SELECT value FROM store_facts WHERE name = 'id'").fetchone()[0]
    return name


def _check_chain_end(tables: SqlWriter) -> None:
    start = GENESIS
    before = max(0, tables.chain_head().seq - CHECKED_AT_START)
    if before:
        link = tables.records(before - 1, 1)[0]
        start = ChainHead(link.seq, link.hash)
    try:
        verify_chain(tables.records(before, CHECKED_AT_START), start=start)
    except ChainBroken as error:
        raise Misconfigured(
            f"the end of the audit chain does not hold: {error.message}",
            code="store_audit_broken",
            hint="keep a copy for the investigation, and restore the database from a backup",
        ) from error
