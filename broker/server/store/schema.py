"""Migrations: numbered SQL files, applied once, in order, each wholly or not at all, and remembered with their checksums.

A database that a newer server made, or whose applied migration differs from ours, is refused: guessing would lose rows. The
caller holds the file's lock, so that nobody else migrates at the same time.
"""

# ruff: noqa: S608 - the texts are put together from constants of this module only

import hashlib
import re
import sqlite3
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Final

from sqlite_utils import Database

from broker.clock import Clock
from broker.errors import Misconfigured
from broker.server import failpoints
from broker.server.store.sql import micros

TABLE: Final = "schema_migrations"
_NAME: Final = re.compile(r"(?P<version>[0-9]{4})_[a-z0-9_]+\.sql")
_LEDGER: Final = f"""
CREATE TABLE IF NOT EXISTS {TABLE} (
  version    INTEGER PRIMARY KEY,
  name       TEXT NOT NULL,
  checksum   TEXT NOT NULL,
  applied_at INTEGER NOT NULL
) STRICT"""


@dataclass(frozen=True, slots=True)
class Migration:
    """One step of the schema."""

    version: int
    name: str
    text: str

    @property
    def checksum(self) -> str:
        """The SHA-256 of its text, in hex."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def known_migrations() -> tuple[Migration, ...]:
    """Give the migrations that this version brings, in order, numbered from 1 without gaps."""
    found: list[Migration] = []
    for file in resources.files("broker.server.store").joinpath("migrations").iterdir():
        match = _NAME.fullmatch(file.name)
        if match is not None:
            found.append(Migration(int(match["version"]), file.name, file.read_text(encoding="utf-8")))
    found.sort(key=lambda migration: migration.version)
    if [migration.version for migration in found] != list(range(1, len(found) + 1)):
        raise Misconfigured("the migrations of this installation are incomplete", code="store_migrations_missing")
    return tuple(found)


def migrate(db: Database, migrations: Sequence[Migration], clock: Clock) -> None:
    """Bring the schema up to date; raises Misconfigured (store_foreign, store_schema_newer, store_migration_changed)."""
    tables = db.table_names()
    if tables and TABLE not in tables:
        raise Misconfigured(
            "the database file holds tables that are not ours", code="store_foreign", hint="name another file"
        )
    db.execute(_LEDGER)
    applied = {row["version"]: row["checksum"] for row in db.table(TABLE).rows}
    newest = migrations[-1].version
    if max(applied, default=0) > newest:
        raise Misconfigured(
            f"the database was made by a newer version: its schema is {max(applied)}, this version knows {newest}",
            code="store_schema_newer",
            hint="run the newer version, or restore the backup that was made before the upgrade",
        )
    for migration in migrations:
        if migration.version not in applied:
            _apply(db, migration, clock)
        elif applied[migration.version] != migration.checksum:
            raise Misconfigured(
                f"migration {migration.name} is not the one that was applied to this database",
                code="store_migration_changed",
                hint="install an unmodified release; applied migrations are never edited",
            )


def _apply(db: Database, migration: Migration, clock: Clock) -> None:
    with db.atomic():
        for statement in _statements(migration.text):
            db.execute(statement)
            failpoints.reach("store.in_migration")
        values = (migration.version, migration.name, migration.checksum, micros(clock.now()))
        db.execute(f"INSERT INTO {TABLE} VALUES (?, ?, ?, ?)", values)


def _statements(text: str) -> Iterator[str]:
    # The driver's own script runner commits before it starts; one by one they stay in the transaction.
    statement = ""
    for line in text.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""
    if statement.strip():
        yield statement
