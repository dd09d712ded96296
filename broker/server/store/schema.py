"""Migrations: numbered SQL files, applied once, in order, each wholly or not at all, and remembered with their checksums.

A database that a newer server made, or whose applied migration differs from ours, is refused: guessing would lose rows. The
texts are SQLite's dialect, kept to what every store can be told in its own (:class:`Schema`); checksums are of the texts as written.
"""

# ruff: noqa: S608 - the texts are put together from constants of this module only

import hashlib
import re
import sqlite3
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from importlib import resources
from typing import Final, Protocol

from broker.clock import Clock
from broker.errors import Misconfigured
from broker.server import failpoints
from broker.server.store.sql import Sql, micros

TABLE: Final = "schema_migrations"
_NAME: Final = re.compile(r"(?P<version>[0-9]{4})_[a-z0-9_]+\.sql")
_APPLIED: Final = f"SELECT version, checksum FROM {TABLE}"
_REMEMBER: Final = f"INSERT INTO {TABLE} (version, name, checksum, applied_at) VALUES (?, ?, ?, ?)"
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


class Schema(Protocol):
    """What migrating asks of a database."""

    @property
    def sql(self) -> Sql:
        """Its connection."""
        ...

    def table_names(self) -> Collection[str]:
        """Give the tables that are there, whoever made them."""
        ...

    def define(self, statement: str) -> None:
        """Run one statement of a migration, in this database's dialect."""
        ...

    def alone(self) -> AbstractContextManager[object]:
        """Keep everybody else from migrating for as long as the block lasts."""
        ...

    def atomic(self) -> AbstractContextManager[object]:
        """Do the block wholly or not at all."""
        ...


def migrate(schema: Schema, migrations: Sequence[Migration], clock: Clock) -> None:
    """Bring the schema up to date; raises Misconfigured (store_foreign, store_schema_newer, store_migration_changed)."""
    with schema.alone():
        tables = schema.table_names()
        if tables and TABLE not in tables:
            raise Misconfigured(
                "the database holds tables that are not ours", code="store_foreign", hint="name another database"
            )
        schema.define(_LEDGER)
        applied: dict[int, str] = dict(schema.sql.rows(_APPLIED))
        newest = migrations[-1].version
        if max(applied, default=0) > newest:
            raise Misconfigured(
                f"the database was made by a newer version: its schema is {max(applied)}, this version knows {newest}",
                code="store_schema_newer",
                hint="run the newer version, or restore the backup that was made before the upgrade",
            )
        for migration in migrations:
            if migration.version not in applied:
                _apply(schema, migration, clock)
            elif applied[migration.version] != migration.checksum:
                raise Misconfigured(
                    f"migration {migration.name} is not the one that was applied to this database",
                    code="store_migration_changed",
                    hint="install an unmodified release; applied migrations are never edited",
                )


def _apply(schema: Schema, migration: Migration, clock: Clock) -> None:
    with schema.atomic():
        for statement in _statements(migration.text):
            schema.define(statement)
            failpoints.reach("store.in_migration")
        values = (migration.version, migration.name, migration.checksum, micros(clock.now()))
        schema.sql.run(_REMEMBER, values)


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
