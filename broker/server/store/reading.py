"""The reading side: a few threads, each query on its own snapshot. A reader never waits for the writer, nor it for a reader."""

import asyncio
import queue
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import Any, Final, Protocol, TypeVar

from broker.errors import Unavailable
from broker.server.store.ports import Reader
from broker.server.store.writing import awaitable

READERS: Final = 3
"""Connections and threads for reading: hot paths read memory, so few queries run at a time."""
QUEUE_LIMIT: Final = 1_024
"""Queries that may wait; more of them would only wait longer than their callers."""

T = TypeVar("T")


class Snapshots(Protocol):
    """One connection that reads, used by one thread at a time."""

    def read(self, query: Callable[[Reader], T]) -> T:
        """Run a query on one committed snapshot; Unavailable, or what the query raises. Blocks."""
        ...

    def close(self) -> None:
        """Close the connection."""
        ...


class ReadPool:
    """Reading connections, each used by one thread at a time."""

    def __init__(self, connect: Callable[[], Snapshots]) -> None:
        """Prepare; nothing is opened before :meth:`open`."""
        self._connect = connect
        self._threads = ThreadPoolExecutor(READERS, thread_name_prefix="store-reader")
        self._free: queue.SimpleQueue[Snapshots] = queue.SimpleQueue()
        self._waiting: set[asyncio.Future[Any]] = set()
        self._running = 0

    def open(self) -> None:
        """Open the connections. Blocks."""
        for _ in range(READERS):
            self._free.put(self._connect())

    async def run(self, query: Callable[[Reader], T]) -> T:
        """Run one query in a thread, on one snapshot; raises Unavailable, or what the query raises."""
        if self._running >= QUEUE_LIMIT:
            raise Unavailable(
                f"more than {QUEUE_LIMIT} reads are waiting", code="store_overloaded", hint="try again in a moment"
            )
        self._running += 1
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        self._waiting.add(future)
        work = self._threads.submit(self._run, query)
        # Counted down when the thread is done with it, not when its caller gives up.
        work.add_done_callback(lambda _: self._settle_soon(loop, work, future))
        try:
            return await future
        finally:
            self._waiting.discard(future)

    def give_up(self, error: Unavailable) -> None:
        """Tell all who wait that no answer will come in time; the threads go on, and their answers are dropped."""
        for future in self._waiting:
            if not future.done():
                future.set_exception(Unavailable(error.message, code=error.reason, hint=error.hint))

    async def close(self, *, wait: bool = True) -> None:
        """Let running queries finish, then close every connection; without ``wait``, leave them to the end of the process."""
        await asyncio.to_thread(self._threads.shutdown, wait, cancel_futures=not wait)
        # Those that are not free are in use by a thread that waits for an answer, and go with the process.
        with suppress(queue.Empty):
            while True:
                self._free.get_nowait().close()

    def _settle_soon(self, loop: asyncio.AbstractEventLoop, work: Future[T], future: asyncio.Future[T]) -> None:
        # From any thread; a loop that is gone waits for nothing.
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(self._settle, work, future)

    def _settle(self, work: Future[T], future: asyncio.Future[T]) -> None:
        self._running -= 1
        if future.done():
            return
        if work.cancelled():
            future.set_exception(Unavailable("the store is closed", code="store_closed"))
            return
        error = work.exception()
        if error is None:
            future.set_result(work.result())
        else:
            future.set_exception(awaitable(error))

    def _run(self, query: Callable[[Reader], T]) -> T:
        # As many connections as threads: there is always a free one.
        one = self._free.get()
        try:
            return one.read(query)
        finally:
            self._free.put(one)
