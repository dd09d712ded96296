"""The PostgreSQL adapter of the store: any number of servers on one database, each with one writer, a few readers, one follower.

Acknowledged means durable: ``synchronous_commit`` is on, and nothing is told to anyone, neither a result nor a change, before the
COMMIT that holds it has returned. With standbys, what a fail-over may lose is decided by the database's
``synchronous_standby_names``. All public methods belong to the event loop's thread.

While the database does not answer, callers are told so within ``CURRENT_SECONDS``, whatever their thread is waiting for; once it
answers again, everything goes on by itself.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Final, Self, TypeVar

from typing_extensions import override

from broker.clock import Clock, SystemClock
from broker.errors import Unavailable
from broker.server.store.following import BEAT_SECONDS, CURRENT_SECONDS, Follower
from broker.server.store.group import Bench, Group, GroupWriter
from broker.server.store.opening import check_chain_end, store_id
from broker.server.store.ports import Reader, Store, Writer
from broker.server.store.postgres_connection import PostgresSchema, PostgresSql, Target, connect, read_url
from broker.server.store.postgres_transactions import MIGRATE_LOCK, PostgresSnapshots, PostgresWriting
from broker.server.store.reading import ReadPool
from broker.server.store.rows import Change
from broker.server.store.schema import Migration, known_migrations, migrate
from broker.server.store.writing import WriteQueue, short_turns

CLOSE_SECONDS: Final = 5.0
"""How long closing waits for a database that does not answer: what was accepted may then be unknown, as after a kill."""
LOOK_SECONDS: Final = 0.25
"""How often the loop looks whether the follower is current."""

T = TypeVar("T")


class PostgresStore(Store):
    """A store in a PostgreSQL database. Made by :meth:`open` only."""

    def __init__(self, target: Target, clock: Clock, migrations: Sequence[Migration]) -> None:
        """Prepare; nothing is opened yet."""
        self._connect = partial(connect, target)
        self._clock = clock
        self._migrations = migrations
        self._loop = asyncio.get_running_loop()
        self._bench: PostgresWriting | None = None
        self._writer = GroupWriter(self._open_bench, self._hand_over)
        # Statements wait for the network: the loop has better things to do meanwhile.
        self._writes = WriteQueue(self._writer.submit, self._loop, hold=0)
        self._readers = ReadPool(partial(PostgresSnapshots, self._connect))
        self._follower: Follower | None = None
        self._look: asyncio.TimerHandle | None = None
        self._is_open = False
        self._id = ""

    @classmethod
    @asynccontextmanager
    async def open(
        cls, url: str, *, clock: Clock | None = None, migrations: Sequence[Migration] | None = None
    ) -> AsyncIterator[Self]:
        """Open the database at a URL, make or migrate its schema, and close it at the end; raises Misconfigured, Unavailable.

        Closing finishes every act that was accepted, as long as the database answers.
        """
        store = cls(read_url(url), clock or SystemClock(), known_migrations() if migrations is None else migrations)
        try:
            await store._start()
            with short_turns():
                yield store
        finally:
            await store._close()

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
        """Tell whether subscribers know all that any server committed until a moment ago."""
        return self._is_open and self._follower is not None and self._follower.is_current

    @property
    @override
    def written(self) -> int:
        """How many acts this process has asked for."""
        return self._writes.written

    @property
    @override
    def is_shared(self) -> bool:
        """True."""
        return True

    @override
    async def write(self, act: Callable[[Writer], T]) -> T:
        """Run one act and give its result once it is durable; Unavailable (store_unreachable, store_outcome_unknown, …)."""
        self._require_current()
        return await self._writes.put(act)

    @override
    async def read(self, query: Callable[[Reader], T]) -> T:
        """Run one query on a committed snapshot; Unavailable (store_unreachable, store_overloaded, …)."""
        self._require_current()
        return await self._readers.run(query)

    @override
    def subscribe(self, callback: Callable[[Sequence[Change]], None]) -> Callable[[], None]:
        """Have committed changes told, whoever made them, in order, on the event loop; give the function that ends it."""
        return self._writes.subscribe(callback)

    @override
    async def check(self) -> None:
        """Raise Unavailable when the store cannot be read or written, or has lost what it had."""
        if not self._writer.is_alive:
            raise Unavailable("the store's writer has ended", code="store_closed", hint="restart the server")
        await self.read(lambda reader: reader.change_head())

    def _require_current(self) -> None:
        if not self._is_open:
            raise Unavailable("the store is closed", code="store_closed", hint="the server is stopping")
        if not self.is_current:
            raise self._cut_off()

    def _cut_off(self) -> Unavailable:
        broken = None if self._follower is None else self._follower.broken
        return broken or Unavailable(
            f"the database has not answered for {CURRENT_SECONDS:g} seconds",
            code="store_unreachable",
            hint="it goes on by itself once the database answers",
        )

    async def _start(self) -> None:
        await asyncio.to_thread(self._writer.start)
        bench = self._bench
        assert bench is not None
        self._follower = Follower(
            self._connect,
            self._channel,
            told=lambda: self._writes.head,
            is_own=lambda backend: backend == bench.backend,
            take_in=self._take_in_soon,
        )
        await asyncio.to_thread(self._follower.start)
        await asyncio.to_thread(self._readers.open)
        self._is_open = True
        self._watch()

    def _watch(self) -> None:
        if not self.is_current:
            # Their threads wait for an answer that may never come; their callers need not.
            self._writes.give_up(self._cut_off())
            self._readers.give_up(self._cut_off())
        self._look = self._loop.call_later(LOOK_SECONDS, self._watch)

    @property
    def _channel(self) -> str:
        return f"broker_{self._id}"

    def _open_bench(self) -> Bench:
        """Connect, migrate, check and name the database; in the writer's thread."""
        with self._connect() as connection:
            migrate(PostgresSchema(connection, MIGRATE_LOCK), self._migrations, self._clock)
            self._id = store_id(PostgresSql(connection))
        bench = PostgresWriting(self._connect, self._channel, lambda: self._writes.head)
        try:
            check_chain_end(bench.tables)
            self._writes.head = bench.tables.change_head()
        except BaseException:
            bench.close()
            raise
        self._bench = bench
        return bench

    def _hand_over(self, group: Group) -> None:
        self._writes.settle_soon(group)

    def _take_in_soon(self, changes: Sequence[Change]) -> None:
        # From the follower's thread; a loop that is gone has nobody left to tell.
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._writes.take_in, changes)

    async def _close(self) -> None:
        self._is_open = False
        if self._look is not None:
            self._look.cancel()
        with suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_SECONDS):
                await self._writes.drained()
        answers = self._follower is not None and self._follower.is_current
        if self._follower is not None:
            await asyncio.to_thread(self._follower.stop)
        await asyncio.to_thread(self._writer.stop, CLOSE_SECONDS if answers else BEAT_SECONDS)
        await self._readers.close(wait=answers)
