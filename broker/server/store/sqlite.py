"""The SQLite adapter of the store: one writer thread with group commit, a few reading threads, one feed of changes.

Acknowledged means durable: WAL with ``synchronous=FULL``, and nothing is told to anyone, neither a result nor a change, before the
COMMIT that holds it has returned. One process per file, held by a lock. All public methods belong to the event loop's thread.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Self, TypeVar

from typing_extensions import override

from broker.clock import Clock, SystemClock
from broker.errors import Unavailable
from broker.server.store.group import Bench, Group, GroupWriter
from broker.server.store.location import LockedFile
from broker.server.store.opening import check_chain_end, store_id
from broker.server.store.ports import Reader, Store, Writer
from broker.server.store.reading import ReadPool
from broker.server.store.rows import Change
from broker.server.store.schema import Migration, known_migrations, migrate
from broker.server.store.sqlite_connection import SqliteSchema, SqliteSql, open_writer
from broker.server.store.sqlite_transactions import SqliteSnapshots, SqliteWriting
from broker.server.store.writing import WriteQueue, short_turns

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
        self._readers = ReadPool(partial(SqliteSnapshots, file.path))
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
                with short_turns():
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

    @property
    @override
    def is_current(self) -> bool:
        """True: nobody else writes to the file."""
        return True

    @property
    @override
    def written(self) -> int:
        """How many acts this process has asked for."""
        return self._writes.written

    @property
    @override
    def is_shared(self) -> bool:
        """False: the file is locked."""
        return False

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
            migrate(SqliteSchema(db), self._migrations, self._clock)
            bench = SqliteWriting(db, self._file.check)
            self._id = store_id(SqliteSql(db))
            check_chain_end(bench.tables)
            self._writes.head = bench.tables.change_head()
            self._file.remember_wal()
        except BaseException:
            db.close()
            raise
        return bench

    def _hand_over(self, group: Group) -> None:
        self._writes.settle_soon(group)

    async def _close(self) -> None:
        self._is_open = False
        await self._writes.drained()
        await asyncio.to_thread(self._writer.stop)
        await self._readers.close()
