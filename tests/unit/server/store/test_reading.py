import asyncio
import threading
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path

import pytest

from broker.clock import SystemClock
from broker.errors import Unavailable
from broker.server.store import reading
from broker.server.store.ports import Reader
from broker.server.store.reading import READERS, ReadPool
from broker.server.store.schema import known_migrations, migrate
from broker.server.store.sqlite_connection import SqliteSchema, open_writer
from broker.server.store.sqlite_transactions import SqliteSnapshots


@pytest.fixture
async def pool(tmp_path: Path) -> AsyncIterator[ReadPool]:
    path = tmp_path / "x.db"
    path.touch()
    db = open_writer(path)
    migrate(SqliteSchema(db), known_migrations(), SystemClock())
    made = ReadPool(partial(SqliteSnapshots, path))
    made.open()
    yield made
    await made.close()
    db.close()


async def test_queries_run_side_by_side_in_their_own_threads(pool: ReadPool) -> None:
    together = threading.Barrier(READERS, timeout=30)

    def query(_: Reader) -> str:
        together.wait()
        return threading.current_thread().name

    names = await asyncio.gather(*(pool.run(query) for _ in range(READERS)))
    assert len(set(names)) == READERS


async def test_what_a_query_raises_reaches_its_caller_and_the_connection_stays_usable(pool: ReadPool) -> None:
    def query(_: Reader) -> None:
        raise LookupError

    for _ in range(2 * READERS):
        with pytest.raises(LookupError):
            await pool.run(query)
    assert await pool.run(lambda r: r.change_head()) == 0


async def test_more_than_may_wait_are_told_to_come_again(pool: ReadPool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "QUEUE_LIMIT", READERS + 1)
    go_on = threading.Event()
    waiting = [asyncio.ensure_future(pool.run(lambda _: go_on.wait(10))) for _ in range(READERS + 1)]
    await asyncio.sleep(0)
    with pytest.raises(Unavailable) as overloaded:
        await pool.run(lambda _: None)
    assert overloaded.value.reason == "store_overloaded"

    # Giving up does not make room: the query still runs.
    waiting[0].cancel()
    await asyncio.sleep(0)
    with pytest.raises(Unavailable):
        await pool.run(lambda _: None)
    go_on.set()
    await asyncio.gather(*waiting, return_exceptions=True)
    assert await pool.run(lambda r: r.change_head()) == 0


async def test_who_is_told_that_no_answer_will_come_waits_no_longer_than_that(pool: ReadPool) -> None:
    go_on = threading.Event()
    waiting = [asyncio.ensure_future(pool.run(lambda _: go_on.wait(10))) for _ in range(READERS + 2)]
    await asyncio.sleep(0)
    pool.give_up(Unavailable("silent", code="store_unreachable"))
    outcomes = await asyncio.gather(*waiting, return_exceptions=True)
    assert {isinstance(each, Unavailable) and each.reason for each in outcomes} == {"store_unreachable"}
    go_on.set()
    assert await pool.run(lambda r: r.change_head()) == 0


async def test_a_query_that_raises_stop_iteration_ends_nobody(pool: ReadPool) -> None:
    with pytest.raises(RuntimeError):
        await asyncio.wait_for(pool.run(lambda _: next(iter(()))), 30)
