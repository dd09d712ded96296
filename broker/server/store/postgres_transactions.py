"""How PostgreSQL's transactions go: the steps of a group for the writer's thread, and snapshots for the readers'.

Writing transactions of all servers run one after the other, each under one advisory lock that goes with its transaction. So an act
is alone, as the port promises; numbers of changes and links of the audit chain are given in the order of commits, without gaps;
and whoever reads a number has seen everything before it. That no number is given twice is a key of the table, whatever the lock does.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Final, TypeVar

import psycopg
from psycopg import pq
from typing_extensions import override

from broker.errors import Misconfigured, Unavailable
from broker.server.store.asking import RememberingSql
from broker.server.store.group import Bench
from broker.server.store.ports import Reader
from broker.server.store.postgres_connection import Connection, PostgresSql, is_lost, is_passing, storage_fault
from broker.server.store.reading import Snapshots
from broker.server.store.rows import Change
from broker.server.store.tables import SqlReader, SqlWriter
from broker.server.store.tables.housekeeping import CHANGES_KEPT

WRITE_LOCK: Final = 0x62_72_6F_6B_65_72_01
"""The advisory lock of who writes (its bytes: "broker", 1)."""
MIGRATE_LOCK: Final = 0x62_72_6F_6B_65_72_02
"""The advisory lock of who migrates."""

T = TypeVar("T")

_HEADS: Final = "SELECT (SELECT coalesce(max(seq), 0) FROM changes), (SELECT coalesce(max(seq), 0) FROM audit_records)"
_BEGIN: Final = f"BEGIN; SELECT pg_advisory_xact_lock({WRITE_LOCK}); {_HEADS}"
_SNAPSHOT: Final = "BEGIN ISOLATION LEVEL REPEATABLE READ, READ ONLY"


class PostgresWriting(Bench):
    """The one connection of this server that writes; made anew when it is lost."""

    def __init__(self, connect: Callable[[], Connection], channel: str, told: Callable[[], int]) -> None:
        """Connect. ``told`` gives the last change that our subscribers know; others are told through ``channel``."""
        self._connect = connect
        self._channel = channel
        self._told = told
        self._connection = self._connected()
        self._sql = PostgresSql(self._connection)
        self._asked = RememberingSql(self._sql)
        self._tables = SqlWriter(self._asked)
        self._heads = (self._tables.change_head(), self._tables.chain_head().seq)
        self._missed: Sequence[Change] = ()
        self._warned = False
        self._kept = 0
        self._owed = ""

    @property
    def backend(self) -> int:
        """The process of the database that serves this connection: what it announces is known here already."""
        return self._connection.info.backend_pid if not self._connection.closed else 0

    @property
    @override
    def tables(self) -> SqlWriter:
        return self._tables

    @property
    @override
    def in_transaction(self) -> bool:
        status = self._connection.info.transaction_status
        return status in (pq.TransactionStatus.INTRANS, pq.TransactionStatus.INERROR)

    @override
    def begin(self) -> None:
        self._owed = ""
        self._missed = ()
        if self._connection.closed:
            self._reconnect()
        cursor = self._connection.execute(_BEGIN)
        cursor.nextset()
        cursor.nextset()
        heads: tuple[int, int] = cursor.fetchone()  # type: ignore[assignment]  # two counts, always
        require_onward(self._heads, heads)
        # Another server may have written rows that no number tells of: answers hold for one transaction.
        self._asked.forget()
        if heads != self._heads:
            # Another server wrote: numbers and links are counted from its rows.
            self._tables.undo(0)
            self._heads = heads
        told = self._told()
        if heads[0] > told:
            self._missed = self._catch_up(told, heads[0] - told)

    @override
    def begin_act(self) -> None:
        self._kept = self._tables.pending()
        self._connection.execute(f"{self._take_owed()}SAVEPOINT act".encode())
        self._sql.begin_act()

    @override
    def keep_act(self) -> None:
        # Sent along with what comes next: it saves a round trip.
        self._owed = "RELEASE act; "

    @override
    def undo_act(self) -> None:
        self._connection.execute("ROLLBACK TO act; RELEASE act")
        self._tables.undo(self._kept)

    @override
    def commit(self) -> Sequence[Change]:
        last = self._tables.last_change()
        announced = "" if last is None else f"NOTIFY {self._channel}, '{last}'; "
        self._warned = False
        try:
            cursor = self._connection.execute(f"{self._take_owed()}{announced}COMMIT".encode())
        except psycopg.Error as error:
            if is_lost(error) or self._connection.closed:
                raise _unknown() from error
            raise
        while cursor.nextset():
            pass
        if self._warned:
            # It is here, but not where it must also be: the wait for a standby was broken off.
            raise _unknown()
        if cursor.statusmessage != "COMMIT":
            raise Unavailable("the database undid the transaction", code="store_busy", hint="try again")
        self._heads = (last or self._heads[0], self._tables.last_record() or self._heads[1])
        return (*self._missed, *self._tables.take())

    @override
    def rollback(self) -> None:
        self._tables.undo(0)
        with suppress(psycopg.Error):
            if self._connection.info.transaction_status is not pq.TransactionStatus.IDLE:
                self._connection.execute("ROLLBACK")
            return
        # Whatever it was doing is undone with it; the next begin makes another.
        self._connection.close()

    @override
    def fault(self, error: BaseException) -> Unavailable | None:
        cause = error.__cause__ if isinstance(error, Unavailable) else error
        if not isinstance(cause, psycopg.Error):
            return None
        fault = storage_fault(cause)
        return error if fault is not None and isinstance(error, Unavailable) else fault

    @override
    def may_repeat(self, error: BaseException) -> bool:
        return is_passing(error)

    @override
    def close(self) -> None:
        self._connection.close()

    def _connected(self) -> Connection:
        connection = self._connect()
        connection.add_notice_handler(self._hear)
        return connection

    def _hear(self, notice: psycopg.errors.Diagnostic) -> None:
        if notice.severity_nonlocalized == "WARNING":
            self._warned = True

    def _reconnect(self) -> None:
        try:
            self._connection = self._connected()
        except Misconfigured as error:
            # It was right when we started: somebody changed the database, and may change it back.
            raise Unavailable(error.message, code=error.reason, hint=error.hint) from None
        self._sql.use(self._connection)
        self._tables.undo(0)

    def _catch_up(self, told: int, count: int) -> Sequence[Change]:
        missed = self._tables.changes_since(told, count)
        if missed is None:
            raise lost_track()
        return missed

    def _take_owed(self) -> str:
        owed, self._owed = self._owed, ""
        return owed


def _unknown() -> Unavailable:
    return Unavailable(
        "whether the commit took place is not known",
        code="store_outcome_unknown",
        hint="repeat the request under the same idempotency key",
    )


def require_onward(before: tuple[int, int], now: tuple[int, int]) -> None:
    """Raise Unavailable(code="store_rolled_back") when the database has less than it had: writing on would fork its history."""
    if any(have < had for had, have in zip(before, now, strict=True)):
        raise Unavailable(
            "the database has lost what it had: a backup was restored, or a standby took over that was behind",
            code="store_rolled_back",
            hint="bring back the newer database, or restart every server to go on with the older one",
        )


def lost_track() -> Unavailable:
    """Say that changes were forgotten before this server heard of them."""
    return Unavailable(
        f"this server was cut off for more than {CHANGES_KEPT} changes",
        code="store_lost_track",
        hint="restart it: it reads everything again",
    )


class PostgresSnapshots(Snapshots):
    """One connection that reads; made when it is needed, and anew when it is lost."""

    def __init__(self, connect: Callable[[], Connection]) -> None:
        """Connect."""
        self._connect = connect
        self._connection = connect()
        self._sql = PostgresSql(self._connection)
        self._tables = SqlReader(self._sql)

    @override
    def read(self, query: Callable[[Reader], T]) -> T:
        try:
            self._begin()
            try:
                return query(self._tables)
            finally:
                self._end()
        except psycopg.Error as error:
            fault = storage_fault(error)
            if fault is None:
                raise
            raise fault from error

    @override
    def close(self) -> None:
        self._connection.close()

    def _begin(self) -> None:
        if not self._connection.closed:
            try:
                self._connection.execute(_SNAPSHOT)
            except psycopg.OperationalError:
                # It was lost since the last query, and this one has not begun.
                self._connection.close()
            else:
                return
        try:
            self._connection = self._connect()
        except Misconfigured as error:
            raise Unavailable(error.message, code=error.reason, hint=error.hint) from None
        self._sql.use(self._connection)
        self._connection.execute(_SNAPSHOT)

    def _end(self) -> None:
        with suppress(psycopg.Error):
            self._connection.execute("ROLLBACK")
            return
        self._connection.close()
