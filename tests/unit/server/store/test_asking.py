"""Answers that are remembered: as long as nothing was written, and never against what the database would say."""

import importlib
import inspect
import pkgutil
import re
import sqlite3
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from sqlite_utils import Database

from broker.clock import SystemClock
from broker.server.store import asking, tables
from broker.server.store.asking import RememberingSql
from broker.server.store.ports import Writer
from broker.server.store.schema import known_migrations, migrate
from broker.server.store.sqlite_connection import SqliteSchema, SqliteSql, open_writer
from broker.server.store.tables import SqlWriter
from tests.unit.server.store.samples import node
from tests.unit.server.store.test_group import Rig

ASKED = "SELECT id FROM a WHERE id = ?"
CALL = re.compile(r"_sql\.(ask|append)\(\s*(\w+)")


@pytest.fixture
def db(tmp_path: Path) -> Iterator[Database]:
    path = tmp_path / "x.db"
    path.touch()
    opened = open_writer(path)
    migrate(SqliteSchema(opened), known_migrations(), SystemClock())
    yield opened
    opened.close()


@pytest.fixture
def sql(db: Database) -> RememberingSql:
    db.conn.execute("CREATE TABLE a (id TEXT)")
    db.conn.execute("CREATE TABLE b (id TEXT PRIMARY KEY)")
    return RememberingSql(SqliteSql(db))


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    made = Rig(tmp_path / "y.db")
    yield made
    made.writer.stop()


@pytest.fixture
def put(db: Database) -> list[str]:
    """Every statement that reaches the database from now on."""
    texts: list[str] = []
    db.conn.set_trace_callback(texts.append)
    return texts


def test_a_question_is_put_once_until_something_is_written(sql: RememberingSql, put: list[str]) -> None:
    assert [sql.ask(ASKED, ["1"]), sql.ask(ASKED, ("1",)), len(put)] == [(), (), 1]
    assert [sql.ask(ASKED, ["2"]), len(put)] == [(), 2]
    sql.append("INSERT INTO b VALUES (?)", ("x",))
    sql.append("INSERT INTO b VALUES (?)", ("y",), attempt=True)
    assert [sql.ask(ASKED, ["1"]), len(put)] == [(), 4]
    sql.run("INSERT INTO a VALUES (?)", ("1",))
    assert sql.ask(ASKED, ["1"]) == (("1",),)
    sql.attempt("DELETE FROM a")
    assert sql.ask(ASKED, ["1"]) == ()
    before = len(put)
    sql.forget()
    sql.ask(ASKED, ["1"])
    assert len(put) == before + 1


def test_a_write_that_fails_forgets_too(sql: RememberingSql, put: list[str]) -> None:
    sql.ask(ASKED, ["1"])
    with pytest.raises(sqlite3.OperationalError):
        sql.run("UPDATE nothing SET x = 1")
    before = len(put)
    sql.ask(ASKED, ["1"])
    assert len(put) == before + 1


def test_answers_are_few(sql: RememberingSql, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "ANSWERS_KEPT", 3)
    for number in range(10):
        sql.ask(ASKED, [str(number)])
        assert len(sql._answers) <= 3


def banned(w: Writer) -> bool:
    known = w.node(node().id)
    assert known is not None
    return known.banned


def test_what_is_undone_was_never_an_answer(rig: Rig) -> None:
    rig.run(lambda w: w.put_node(node()))

    def ban_and_fail(w: Writer) -> None:
        w.put_node(replace(node(), banned=True))
        assert banned(w)
        raise ValueError

    group = rig.run(banned, ban_and_fail, banned)
    assert [act.result for act in group.acts] == [False, None, False]
    assert [act.result for act in rig.run(banned).acts] == [False]


def test_what_another_process_writes_is_the_next_groups_answer(rig: Rig) -> None:
    rig.run(lambda w: w.put_node(node()))
    assert [act.result for act in rig.run(banned).acts] == [False]
    other = open_writer(rig.path)
    SqlWriter(SqliteSql(other)).put_node(replace(node(), banned=True))
    other.close()
    assert [act.result for act in rig.run(banned).acts] == [True]


def test_no_remembered_question_reads_what_is_appended_to(db: Database) -> None:
    read: set[str | None] = set()
    appended: set[str | None] = set()

    def seen(action: int, table: str | None, *_: object) -> int:
        if action == sqlite3.SQLITE_READ:
            read.add(table)
        elif action == sqlite3.SQLITE_INSERT:
            appended.add(table)
        return sqlite3.SQLITE_OK

    calls = _calls()
    assert {kind for kind, _ in calls} == {"ask", "append"}
    for kind, text in calls:
        db.conn.set_authorizer(seen)
        db.conn.execute(f"EXPLAIN {text}", [""] * text.count("?"))
        db.conn.set_authorizer(None)
        if kind == "append":
            # What the insertion itself reads, to check its own row, is no question.
            read -= appended
    assert {"nodes", "entries", "sessions", "tasks", "stops", "revoked_svids"} <= read
    assert appended == {"tokens", "audit_records"}
    for _, text in (call for call in calls if call[0] == "ask"):
        assert not any(re.search(rf"\b{table}\b", text) for table in appended)


def _calls() -> list[tuple[str, str]]:
    calls = []
    for found in pkgutil.iter_modules(tables.__path__, f"{tables.__name__}."):
        module = importlib.import_module(found.name)
        source = inspect.getsource(module)
        here = CALL.findall(source)
        # Each text is a constant of its module, or begins with one: none hides from this test.
        assert len(here) == source.count("_sql.ask(") + source.count("_sql.append(")
        for kind, name in here:
            text = getattr(module, name)
            calls.append((kind, f"{text}1" if text.endswith("WHERE ") else text))
    return calls
