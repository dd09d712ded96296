"""What PostgreSQL adds to the contract: several servers on one database, and connections that are lost."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from broker.audit.verify import verify_chain
from broker.errors import Misconfigured, Refused, Unavailable
from broker.server import failpoints
from broker.server.store.following import CURRENT_SECONDS
from broker.server.store.ports import Store, Writer
from broker.server.store.postgres import PostgresStore
from broker.server.store.rows import Change
from broker.server.store.schema import Migration, known_migrations
from tests.fakes.postgres_proxy import PostgresProxy
from tests.postgresql import Cluster
from tests.unit.server.store.samples import HOUR, NODE, NOW, record

DEADLINE = 20.0
"""For what takes milliseconds; for what takes as long as CURRENT_SECONDS, on a busy machine."""
STANDS_STILL = (
    "SELECT 1 FROM pg_stat_activity WHERE state = 'idle in transaction' AND state_change < now() - interval '100 ms'"
)
"""Somebody has begun a transaction and asks nothing more."""


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE):
        while not condition():
            await asyncio.sleep(0.01)


def say(w: Writer) -> int:
    w.record(record())
    return w.change("k", "x", "")


@pytest.fixture
async def pair(postgresql: str) -> AsyncIterator[tuple[PostgresStore, PostgresStore]]:
    async with PostgresStore.open(postgresql) as one, PostgresStore.open(postgresql) as other:
        yield one, other


@pytest.fixture
def proxy(cluster: Cluster, tmp_path: Path) -> Iterator[PostgresProxy]:
    made = PostgresProxy(tmp_path / "p", cluster.directory)
    yield made
    made.close()


@asynccontextmanager
async def through(proxy: PostgresProxy, url: str) -> AsyncIterator[PostgresStore]:
    async with PostgresStore.open(url.replace(str(proxy.server), str(proxy.directory))) as store:
        yield store


class TestServersOnOneDatabase:
    async def test_each_hears_of_all_changes_in_order_without_gap_or_double(
        self, pair: tuple[PostgresStore, PostgresStore]
    ) -> None:
        told: tuple[list[Change], list[Change]] = ([], [])
        for store, heard in zip(pair, told, strict=True):
            store.subscribe(heard.extend)

        async def write(number: int) -> None:
            here = number % 2
            if number % 10 == 0:
                with pytest.raises(ZeroDivisionError):
                    await pair[here].write(lambda w: (say(w), 1 // 0))
                return
            seq = await pair[here].write(say)
            # Before the result, whoever committed what lies before it.
            assert [change.seq for change in told[here][:seq]] == list(range(1, seq + 1))
            await asyncio.sleep(number % 7 / 1000)
            await pair[here].write(say)

        for part in range(0, 300, 50):
            await asyncio.gather(*(write(number) for number in range(part, part + 50)))
        await until(lambda: pair[0].head == pair[1].head == 540)

        assert [change.seq for change in told[0]] == list(range(1, 541))
        assert told[0] == told[1]
        rows = await pair[0].read(lambda r: r.records(0, 1000))
        assert verify_chain(rows).seq == 540
        assert await pair[1].read(lambda r: r.changes_since(0, 1000)) == tuple(told[0])

    async def test_one_that_is_idle_is_told_too(self, pair: tuple[PostgresStore, PostgresStore]) -> None:
        heard: list[Change] = []
        pair[1].subscribe(heard.extend)
        for number in range(3):
            await pair[0].write(lambda w, number=number: w.change("k", str(number), ""))
            await until(lambda number=number: pair[1].head == number + 1)  # type: ignore[misc]
        assert [change.key for change in heard] == ["0", "1", "2"]
        assert pair[0].id == pair[1].id

    async def test_more_changes_than_one_page_are_all_told(self, pair: tuple[PostgresStore, PostgresStore]) -> None:
        heard: list[Change] = []
        pair[1].subscribe(heard.extend)
        await pair[0].write(lambda w: [w.change("k", str(n), "") for n in range(2500)])
        await until(lambda: pair[1].head == 2500)
        assert [change.seq for change in heard] == list(range(1, 2501))

    @pytest.mark.bears("I11", "X06")
    async def test_a_join_token_admits_one_of_fifty_at_two_servers(
        self, pair: tuple[PostgresStore, PostgresStore]
    ) -> None:
        await pair[0].write(lambda w: w.add_join_token("h1", NODE, NOW + HOUR))
        takers = (pair[number % 2].write(lambda w: w.take_join_token("h1", NOW)) for number in range(50))
        outcomes = await asyncio.gather(*takers, return_exceptions=True)
        assert sum(isinstance(outcome, Refused) for outcome in outcomes) == 49

    async def test_of_two_that_ask_the_same_at_once_one_does_the_work(
        self, pair: tuple[PostgresStore, PostgresStore]
    ) -> None:
        def act(w: Writer) -> str:
            kept = w.recall("me", "k", "d")
            if kept is None:
                kept = f"made at {w.change('k', 'made', '')}"
                w.remember("me", "k", "d", kept, NOW + HOUR)
            return kept

        assert await asyncio.gather(*(pair[n % 2].write(act) for n in range(20))) == ["made at 1"] * 20

    async def test_one_that_freezes_inside_a_write_does_not_stop_the_others(
        self, pair: tuple[PostgresStore, PostgresStore], cluster: Cluster, postgresql: str
    ) -> None:
        failpoints.arm("store.before_commit=sleep:4500", allowed=True)
        frozen = asyncio.ensure_future(pair[0].write(say))
        try:
            async with asyncio.timeout(DEADLINE):
                while not cluster.execute(postgresql, STANDS_STILL):
                    await asyncio.sleep(0.02)
            failpoints.arm("", allowed=True)
            async with asyncio.timeout(DEADLINE):
                while True:
                    try:
                        seq = await pair[1].write(say)
                    except Unavailable as busy:
                        assert busy.reason == "store_busy"  # noqa: PT017
                    else:
                        break
            assert seq == 1
            with pytest.raises(Unavailable):
                await frozen
        finally:
            failpoints.arm("", allowed=True)
        assert await pair[0].write(say) == 2


class TestSchema:
    @pytest.mark.bears("D11")
    async def test_of_many_that_migrate_at_once_one_does_it(self, postgresql: str) -> None:
        async def open_and_write() -> tuple[str, int]:
            async with PostgresStore.open(postgresql) as store:
                return store.id, await store.write(say)

        opened = await asyncio.gather(*(open_and_write() for _ in range(4)))
        assert len({name for name, _ in opened}) == 1
        assert sorted(seq for _, seq in opened) == [1, 2, 3, 4]

    @pytest.mark.bears("D11")
    async def test_one_that_is_stopped_half_way_leaves_nothing(self, cluster: Cluster, postgresql: str) -> None:
        failpoints.arm("store.in_migration=error", allowed=True)
        try:
            with pytest.raises(Unavailable):
                async with PostgresStore.open(postgresql):
                    pytest.fail("opened")
        finally:
            failpoints.arm("", allowed=True)
        names = cluster.execute(postgresql, "SELECT tablename FROM pg_tables WHERE schemaname = current_schema()")
        assert names == [("schema_migrations",)]
        async with PostgresStore.open(postgresql) as store:
            assert await store.write(say) == 1

    @pytest.mark.bears("D11")
    async def test_a_newer_schema_is_refused_and_an_older_server_may_go_on(self, postgresql: str) -> None:
        newer = Migration(
            len(known_migrations()) + 1,
            "9999_x.sql",
            "CREATE TABLE later (x TEXT, y BLOB) STRICT, WITHOUT ROWID;".replace("TEXT", "TEXT PRIMARY KEY"),
        )
        async with PostgresStore.open(postgresql) as older:
            # Expand before contract: what is added does not disturb who does not know it.
            async with PostgresStore.open(postgresql, migrations=(*known_migrations(), newer)) as younger:
                assert await younger.write(say) == 1
                assert await older.write(say) == 2
            with pytest.raises(Misconfigured) as refused:
                async with PostgresStore.open(postgresql):
                    pytest.fail("opened")
            assert refused.value.reason == "store_schema_newer"

    async def test_a_database_of_somebody_else_is_left_alone(self, cluster: Cluster, postgresql: str) -> None:
        cluster.execute(postgresql, "CREATE TABLE theirs (x TEXT)")
        with pytest.raises(Misconfigured) as refused:
            async with PostgresStore.open(postgresql):
                pytest.fail("opened")
        assert refused.value.reason == "store_foreign"

    @pytest.mark.bears("L01", "R11")
    async def test_a_chain_whose_end_does_not_hold_is_refused(self, cluster: Cluster, postgresql: str) -> None:
        async with PostgresStore.open(postgresql) as store:
            await store.write(lambda w: [w.record(record(f"s{n}")) for n in range(1500)])
        cluster.execute(postgresql, "UPDATE audit_records SET hash = sha256('x') WHERE seq = 1401")
        with pytest.raises(Misconfigured) as broken:
            async with PostgresStore.open(postgresql):
                pytest.fail("opened")
        assert broken.value.reason == "store_audit_broken"
        assert "record 1401" in broken.value.message


class TestLostConnections:
    async def test_those_that_are_cut_between_writes_are_made_anew_and_nobody_notices(
        self, cluster: Cluster, postgresql: str
    ) -> None:
        async with PostgresStore.open(postgresql) as store:
            for number in range(1, 4):
                assert await store.write(say) == number
                assert await store.read(lambda r: r.change_head()) == number
                cut = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'broker-server'"
                assert len(cluster.execute(postgresql, cut)) >= 2

    async def test_a_group_that_is_cut_before_its_commit_runs_again(self, cluster: Cluster, postgresql: str) -> None:
        runs: list[int] = []

        def act(w: Writer) -> int:
            seq = say(w)
            runs.append(seq)
            if len(runs) == 1:
                held = "SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND granted"
                cluster.execute(postgresql, f"SELECT pg_terminate_backend(pid) FROM ({held}) l")
                w.change("k", "never", "")
            return seq

        async with PostgresStore.open(postgresql) as store:
            first, second = await asyncio.gather(store.write(say), store.write(act))
            assert (first, second, runs) == (1, 2, [2, 2])
            assert verify_chain(await store.read(lambda r: r.records(0, 10))).seq == 2

    @pytest.mark.bears("R07")
    async def test_a_commit_whose_answer_is_lost_is_unknown_and_its_repetition_gives_the_same(
        self, proxy: PostgresProxy, postgresql: str
    ) -> None:
        def act(w: Writer) -> str:
            kept = w.recall("me", "k", "d")
            if kept is None:
                kept = f"made at {say(w)}"
                w.remember("me", "k", "d", kept, NOW + HOUR)
            return kept

        async with through(proxy, postgresql) as store:
            told: list[Change] = []
            store.subscribe(told.extend)
            proxy.lose_answer_to = b"COMMIT"
            with pytest.raises(Unavailable) as unknown:
                await store.write(act)
            assert (unknown.value.reason, proxy.lost) == ("store_outcome_unknown", 1)
            assert await store.write(act) == "made at 1"
            # It took place: whoever watches hears of it, once.
            assert [change.seq for change in told] == [1]
            assert (await store.read(lambda r: r.chain_head())).seq == 1

    @pytest.mark.bears("R02", "R06")
    async def test_a_database_that_falls_silent_is_told_in_time_and_it_goes_on_by_itself(
        self, proxy: PostgresProxy, postgresql: str
    ) -> None:
        loop = asyncio.get_running_loop()
        async with through(proxy, postgresql) as store:
            assert await store.write(say) == 1
            proxy.frozen.set()
            began = loop.time()
            asked: Sequence[object] = await asyncio.gather(
                *(store.write(say) for _ in range(100)),
                *(store.read(lambda r: r.change_head()) for _ in range(20)),
                return_exceptions=True,
            )
            took = loop.time() - began
            assert {type(each) for each in asked} == {Unavailable}
            assert took < CURRENT_SECONDS + DEADLINE / 2
            assert not store.is_current
            for ask in (store.check(), store.write(say), store.read(lambda r: r.change_head())):
                with pytest.raises(Unavailable) as away:
                    await ask
                assert away.value.reason == "store_unreachable"

            proxy.frozen.clear()
            await until(lambda: store.is_current)
            await written(store)
            await store.check()
            rows = await store.read(lambda r: r.records(0, 1000))
            assert verify_chain(rows).seq == len(rows) <= 102

    @pytest.mark.bears("D05", "R03")
    async def test_a_database_that_has_lost_something_is_not_written_on(
        self, cluster: Cluster, postgresql: str
    ) -> None:
        async with PostgresStore.open(postgresql) as store:
            await store.write(lambda w: [say(w) for _ in range(5)])
            cluster.execute(postgresql, "DELETE FROM changes WHERE seq > 3")
            for _ in range(2):
                with pytest.raises(Unavailable) as lost:
                    await store.write(say)
                assert lost.value.reason == "store_rolled_back"
            await until(lambda: not store.is_current)
            with pytest.raises(Unavailable) as lost:
                await store.check()
            assert lost.value.reason == "store_rolled_back"
        async with PostgresStore.open(postgresql) as again:
            assert again.head == 3

    async def test_who_has_missed_what_is_forgotten_says_so(self, cluster: Cluster, postgresql: str) -> None:
        async with PostgresStore.open(postgresql) as store:
            await store.write(say)
            much = (
                "WITH more AS (INSERT INTO changes SELECT n, 'k', 'x', '' FROM generate_series(10, 20) n)"
                " DELETE FROM changes WHERE seq = 1"
            )
            cluster.execute(postgresql, much)
            await until(lambda: not store.is_current)
            with pytest.raises(Unavailable) as lost:
                await store.write(say)
            assert lost.value.reason == "store_lost_track"


async def written(store: Store) -> int:
    """Write, again and again until the store is there again."""
    async with asyncio.timeout(DEADLINE):
        while True:
            try:
                return await store.write(say)
            except Unavailable:
                await asyncio.sleep(0.02)


async def test_closing_finishes_what_was_accepted_and_refuses_what_comes_after(postgresql: str) -> None:
    async with PostgresStore.open(postgresql) as store:
        waiting = [asyncio.ensure_future(store.write(say)) for _ in range(200)]
        await asyncio.sleep(0)
    assert sorted(await asyncio.gather(*waiting)) == list(range(1, 201))
    with pytest.raises(Unavailable) as closed:
        await store.write(say)
    assert closed.value.reason == "store_closed"


async def test_a_database_that_is_not_there_is_told_at_the_start() -> None:
    with pytest.raises(Unavailable) as away:
        async with PostgresStore.open("postgresql://u@/db?host=/nonexistent"):
            pytest.fail("opened")
    assert away.value.reason == "store_unreachable"
