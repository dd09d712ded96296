import psycopg
import pytest

from broker.clock import SystemClock
from broker.errors import Invalid, Misconfigured, Unavailable
from broker.server.store.postgres_connection import PostgresSql, connect, dialect, read_url, storage_fault
from broker.server.store.schema import known_migrations
from broker.server.store.sql import Dangling, Duplicate
from broker.server.store.stores import open_store
from tests.postgresql import LOCKED, PASSWORD, Cluster

PLAIN = PASSWORD.replace("%40", "@")


def test_a_url_gets_what_bounds_every_wait() -> None:
    target = read_url("postgresql://u@/db?host=/run/postgresql&connect_timeout=7")
    assert (target["host"], target["dbname"], target["user"]) == ("/run/postgresql", "db", "u")
    assert (target["connect_timeout"], target["tcp_user_timeout"]) == ("7", "2000")
    assert target["target_session_attrs"] == "read-write"


@pytest.mark.parametrize(
    ("url", "sslmode", "sslrootcert"),
    [
        ("postgresql://db.example/b", "verify-full", "system"),
        ("postgresql://localhost,db.example/b", "verify-full", "system"),
        ("postgresql://db.example/b?sslrootcert=/ca.pem", "verify-full", "/ca.pem"),
        ("postgresql://db.example/b?sslmode=disable", "disable", None),
        ("postgresql://localhost/b", None, None),
        ("postgresql:///b?host=/tmp", None, None),
    ],
)
def test_over_a_network_nobody_can_stand_in_between_unless_the_url_says_so(
    url: str, sslmode: str | None, sslrootcert: str | None
) -> None:
    target = read_url(url)
    assert (target["sslmode"], target["sslrootcert"]) == (sslmode, sslrootcert)


@pytest.mark.bears("S01")
@pytest.mark.parametrize(
    "url", ["postgresql://u:{}@[::1/db", "postgresql://u:{}@h/db?nonsense={}", "postgresql://u:{}@h:x%"]
)
def test_a_url_that_is_not_understood_is_not_repeated(url: str) -> None:
    with pytest.raises(Misconfigured) as refused:
        read_url(url.replace("{}", "hunter2"))
    assert refused.value.reason == "store_url"
    assert "hunter2" not in f"{refused.value!r} {refused.value.hint} {refused.value.__context__ and ''}"


@pytest.mark.bears("S01")
def test_a_password_is_shown_nowhere(cluster: Cluster) -> None:
    cluster.database(LOCKED)
    target = read_url(cluster.url(LOCKED))
    assert PLAIN in target.text()
    assert PLAIN not in f"{target!r} {target}"
    with connect(target) as connection:
        assert PLAIN not in repr(connection)

    with pytest.raises(Misconfigured) as denied:
        connect(read_url(cluster.url(LOCKED, password="hunter2")))
    assert denied.value.reason == "store_denied"
    assert "hunter2" not in f"{denied.value!r} {denied.value.hint}"
    assert denied.value.__suppress_context__


def test_what_is_not_there_is_told_by_whether_waiting_helps(cluster: Cluster) -> None:
    with pytest.raises(Misconfigured):
        connect(read_url(cluster.url("none")))
    with pytest.raises(Unavailable) as away:
        connect(read_url("postgresql://u@/db?host=/nonexistent"))
    assert away.value.reason == "store_unreachable"


@pytest.mark.bears("D03")
def test_what_is_acknowledged_is_durable_whatever_the_database_is_set_to(cluster: Cluster) -> None:
    url = cluster.database("forgetful")
    wanted = {"synchronous_commit": "on", "default_transaction_isolation": "read committed", "lock_timeout": "1500ms"}
    cluster.execute(cluster.url("postgres"), "ALTER DATABASE forgetful SET synchronous_commit = off")
    cluster.execute(
        cluster.url("postgres"), "ALTER DATABASE forgetful SET default_transaction_isolation = 'serializable'"
    )
    with connect(read_url(url)) as connection:
        found = {each: connection.execute(f"SHOW {each}").fetchone() for each in wanted}  # type: ignore[arg-type]
    assert found == {each: (value,) for each, value in wanted.items()}

    cluster.execute(cluster.url("postgres"), "ALTER DATABASE forgetful SET synchronous_commit = remote_apply")
    with connect(read_url(url)) as connection:
        assert connection.execute("SHOW synchronous_commit").fetchone() == ("remote_apply",)


def test_a_database_that_cannot_hold_every_text_is_refused(cluster: Cluster) -> None:
    cluster.execute(cluster.url("postgres"), "CREATE DATABASE latin ENCODING 'LATIN1' LOCALE 'C' TEMPLATE template0")
    with pytest.raises(Misconfigured) as refused:
        connect(read_url(cluster.url("latin")))
    assert refused.value.reason == "store_setting"


def test_broken_constraints_have_names_of_ours_and_the_transaction_goes_on(postgresql: str) -> None:
    with connect(read_url(postgresql)) as connection:
        connection.execute("CREATE TABLE parent (id TEXT PRIMARY KEY, name TEXT UNIQUE)")
        connection.execute("CREATE TABLE child (id TEXT PRIMARY KEY, parent TEXT REFERENCES parent (id))")
        sql = PostgresSql(connection)
        connection.execute("BEGIN")
        assert sql.attempt("INSERT INTO parent (id, name) VALUES (?, ?)", ("a", "n")) == 1
        for values in (("a", "m"), ("b", "n")):
            with pytest.raises(Duplicate):
                sql.attempt("INSERT INTO parent (id, name) VALUES (?, ?)", values)
        with pytest.raises(Dangling):
            sql.attempt("INSERT INTO child (id, parent) VALUES (?, ?)", ("c", "none"))
        for bad in ("\0", "\ud800"):
            with pytest.raises(Invalid):
                sql.row("SELECT 1 WHERE ? = 'x'", (bad,))
        assert sql.run("UPDATE parent SET name = ? WHERE id = ?", ("x", "a")) == 1
        assert sql.rows("SELECT id, name FROM parent") == [("a", "x")]
        with pytest.raises(psycopg.errors.UndefinedTable):
            sql.rows("SELECT 1 FROM nowhere")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (psycopg.errors.AdminShutdown, "store_unreachable"),
        (psycopg.errors.ConnectionFailure, "store_unreachable"),
        (psycopg.OperationalError, "store_unreachable"),
        (psycopg.errors.DiskFull, "store_full"),
        (psycopg.errors.TooManyConnections, "store_connections"),
        (psycopg.errors.OutOfMemory, "store_memory"),
        (psycopg.errors.QueryCanceled, "store_slow"),
        (psycopg.errors.LockNotAvailable, "store_busy"),
        (psycopg.errors.SerializationFailure, "store_busy"),
        (psycopg.errors.DeadlockDetected, "store_busy"),
        (psycopg.errors.ReadOnlySqlTransaction, "store_readonly"),
        (psycopg.errors.IoError, "store_io"),
        (psycopg.errors.DataCorrupted, "store_corrupt"),
        (psycopg.errors.UndefinedTable, None),
        (psycopg.errors.UniqueViolation, None),
        (psycopg.ProgrammingError, None),
    ],
)
def test_states_are_known_by_their_class(error: type[psycopg.Error], reason: str | None) -> None:
    fault = storage_fault(error("x"))
    assert (fault and fault.reason) == reason


def test_the_one_schema_is_written_in_postgresqls_words() -> None:
    assert dialect("CREATE TABLE a (x TEXT, y INTEGER, z BLOB) STRICT, WITHOUT ROWID;\n") == (
        'CREATE TABLE a (x TEXT COLLATE "C", y BIGINT, z BYTEA);\n'
    )
    assert "TEXT" in known_migrations()[0].text


async def test_every_column_of_text_compares_by_code_point(postgresql: str) -> None:

    async with open_store(postgresql, clock=SystemClock()):
        pass
    with connect(read_url(postgresql)) as connection:
        found = connection.execute(
            "SELECT table_name, column_name, data_type, collation_name FROM information_schema.columns"
            " WHERE table_schema = current_schema()"
        ).fetchall()
    assert len(found) > 80
    assert {kind for _, _, kind, _ in found} == {"text", "bigint", "bytea"}
    assert {collation for _, _, kind, collation in found if kind == "text"} == {"C"}
