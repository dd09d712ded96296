"""PostgreSQL connections: how they are opened, what their errors mean, and the :class:`Sql` and :class:`Schema` over them.

Knows the settings that durability and a bounded wait rest on, and reads back what matters. Knows no table. A password is taken
from the URL once, handed to the driver, and shown nowhere: errors carry states and names, never what the driver printed unread.
"""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Final, NoReturn, TypeAlias

import psycopg
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.types.numeric import Int8Dumper
from psycopg.types.string import StrDumper
from typing_extensions import override

from broker.errors import Invalid, Misconfigured, Unavailable
from broker.server.store.schema import Schema
from broker.server.store.sql import Dangling, Duplicate, Row, Sql, Value, not_storable

SCHEMES: Final = ("postgresql", "postgres")
CONNECT_SECONDS: Final = 2
"""To connect: the least that libpq knows, and what a caller still waits for."""
LOCK_MS: Final = 1_500
"""To wait for another server's transaction, or a migration: beyond it something is stuck."""
STATEMENT_MS: Final = 10_000
"""For one statement: the largest (all entries of a big estate, the end of a tree of ten thousand) take a tenth of it."""
IDLE_MS: Final = 3_000
"""For a transaction in which nothing happens. A server that freezes inside one would keep all others from writing."""
CACHED_STATEMENTS: Final = 256
"""More than the store has statements, so that each is prepared once per connection."""

Connection: TypeAlias = psycopg.Connection[Row]

_LOCAL: Final = frozenset({"", "localhost", "127.0.0.1", "::1"})
_DEFAULTS: Final[Mapping[str, str]] = {
    "application_name": "broker-server",
    "client_encoding": "UTF8",
    "connect_timeout": str(CONNECT_SECONDS),
    # A dead peer is found out in two to three seconds, whether or not something is on its way to it.
    "keepalives_idle": "1",
    "keepalives_interval": "1",
    "keepalives_count": "2",
    "tcp_user_timeout": "2000",
    "target_session_attrs": "read-write",
}
# Weaker than "on" would lose what was acknowledged; "remote_apply" is stronger and stays.
_SETTINGS: Final = f"""
SELECT set_config('synchronous_commit', 'on', false) WHERE current_setting('synchronous_commit') <> 'remote_apply';
SET default_transaction_isolation TO 'read committed';
SET lock_timeout TO {LOCK_MS};
SET statement_timeout TO {STATEMENT_MS};
SET idle_in_transaction_session_timeout TO {IDLE_MS}"""
_FOUND: Final = (
    "SELECT current_setting('server_encoding'), current_setting('fsync'), current_setting('full_page_writes'),"
    " current_setting('synchronous_commit')"
)
_DURABLE: Final = (("UTF8", "on", "on", "on"), ("UTF8", "on", "on", "remote_apply"))

_CUT_OFF: Final = ("store_unreachable", "the database does not answer; the server goes on by itself once it does")
_FAULTS: Final = {
    "08": _CUT_OFF,
    "57P": _CUT_OFF,
    "57014": ("store_slow", "the database took too long; it is overloaded, or something holds it up"),
    "55P03": ("store_busy", "another session holds the database locked"),
    "40001": ("store_busy", "another session was in the way; try again"),
    "40P01": ("store_busy", "another session was in the way; try again"),
    "25P03": ("store_slow", "the transaction stood still for too long"),
    "25006": ("store_readonly", "the database is a standby, or set to read only"),
    "53100": ("store_full", "free space on the database's file system; the server goes on by itself"),
    "53300": ("store_connections", "the database has no connection left: raise max_connections"),
    "53": ("store_memory", "the database is out of memory, or of something else"),
    "58": ("store_io", "the database's file system reports errors"),
    "XX": ("store_corrupt", "look at the database's log; restore it from a backup"),
}
"""By SQLSTATE, the longest prefix that is here (Appendix A of PostgreSQL's manual)."""
_NOBODY: Final = ("28", "3D000", "42501")
_DENIED: Final = ("authentication failed", 'database "', 'role "', "no password supplied")
"""While connecting: the name, the password or the database is wrong, and waiting does not help. The driver gives words only."""
_REPEATABLE: Final = frozenset({"40001", "40P01"})
_NUL: Final = "NUL"


class Target:
    """Which database, and how to connect to it; shown without its password."""

    def __init__(self, settings: Mapping[str, str]) -> None:
        """Keep libpq's settings."""
        self._settings = settings

    def __getitem__(self, name: str) -> str | None:
        """Give one setting, or None."""
        return self._settings.get(name)

    @override
    def __repr__(self) -> str:
        """Name the database only."""
        return f"Target(host={self['host']!r}, dbname={self['dbname']!r})"

    def text(self) -> str:
        """Give all of it as libpq reads it, the password too."""
        return make_conninfo(**self._settings)

    def without_password(self, said: str) -> str:
        """Give what the driver said on one line; it does not say the password, and if it did it would not be shown."""
        said = " ".join(said.split())
        return said.replace(self["password"] or "\0", "***")


def read_url(url: str) -> Target:
    """Read ``postgresql://user:password@host/database?…`` and add our defaults; raises Misconfigured(code="store_url")."""
    try:
        given = {name: str(value) for name, value in conninfo_to_dict(url).items() if value is not None}
    except psycopg.Error:
        # What the driver says repeats parts of the URL: one of them may be the password.
        raise Misconfigured(
            "the store's URL is not one of PostgreSQL's",
            code="store_url",
            hint="write postgresql://user@host/database; special characters of a password are percent-encoded",
        ) from None
    hosts = given.get("host", "").split(",") + given.get("hostaddr", "").split(",")
    settings = {**_DEFAULTS, **given}
    if not all(host in _LOCAL or host.startswith(("/", "@")) for host in hosts):
        # Over a network nobody must be able to stand in between; who wants less says so in the URL.
        settings.setdefault("sslmode", "verify-full")
        if settings["sslmode"] == "verify-full":
            settings.setdefault("sslrootcert", "system")
    return Target(settings)


def connect(target: Target) -> Connection:
    """Open a connection, set and checked; raises Misconfigured, Unavailable. Blocks."""
    try:
        connection: Connection = psycopg.connect(target.text(), autocommit=True, cursor_factory=psycopg.RawCursor)
    except psycopg.Error as error:
        raise _not_connected(error, target) from None
    try:
        connection.prepare_threshold = 1
        connection.prepared_max = CACHED_STATEMENTS
        # One type for each kind of value: a statement is prepared once, not once for each width of its numbers.
        connection.adapters.register_dumper(int, Int8Dumper)
        connection.adapters.register_dumper(str, StrDumper)
        connection.execute(_SETTINGS)
        found = connection.execute(_FOUND).fetchone()
    except psycopg.Error as error:
        connection.close()
        raise storage_fault(error) or error from error
    if found not in _DURABLE:
        connection.close()
        raise Misconfigured(
            "the database does not keep what it acknowledges, or cannot hold every text",
            code="store_setting",
            hint="it needs fsync = on, full_page_writes = on, and the encoding UTF8",
        )
    return connection


def _not_connected(error: psycopg.Error, target: Target) -> Misconfigured | Unavailable:
    state = error.sqlstate or ""
    said = target.without_password(str(error))
    if state.startswith(_NOBODY) or any(words in said for words in _DENIED):
        return Misconfigured(
            f"the database refuses the server: {said}", code="store_denied", hint="check user, password and database"
        )
    return Unavailable(f"the database cannot be reached: {said}", code=_CUT_OFF[0], hint=_CUT_OFF[1])


def storage_fault(error: psycopg.Error) -> Unavailable | None:
    """Give what a caller is told when the storage refuses; None when the error is a defect of ours."""
    state = error.sqlstate
    if state is None:
        # The driver's own: a lost connection. Anything else of it is a wrong use, by us.
        found = _CUT_OFF if isinstance(error, psycopg.OperationalError) else None
    else:
        found = next((_FAULTS[state[:length]] for length in (5, 3, 2) if state[:length] in _FAULTS), None)
    if found is None:
        return None
    return Unavailable(f"the store cannot do this now ({state or 'no answer'})", code=found[0], hint=found[1])


def is_passing(error: BaseException) -> bool:
    """Tell whether the same, tried again at once, may succeed: a lost connection, a deadlock."""
    cause = error.__cause__ if isinstance(error, Unavailable) else error
    if not isinstance(cause, psycopg.Error):
        return False
    return cause.sqlstate in _REPEATABLE or cause.sqlstate in {"57P01", "57P02"} or is_lost(cause)


def is_lost(error: psycopg.Error) -> bool:
    """Tell whether the connection went in the middle of something: whether it was done is not known."""
    return isinstance(error, psycopg.OperationalError) and (error.sqlstate is None or error.sqlstate[:2] == "08")


class PostgresSql(Sql):
    """One PostgreSQL connection as the tables see it; another one can take its place between transactions."""

    def __init__(self, connection: Connection) -> None:
        """Speak through this connection."""
        self.use(connection)

    def use(self, connection: Connection) -> None:
        """Speak through this connection from now on."""
        self._connection = connection
        self._cursor = connection.cursor()
        self._attempts = False

    @override
    def run(self, text: str, values: Sequence[Value] = ()) -> int:
        self._execute(text, values)
        return self._cursor.rowcount

    def begin_act(self) -> None:
        """Note that a savepoint was just set: whatever this connection had set within the one before is gone."""
        self._attempts = False

    @override
    def attempt(self, text: str, values: Sequence[Value] = ()) -> int:
        # A statement that fails spoils its transaction here, down to the last savepoint. One of them is open at a time; the act
        # that ends releases it, which is a round trip less.
        try:
            self._connection.execute("RELEASE attempt; SAVEPOINT attempt" if self._attempts else "SAVEPOINT attempt")
            self._attempts = True
            return self.run(text, values)
        except (psycopg.errors.UniqueViolation, psycopg.errors.ForeignKeyViolation) as error:
            self._connection.execute("ROLLBACK TO attempt")
            raise (Duplicate if isinstance(error, psycopg.errors.UniqueViolation) else Dangling) from error
        except psycopg.Error as error:
            _refuse(error)

    @override
    def row(self, text: str, values: Sequence[Value] = ()) -> Row | None:
        self._execute(text, values)
        return self._cursor.fetchone()

    @override
    def rows(self, text: str, values: Sequence[Value] = ()) -> list[Row]:
        self._execute(text, values)
        return self._cursor.fetchall()

    def _execute(self, text: str, values: Sequence[Value]) -> None:
        try:
            self._cursor.execute(_numbered(text), values, prepare=True)
        except (psycopg.Error, UnicodeEncodeError) as error:
            _refuse(error)


def _refuse(error: psycopg.Error | UnicodeEncodeError) -> NoReturn:
    if isinstance(error, UnicodeEncodeError) or (isinstance(error, psycopg.DataError) and _NUL in str(error)):
        raise not_storable() from None
    if isinstance(error, psycopg.errors.ProgramLimitExceeded):
        raise Invalid(
            "a name is longer than PostgreSQL can index", code="text_too_long", hint="use fewer than 2,500 bytes"
        ) from None
    fault = storage_fault(error)
    if fault is None:
        raise error
    raise fault from error


@lru_cache(maxsize=2 * CACHED_STATEMENTS)
def _numbered(text: str) -> str:
    """Write ``?`` as PostgreSQL does: $1, $2, … No text of ours has a question mark that is not a value's."""
    first, *rest = text.split("?")
    return first + "".join(f"${number}{part}" for number, part in enumerate(rest, 1))


class PostgresSchema(Schema):
    """What migrating asks of PostgreSQL: the texts in its dialect, and nobody else migrating at the same time."""

    def __init__(self, connection: Connection, lock: int) -> None:
        """Migrate through this connection, under the advisory lock of this number."""
        self._connection = connection
        self._lock = lock
        self._sql = PostgresSql(connection)

    @property
    @override
    def sql(self) -> Sql:
        return self._sql

    @override
    def table_names(self) -> Collection[str]:
        found = self._sql.rows("SELECT tablename FROM pg_tables WHERE schemaname = current_schema()")
        return {name for (name,) in found}

    @override
    def define(self, statement: str) -> None:
        self._connection.execute(dialect(statement).encode())

    @override
    @contextmanager
    def alone(self) -> Iterator[None]:
        # Others wait for the whole of a migration, which may take its time; only its locks must not stop those who work.
        self._connection.execute("SET statement_timeout TO 0; SET lock_timeout TO 0")
        self._connection.execute("SELECT pg_advisory_lock($1)", (self._lock,))
        self._connection.execute(f"SET lock_timeout TO {LOCK_MS}".encode())
        try:
            yield
        finally:
            # A connection that is gone has let go of it already.
            if not self._connection.closed:
                self._connection.execute("SELECT pg_advisory_unlock($1)", (self._lock,))
                self._connection.execute(f"SET statement_timeout TO {STATEMENT_MS}".encode())

    @override
    @contextmanager
    def atomic(self) -> Iterator[None]:
        with self._connection.transaction():
            yield


_DIALECT: Final = (
    (re.compile(r"\)\s*STRICT(?:,\s*WITHOUT ROWID)?(?=\s*;?\s*\Z)"), ")"),
    (re.compile(r"\bINTEGER\b"), "BIGINT"),
    (re.compile(r"\bBLOB\b"), "BYTEA"),
    # By code point, as SQLite compares: order and equality must not depend on the machine's locale.
    (re.compile(r"\bTEXT\b"), 'TEXT COLLATE "C"'),
)


def dialect(statement: str) -> str:
    """Write one statement of a migration as PostgreSQL wants it."""
    for pattern, replacement in _DIALECT:
        statement = pattern.sub(replacement, statement)
    return statement
