"""The reading side: a few threads, each query on its own snapshot. A reader never waits for the writer, nor it for a reader."""

import asyncio
import queue
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Final, TypeVar

from sqlite_utils import Database

from broker.errors import Unavailable
from broker.server.store.connection import SqliteSql, open_reader, storage_fault
from broker.server.store.ports import Reader
from broker.server.store.tables import SqlReader

READERS: Final = 3
"""Connections and threads for reading: hot paths read memory, so few queries run at a time."""
QUEUE_LIMIT: Final = 1_024
"""Queries that may wait; more of them would only wait longer than their callers."""

T = TypeVar("T")


class ReadPool:
    """Reading connections, each used by one thread at a time."""

    def __init__(self, path: Path) -> None:
        """Prepare; nothing is opened before :meth:`open`."""
        self._path = path
        self._threads = ThreadPoolExecutor(READERS, thread_name_prefix="store-reader")
        self._free: queue.SimpleQueue[tuple[Database, SqlReader]] = queue.SimpleQueue()
        self._open: list[Database] = []
        self._waiting = 0

    def open(self) -> None:
        """Open the connections. Blocks."""
        for _ in range(READERS):
            db = open_reader(self._path)
            self._open.append(db)
            tables = SqlReader(SqliteSql(db))
            # The log is opened by the first question: ask it now, while the files are surely ours.
            tables.change_head()
            self._free.put((db, tables))

    async def run(self, query: Callable[[Reader], T]) -> T:
        """Run one query in a thread, on one snapshot; raises Unavailable, or what the query raises."""
        if self._waiting >= QUEUE_LIMIT:
            raise Unavailable(
                f"more than {QUEUE_LIMIT} reads are waiting", code="store_overloaded", hint="try again in a moment"
            )
        self._waiting += 1
        loop = asyncio.get_running_loop()
        work = self._threads.submit(self._run, query)
        # Counted down when the thread is done with it, not when its caller gives up.
        work.add_done_callback(lambda _: self._count_down_soon(loop))
        return await asyncio.wrap_future(work)

    async def close(self) -> None:
        """Let running queries finish, then close every connection."""
        await asyncio.to_thread(self._threads.shutdown)
        for db in self._open:
            db.close()

    def _count_down_soon(self, loop: asyncio.AbstractEventLoop) -> None:
        # From any thread; a loop that is gone counts nothing.
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(self._count_down)

    def _count_down(self) -> None:
        self._waiting -= 1

    def _run(self, query: Callable[[Reader], T]) -> T:
        # As many connections as threads: there is always a free one.
        db, tables = self._free.get()
        try:
            db.conn.execute("BEGIN")
            try:
                return query(tables)
            finally:
                if db.conn.in_transaction:
                    db.conn.execute("ROLLBACK")
        except sqlite3.Error as error:
            fault = storage_fault(error)
            if fault is None:
                raise
            raise fault from error
        finally:
            self._free.put((db, tables))
