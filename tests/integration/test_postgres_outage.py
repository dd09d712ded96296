"""What was acknowledged is there, whatever happens to PostgreSQL under two servers: real kills, under load."""

import asyncio
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from itertools import count
from pathlib import Path

import grpc.aio
import pytest

from broker.audit.records import Record
from broker.audit.verify import verify_chain
from broker.errors import Unavailable
from broker.server.store.postgres import PostgresStore
from broker.server.store.rows import Change
from tests.integration.identity_rig import Estate, join_token, running
from tests.integration.test_durability import exchange
from tests.postgresql import Cluster
from tests.unit.server.store.samples import task

WRITERS = 8
"""At each of the two servers."""
DEADLINE = 30.0
PAUSE = 0.02


@pytest.fixture
def own() -> Iterator[Cluster]:
    """A PostgreSQL that nobody else uses: it is stopped and killed."""
    one = Cluster()
    try:
        why = one.unusable()
        if why is not None:
            pytest.skip(why)
        one.make()
        one.start()
        yield one
    finally:
        one.remove()


class Load:
    """Writers at two servers, and what they were told."""

    def __init__(self, *stores: PostgresStore) -> None:
        self.stores = stores
        self.acknowledged: list[str] = []
        self.asked: list[str] = []
        self.refusals: list[float] = []
        self.told: list[list[int]] = [[] for _ in stores]
        self._numbers = count()
        self._writers: list[asyncio.Future[None]] = []
        for store, told in zip(stores, self.told, strict=True):
            store.subscribe(lambda changes, told=told: told.extend(_seqs(changes)))  # type: ignore[misc]

    def start(self) -> None:
        self._writers = [asyncio.ensure_future(self.write(store)) for store in self.stores for _ in range(WRITERS)]

    async def end(self) -> None:
        for writer in self._writers:
            writer.cancel()
        await asyncio.gather(*self._writers, return_exceptions=True)
        # What a cancelled caller had begun may still take place: a write after it waits for its end.
        for store in self.stores:
            await written_once_possible(store)

    async def write(self, store: PostgresStore) -> None:
        loop = asyncio.get_running_loop()
        while True:
            name = f"w{next(self._numbers)}"
            began = loop.time()
            self.asked.append(name)
            try:
                await store.write(exchange(name))
            except Unavailable:
                self.refusals.append(loop.time() - began)
                await asyncio.sleep(PAUSE)
            else:
                self.acknowledged.append(name)

    async def until_each_writes(self) -> None:
        """Wait until every server has written anew, and follows what the other one writes."""
        for store in self.stores:
            head = await written_once_possible(store)
            async with asyncio.timeout(DEADLINE):
                # What follows has a connection of its own, which comes back in its own time.
                while store.head < head + 10 or not store.is_current:
                    await asyncio.sleep(PAUSE)

    async def until_refused(self) -> None:
        before = len(self.refusals)
        async with asyncio.timeout(DEADLINE):
            while len(self.refusals) < before + WRITERS:
                await asyncio.sleep(PAUSE)

    async def verify(self) -> None:
        """End the load, and hold what is there against what was told."""
        await self.end()
        store = self.stores[0]
        rows = await store.read(lambda r: r.records(0, 1_000_000))
        changes = await store.read(lambda r: r.changes_since(0, 1_000_000))
        assert verify_chain(rows).seq == len(rows)
        recorded = [Record.from_body(row.body).subject for row in rows]
        assert len(set(recorded)) == len(recorded)
        assert set(self.acknowledged) <= set(recorded) <= set(self.asked)
        assert changes is not None
        assert [change.key for change in changes] == recorded
        async with asyncio.timeout(DEADLINE):
            while any(one.head < changes[-1].seq for one in self.stores):
                await asyncio.sleep(PAUSE)
        for told in self.told:
            assert told == list(range(1, len(changes) + 1))


async def written_once_possible(store: PostgresStore) -> int:
    """Write nothing, after all that was asked for before; give the number of the last change."""
    async with asyncio.timeout(DEADLINE):
        while True:
            try:
                return await store.write(lambda w: w.change_head())
            except Unavailable:
                await asyncio.sleep(PAUSE)


def _seqs(changes: "list[Change]") -> list[int]:
    return [change.seq for change in changes]


@asynccontextmanager
async def loaded(url: str) -> AsyncIterator[Load]:
    async with PostgresStore.open(url) as one, PostgresStore.open(url) as other:
        await one.write(lambda w: w.add_task(task()))
        load = Load(one, other)
        load.start()
        try:
            await load.until_each_writes()
            yield load
        finally:
            await load.end()


@pytest.mark.bears("R02", "D01", "L05")
@pytest.mark.timeout(180)
async def test_nothing_acknowledged_is_lost_when_postgresql_is_killed_and_comes_back(own: Cluster) -> None:
    loop = asyncio.get_running_loop()
    async with loaded(own.database()) as load:
        for how in (signal.SIGKILL, signal.SIGQUIT, signal.SIGINT):
            await asyncio.to_thread(own.stop, how)
            load.refusals.clear()
            await load.until_refused()
            with pytest.raises(Unavailable):
                await load.stores[0].read(lambda r: r.change_head())
            assert max(load.refusals) < DEADLINE / 2

            await asyncio.to_thread(own.start)
            began = loop.time()
            await load.until_each_writes()
            print(f"{how.name}: back after {loop.time() - began:.2f} s, slowest refusal {max(load.refusals):.2f} s")
        await load.verify()


@pytest.mark.bears("R02")
@pytest.mark.timeout(180)
async def test_a_postgresql_that_stands_still_is_waited_for_by_nobody(own: Cluster) -> None:
    async with loaded(own.database()) as load:
        own.signal_all(signal.SIGSTOP)
        try:
            await load.until_refused()
            async with asyncio.timeout(DEADLINE):
                while any(store.is_current for store in load.stores):
                    await asyncio.sleep(PAUSE)
            assert max(load.refusals) < DEADLINE / 2
            print(f"slowest refusal {max(load.refusals):.2f} s")
        finally:
            own.signal_all(signal.SIGCONT)
        await load.until_each_writes()
        await load.verify()


@pytest.mark.bears("R03")
async def test_a_commit_that_a_standby_has_not_confirmed_is_not_acknowledged(own: Cluster) -> None:
    url = own.database()
    async with PostgresStore.open(url) as store:
        assert await store.write(lambda w: w.change("k", "before", "")) == 1
        own.execute(url, "ALTER SYSTEM SET synchronous_standby_names = 'away'")
        own.execute(url, "SELECT pg_reload_conf()")
        told: list[int] = []
        store.subscribe(lambda changes: told.extend(_seqs(changes)))
        cancel = "SELECT pg_cancel_backend(pid) FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
        written, is_cancelled = 1, False
        async with asyncio.timeout(DEADLINE):
            while not is_cancelled:
                waiting = asyncio.ensure_future(store.write(lambda w: w.change("k", "unconfirmed", "")))
                while not waiting.done() and not is_cancelled:
                    is_cancelled = bool(await asyncio.to_thread(own.execute, url, cancel))
                    await asyncio.sleep(PAUSE)
                if not is_cancelled:
                    written = waiting.result()  # PostgreSQL's processes hear of a setting one after another
        with pytest.raises(Unavailable) as unknown:
            await waiting
        assert unknown.value.reason == "store_outcome_unknown"

        own.execute(url, "ALTER SYSTEM RESET synchronous_standby_names")
        own.execute(url, "SELECT pg_reload_conf()")
        async with asyncio.timeout(DEADLINE):
            assert await store.write(lambda w: w.change("k", "after", "")) == written + 2
        assert told == list(range(2, written + 3))


@pytest.mark.bears("R02")
async def test_a_server_goes_on_by_itself_when_postgresql_comes_back(own: Cluster) -> None:
    # Short: a Unix socket's path has at most 107 bytes.
    directory = Path(tempfile.mkdtemp(prefix="broker", dir="/tmp"))
    try:
        async with running(Estate(directory, own.database())) as server:
            assert await join_token(server)
            await asyncio.to_thread(own.stop, signal.SIGQUIT)
            for _ in range(3):
                with pytest.raises(grpc.aio.AioRpcError) as refused:
                    await join_token(server)
                assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
            await asyncio.to_thread(own.start)
            async with asyncio.timeout(DEADLINE):
                while True:
                    try:
                        await join_token(server)
                    except grpc.aio.AioRpcError:
                        await asyncio.sleep(PAUSE)
                    else:
                        break
            assert not server.failed.done()
    finally:
        shutil.rmtree(directory)
