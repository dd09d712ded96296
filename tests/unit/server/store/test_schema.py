import sqlite3
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import pytest
from sqlite_utils import Database

from broker.errors import Misconfigured, Unavailable
from broker.server import failpoints
from broker.server.store.schema import Migration, known_migrations, migrate
from broker.server.store.sqlite_connection import SqliteSchema, open_writer
from tests.unit.server.store.samples import NOW

ONE = Migration(
    1, "0001_one.sql", "CREATE TABLE a (x TEXT) STRICT;\n-- a comment; with a mark\nCREATE TABLE b (x TEXT);"
)
TWO = Migration(2, "0002_two.sql", "INSERT INTO a VALUES ('it''s; here');\nCREATE TABLE c (x TEXT);\n-- the end\n")


class StoppedClock:
    def now(self) -> datetime:
        return NOW

    def monotonic(self) -> float:
        return 0.0


@pytest.fixture
def db(tmp_path: Path) -> Iterator[Database]:
    (tmp_path / "x.db").touch()
    opened = open_writer(tmp_path / "x.db")
    yield opened
    failpoints.arm("", allowed=True)
    opened.close()


def run(db: Database, *migrations: Migration) -> None:
    migrate(SqliteSchema(db), migrations, StoppedClock())


def test_they_run_once_in_order_and_are_remembered(db: Database) -> None:
    run(db, ONE)
    run(db, ONE, TWO)
    run(db, ONE, TWO)
    assert {"a", "b", "c"} <= set(db.table_names())
    assert db.execute("SELECT x FROM a").fetchall() == [("it's; here",)]
    ledger = db.execute("SELECT version, name, checksum FROM schema_migrations ORDER BY version").fetchall()
    assert ledger == [(each.version, each.name, each.checksum) for each in (ONE, TWO)]


@pytest.mark.bears("D11")
def test_one_that_fails_leaves_nothing_and_can_be_run_again(db: Database) -> None:
    broken = Migration(2, "0002_two.sql", TWO.text + "CREATE TABLE a (x TEXT);")
    with pytest.raises(sqlite3.OperationalError):
        run(db, ONE, broken)
    assert set(db.table_names()) == {"schema_migrations", "a", "b"}
    run(db, ONE, TWO)
    assert db.execute("SELECT count(*) FROM a").fetchone() == (1,)


@pytest.mark.bears("D11")
def test_one_that_is_stopped_half_way_leaves_nothing(db: Database) -> None:
    failpoints.arm("store.in_migration=error", allowed=True)
    with pytest.raises(Unavailable):
        run(db, ONE)
    assert set(db.table_names()) == {"schema_migrations"}


@pytest.mark.bears("D11")
def test_a_newer_schema_is_refused(db: Database) -> None:
    run(db, ONE, TWO)
    with pytest.raises(Misconfigured) as refused:
        run(db, ONE)
    assert refused.value.reason == "store_schema_newer"


@pytest.mark.bears("D11")
def test_an_applied_migration_that_was_edited_is_refused(db: Database) -> None:
    run(db, ONE)
    with pytest.raises(Misconfigured) as refused:
        run(db, Migration(1, ONE.name, ONE.text + " "), TWO)
    assert refused.value.reason == "store_migration_changed"
    assert "c" not in db.table_names()


def test_a_database_of_somebody_else_is_left_alone(db: Database) -> None:
    db.execute("CREATE TABLE theirs (x TEXT)")
    with pytest.raises(Misconfigured) as refused:
        run(db, ONE)
    assert refused.value.reason == "store_foreign"
    assert db.table_names() == ["theirs"]


def test_ours_make_strict_tables_only(db: Database) -> None:
    run(db, *known_migrations())
    tables = db.execute("SELECT name, strict FROM pragma_table_list WHERE type = 'table' AND name NOT LIKE 'sqlite_%'")
    strict = dict(tables.fetchall())
    assert len(strict) > 10
    assert set(strict.values()) == {1}


def test_hot_questions_are_answered_by_an_index(db: Database) -> None:
    run(db, *known_migrations())
    questions = (
        "SELECT 1 FROM sessions WHERE x5t = 'x'",
        "SELECT 1 FROM sessions WHERE agent = 'x' AND ended_at IS NULL",
        "SELECT 1 FROM tasks WHERE session = 'x' AND ended_at IS NULL",
        "SELECT 1 FROM tasks WHERE ended_at IS NULL AND expires_at <= 1",
        "SELECT 1 FROM tasks WHERE (created_at, id) > (1, 'x') ORDER BY created_at, id",
        "SELECT count(*) FROM tokens WHERE task_id = 'x'",
        "SELECT 1 FROM idempotency WHERE owner = 'x' AND key = 'y'",
        "SELECT 1 FROM frames WHERE forget_at > 1",
        "SELECT 1 FROM entries WHERE spiffe_id = 'x' AND parent_id = 'y' AND selectors_digest = 'z'",
    )
    for question in questions:
        plan = " ".join(row[3] for row in db.execute(f"EXPLAIN QUERY PLAN {question}").fetchall())
        assert "SEARCH" in plan, (question, plan)
        assert "TEMP B-TREE" not in plan, (question, plan)
