"""The single writer, on a real connection: what holds when acts, statements and COMMITs fail."""

import queue
import resource
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from broker.audit.verify import verify_chain
from broker.clock import SystemClock
from broker.errors import Misconfigured, Unavailable
from broker.server import failpoints
from broker.server.store.group import Act, Bench, Group, GroupWriter
from broker.server.store.ports import Writer
from broker.server.store.schema import known_migrations, migrate
from broker.server.store.sqlite_connection import SqliteSchema, SqliteSql, open_writer
from broker.server.store.sqlite_transactions import SqliteWriting
from broker.server.store.tables import SqlWriter
from tests.unit.server.store.samples import entry, record


class Rig:
    """A writer thread whose finished groups are collected."""

    def __init__(self, path: Path) -> None:
        path.touch()
        self.path = path
        self.settled: queue.Queue[Group] = queue.Queue()
        self.bench: Bench | None = None
        self.fault: Exception | None = None
        self.writer = GroupWriter(self._open, self.settled.put)
        self.writer.start()

    def run(self, *acts: Callable[[Writer], object]) -> Group:
        group = Group([Act(act, None) for act in acts])
        self.writer.submit(group)
        assert self.settled.get(timeout=30) is group
        return group

    def check(self) -> None:
        if self.fault is not None:
            raise self.fault

    def _open(self) -> Bench:
        db = open_writer(self.path)
        migrate(SqliteSchema(db), known_migrations(), SystemClock())
        self.bench = SqliteWriting(db, self.check)
        return self.bench

    def rows(self, question: str) -> list[tuple[object, ...]]:
        connection = sqlite3.connect(self.path)
        try:
            return connection.execute(question).fetchall()
        finally:
            connection.close()


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    made = Rig(tmp_path / "x.db")
    yield made
    failpoints.arm("", allowed=True)
    made.writer.stop()


def say(w: Writer) -> int:
    w.record(record())
    return w.change("k", "x", "")


def fail(w: Writer) -> None:
    say(w)
    raise ValueError


def errors(group: Group) -> list[str | None]:
    return [
        act.error.reason if isinstance(act.error, Unavailable) else act.error and type(act.error).__name__
        for act in group.acts
    ]


def test_an_act_that_raises_is_undone_alone(rig: Rig) -> None:
    group = rig.run(say, fail, say)
    assert [act.result for act in group.acts] == [1, None, 2]
    assert errors(group) == [None, "ValueError", None]
    assert [change.seq for change in group.changes] == [1, 2]
    assert rig.rows("SELECT count(*) FROM audit_records") == [(2,)]


def test_a_caught_refusal_of_a_constraint_does_not_spoil_the_act(rig: Rig) -> None:
    def act(w: Writer) -> int:
        w.add_entry(entry())
        with pytest.raises(Exception, match="exists"):
            w.add_entry(entry())
        return say(w)

    assert errors(rig.run(act)) == [None]


def fill(w: Writer) -> None:
    assert isinstance(w, SqlWriter)
    w._sql.rows("PRAGMA max_page_count = 1")
    for number in range(1000):
        w.record(record("x" * 4000 + str(number)))


@pytest.mark.bears("D04")
def test_a_full_database_fails_the_whole_group_and_recovers(rig: Rig) -> None:
    assert errors(rig.run(say)) == [None]
    group = rig.run(say, fill, say)
    assert errors(group) == ["store_full"] * 3
    assert group.acts[0].error is not group.acts[1].error
    assert (group.acts[0].result, group.changes) == (None, ())

    def free(w: Writer) -> int:
        assert isinstance(w, SqlWriter)
        w._sql.rows("PRAGMA max_page_count = 1000000")
        return say(w)

    again = rig.run(free)
    assert errors(again) == [None]
    assert [change.seq for change in again.changes] == [2]


@contextmanager
def files_no_longer_than(size: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.bears("D04")
def test_a_commit_that_fails_fails_all_and_tells_nothing(rig: Rig) -> None:
    rig.run(say)
    wal = rig.path.with_name("x.db-wal").stat().st_size
    with files_no_longer_than(wal):
        group = rig.run(say, fail, say)
    assert errors(group) == ["store_io", "ValueError", "store_io"]
    assert group.changes == ()

    assert [change.seq for change in rig.run(say).changes] == [2]
    assert rig.bench is not None
    assert rig.rows("SELECT count(*) FROM audit_records") == [(2,)]
    assert rig.rows("PRAGMA integrity_check") == [("ok",)]


@pytest.mark.parametrize("point", ["store.before_begin", "store.after_act", "store.before_commit"])
def test_a_fault_before_the_commit_leaves_nothing(rig: Rig, point: str) -> None:
    failpoints.arm(f"{point}=error", allowed=True)
    group = rig.run(say, say)
    assert errors(group) == ["failpoint"] * 2
    assert not group.changes
    failpoints.arm("", allowed=True)
    assert [change.seq for change in rig.run(say).changes] == [1]


def test_a_fault_after_the_commit_is_unknown_to_the_caller_but_the_changes_are_told(rig: Rig) -> None:
    failpoints.arm("store.after_commit=error", allowed=True)
    group = rig.run(say)
    assert errors(group) == ["failpoint"]
    assert [change.seq for change in group.changes] == [1]


@pytest.mark.bears("D05")
def test_nothing_is_written_once_the_file_is_not_ours(rig: Rig) -> None:
    rig.fault = Unavailable("gone", code="store_replaced")
    assert errors(rig.run(say)) == ["store_replaced"]
    rig.fault = None
    assert errors(rig.run(say)) == [None]


def test_rows_of_another_process_do_not_break_the_numbers_or_the_chain(rig: Rig) -> None:
    rig.run(say)
    other = open_writer(rig.path)
    foreign = SqlWriter(SqliteSql(other))
    foreign.change("k", "by hand", "")
    foreign.record(record("by hand"))
    other.close()

    assert [change.seq for change in rig.run(say).changes] == [3]
    reading = open_writer(rig.path)
    assert verify_chain(SqlWriter(SqliteSql(reading)).records(0, 100)).seq == 3
    reading.close()


def test_another_process_that_holds_the_database_makes_it_busy_not_broken(rig: Rig) -> None:
    other = sqlite3.connect(rig.path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    assert errors(rig.run(say)) == ["store_busy"]
    other.execute("ROLLBACK")
    other.close()
    assert errors(rig.run(say)) == [None]


def test_even_an_exit_inside_an_act_does_not_end_the_thread(rig: Rig) -> None:
    def leave(w: Writer) -> None:
        raise SystemExit

    assert errors(rig.run(leave, say)) == ["SystemExit", None]


def test_what_opening_raises_reaches_the_starter(tmp_path: Path) -> None:
    def open_bench() -> Bench:
        raise Misconfigured("no", code="store_foreign")

    writer = GroupWriter(open_bench, lambda _: None)
    with pytest.raises(Misconfigured):
        writer.start()
    writer.stop()


def test_stopping_finishes_what_is_queued(tmp_path: Path) -> None:
    rig = Rig(tmp_path / "x.db")
    groups = [Group([Act(say, None)]) for _ in range(5)]
    for group in groups:
        rig.writer.submit(group)
    rig.writer.stop()
    assert [rig.settled.get_nowait() for _ in groups] == groups
    assert rig.rows("SELECT count(*) FROM changes") == [(5,)]


def test_stopping_what_never_started_is_harmless() -> None:
    GroupWriter(lambda: pytest.fail("opened"), lambda _: None).stop()
