import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlite_utils import Database

from broker.errors import Unavailable
from broker.server.store.sql import Dangling, Duplicate
from broker.server.store.sqlite_connection import SqliteSql, open_reader, open_writer, storage_fault


@pytest.fixture
def path(tmp_path: Path) -> Path:
    made = tmp_path / "odd name?#%.db"
    made.touch()
    return made


@pytest.fixture
def writer(path: Path) -> Iterator[Database]:
    db = open_writer(path)
    db.execute("CREATE TABLE parent (id TEXT PRIMARY KEY, name TEXT UNIQUE) STRICT")
    db.execute("CREATE TABLE child (id TEXT PRIMARY KEY, parent TEXT REFERENCES parent (id)) STRICT")
    yield db
    db.close()


def pragma(db: Database, name: str) -> object:
    return db.execute(f"PRAGMA {name}").fetchone()[0]


@pytest.mark.bears("D02", "D03")
def test_the_writer_is_durable_and_strict(writer: Database) -> None:
    wanted = {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "busy_timeout": 2000, "trusted_schema": 0}
    assert {name: pragma(writer, name) for name in wanted} == wanted
    assert writer.conn.isolation_level is None


def test_a_reader_cannot_write(path: Path, writer: Database) -> None:
    reader = open_reader(path)
    with pytest.raises(sqlite3.OperationalError, match="readonly"):
        reader.conn.execute("INSERT INTO parent (id) VALUES ('x')")
    reader.close()


def test_opening_makes_no_file(tmp_path: Path) -> None:
    with pytest.raises(sqlite3.OperationalError):
        open_writer(tmp_path / "none.db")
    assert list(tmp_path.iterdir()) == []


def test_broken_constraints_have_names_of_ours(writer: Database) -> None:
    sql = SqliteSql(writer)
    assert sql.run("INSERT INTO parent (id, name) VALUES (?, ?)", ("a", "n")) == 1
    for values in (("a", "m"), ("b", "n")):
        with pytest.raises(Duplicate):
            sql.attempt("INSERT INTO parent (id, name) VALUES (?, ?)", values)
    with pytest.raises(Dangling):
        sql.attempt("INSERT INTO child (id, parent) VALUES (?, ?)", ("c", "none"))
    # STRICT: a column takes its type and no other.
    with pytest.raises(sqlite3.IntegrityError):
        sql.run("INSERT INTO parent (id) VALUES (?)", (b"bytes",))


def test_a_defect_of_ours_is_not_called_unavailable(writer: Database) -> None:
    sql = SqliteSql(writer)
    for ask in (sql.run, sql.row, sql.rows):
        with pytest.raises(sqlite3.OperationalError, match="no such table"):
            ask("SELECT 1 FROM nowhere")


def test_what_the_storage_refuses_is_unavailable(path: Path, writer: Database) -> None:
    other = open_writer(path)
    other.execute("PRAGMA busy_timeout = 0")
    writer.conn.execute("BEGIN IMMEDIATE")
    with pytest.raises(Unavailable) as busy:
        SqliteSql(other).run("INSERT INTO parent (id) VALUES ('x')")
    assert busy.value.reason == "store_busy"
    writer.conn.execute("ROLLBACK")
    other.close()


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (sqlite3.SQLITE_FULL, "store_full"),
        (sqlite3.SQLITE_IOERR_WRITE, "store_io"),
        (sqlite3.SQLITE_READONLY_DBMOVED, "store_readonly"),
        (sqlite3.SQLITE_CORRUPT_VTAB, "store_corrupt"),
        (sqlite3.SQLITE_ERROR, None),
        (sqlite3.SQLITE_CONSTRAINT_UNIQUE, None),
    ],
)
def test_extended_codes_are_known_by_their_family(code: int, reason: str | None) -> None:
    error = sqlite3.OperationalError("x")
    error.sqlite_errorcode, error.sqlite_errorname = code, "NAME"
    fault = storage_fault(error)
    assert (fault and fault.reason) == reason


def test_an_error_of_the_driver_itself_is_a_defect() -> None:
    assert storage_fault(sqlite3.ProgrammingError("closed")) is None


@pytest.mark.bears("D08")
def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.db"
    path.write_bytes(b"not a database" * 1000)
    with pytest.raises(sqlite3.DatabaseError) as damaged:
        open_writer(path)
    fault = storage_fault(damaged.value)
    assert fault is not None
    assert fault.reason == "store_corrupt"
