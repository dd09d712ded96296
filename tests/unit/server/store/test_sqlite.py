import asyncio
import os
import shutil
import sqlite3
import stat
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from broker.errors import Misconfigured, Refused, Unavailable
from broker.server.store.ports import Writer
from broker.server.store.schema import Migration, known_migrations
from broker.server.store.sqlite import SqliteStore
from tests.unit.server.store.samples import record


@pytest.mark.bears("S03")
async def test_every_file_is_private_while_it_is_open(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        async with SqliteStore.open(tmp_path / "data" / "broker.db") as store:
            await store.write(lambda w: w.change("k", "x", ""))
            files = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "data").iterdir()}
    finally:
        os.umask(before)
    assert files.keys() == {"broker.db", "broker.db-wal", "broker.db-shm", "broker.db.lock"}
    assert set(files.values()) == {0o600}


@pytest.mark.bears("D06")
async def test_a_second_store_on_the_file_is_refused_and_harms_nobody(tmp_path: Path) -> None:
    async with SqliteStore.open(tmp_path / "x.db") as first:
        with pytest.raises(Misconfigured) as refused:
            async with SqliteStore.open(tmp_path / "x.db"):
                pytest.fail("opened")
        assert refused.value.reason == "store_in_use"
        assert await first.write(lambda w: w.change("k", "x", "")) == 1
    async with SqliteStore.open(tmp_path / "x.db") as again:
        assert again.head == 1


async def test_closing_finishes_what_was_accepted_and_refuses_what_comes_after(tmp_path: Path) -> None:
    async with SqliteStore.open(tmp_path / "x.db") as store:
        waiting = [asyncio.ensure_future(store.write(lambda w: w.change("k", "x", ""))) for _ in range(200)]
        await asyncio.sleep(0)
    assert sorted(await asyncio.gather(*waiting)) == list(range(1, 201))
    with pytest.raises(Unavailable) as closed:
        await store.write(lambda w: w.change("k", "x", ""))
    assert closed.value.reason == "store_closed"
    with pytest.raises(Unavailable):
        await store.read(lambda r: r.change_head())


async def test_two_stores_have_two_names(tmp_path: Path) -> None:
    async with SqliteStore.open(tmp_path / "x.db") as x, SqliteStore.open(tmp_path / "y.db") as y:
        assert x.id != y.id
        assert len(x.id) == 32


async def test_the_switch_interval_is_given_back(tmp_path: Path) -> None:
    before = sys.getswitchinterval()
    async with SqliteStore.open(tmp_path / "x.db"):
        assert sys.getswitchinterval() <= 0.001
    assert sys.getswitchinterval() == before


@pytest.mark.bears("D11")
async def test_a_refused_schema_leaves_the_file_free(tmp_path: Path) -> None:
    newer = Migration(len(known_migrations()) + 1, "9999_x.sql", "CREATE TABLE later (x TEXT) STRICT;")
    async with SqliteStore.open(tmp_path / "x.db", migrations=(*known_migrations(), newer)):
        pass
    for _ in range(2):
        with pytest.raises(Misconfigured) as refused:
            async with SqliteStore.open(tmp_path / "x.db"):
                pytest.fail("opened")
        assert refused.value.reason == "store_schema_newer"


@pytest.mark.bears("D05")
@pytest.mark.parametrize("name", ["x.db", "x.db-wal"])
async def test_writing_stops_when_the_file_is_taken_away(tmp_path: Path, name: str) -> None:
    async with SqliteStore.open(tmp_path / "x.db") as store:
        await store.write(lambda w: w.change("k", "kept", ""))
        await store.check()
        (tmp_path / name).rename(tmp_path / "elsewhere")
        for _ in range(2):
            with pytest.raises(Unavailable) as gone:
                await store.write(lambda w: w.change("k", "lost", ""))
            assert gone.value.reason == "store_replaced"
        with pytest.raises(Unavailable):
            await store.check()
        assert await store.read(lambda r: r.change_head()) == 1
        if name == "x.db-wal":
            # What only the lost log held was brought home at once.
            shutil.copy(tmp_path / "x.db", tmp_path / "copy.db")
            copy = sqlite3.connect(tmp_path / "copy.db")
            assert copy.execute("SELECT key FROM changes").fetchall() == [("kept",)]
            copy.close()


@pytest.mark.bears("D08", "D09")
async def test_a_chain_whose_end_does_not_hold_is_refused(tmp_path: Path) -> None:
    async with SqliteStore.open(tmp_path / "x.db") as store:
        await store.write(lambda w: [w.record(record(f"s{n}")) for n in range(1500)])
    async with SqliteStore.open(tmp_path / "x.db") as store:
        await store.write(lambda w: w.record(record()))
    db = sqlite3.connect(tmp_path / "x.db")
    db.execute("UPDATE audit_records SET hash = zeroblob(32) WHERE seq = 1401")
    db.commit()
    db.close()
    with pytest.raises(Misconfigured) as broken:
        async with SqliteStore.open(tmp_path / "x.db"):
            pytest.fail("opened")
    assert broken.value.reason == "store_audit_broken"
    assert "record 1401" in broken.value.message


async def test_a_group_runs_again_only_for_an_act_that_raised_after_it_wrote(tmp_path: Path) -> None:
    runs: list[str] = []

    def writing(name: str, error: Exception | None = None) -> Callable[[Writer], int]:
        def act(writer: Writer) -> int:
            runs.append(name)
            number = writer.change("k", name, "")
            if error is not None:
                raise error
            return number

        return act

    def refusing(writer: Writer) -> None:
        runs.append("refused")
        writer.session("none")
        raise Refused("no", code="no")

    async def together(store: SqliteStore, *acts: Callable[[Writer], object]) -> list[object]:
        runs.clear()
        return await asyncio.gather(*map(store.write, acts), return_exceptions=True)

    async with SqliteStore.open(tmp_path / "x.db") as store:
        first, refused, second = await together(store, writing("a"), refusing, writing("b"))
        assert (first, second, runs) == (1, 2, ["a", "refused", "b"])
        assert isinstance(refused, Refused)
        third, raised, fourth = await together(store, writing("c"), writing("lost", ValueError("x")), writing("d"))
        assert (third, fourth) == (3, 4)
        assert isinstance(raised, ValueError)
        assert runs == ["c", "lost", "c", "lost", "d"]
        # Whoever did so once makes nobody run twice again for a while.
        await together(store, writing("e"), writing("lost", ValueError("x")), writing("f"))
        assert runs == ["e", "lost", "f"]
        changes = await store.read(lambda reader: reader.changes_since(0, 100))
        assert changes is not None
        assert [each.key for each in changes] == ["a", "b", "c", "d", "e", "f"]
