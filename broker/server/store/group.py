"""The single writer: a thread that runs a group of acts, each in a savepoint, and commits them together.

One COMMIT (one fsync) acknowledges the whole group, so the price of durability is shared by all who wait. What it promises:

- an act that raises is undone alone; the others of its group go on;
- what the storage refuses, at a statement or at the COMMIT, fails the whole group, and nothing of it is told to anyone;
- results and changes leave the thread only after the COMMIT, in the order of commits.

It knows neither asyncio nor tables: groups come in ready, outcomes go to a callable, the tables are a :class:`Workbench`.
"""

import queue
import sqlite3
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from sqlite_utils import Database

from broker.errors import Unavailable
from broker.server import failpoints
from broker.server.store.connection import storage_fault
from broker.server.store.ports import Writer
from broker.server.store.rows import Change


class Act:
    """One write: the function, the caller's own mark, and how it went."""

    __slots__ = ("error", "result", "run", "ticket")

    def __init__(self, run: Callable[[Writer], object], ticket: object) -> None:
        """Hold a function over the tables and whatever the caller knows it by."""
        self.run: Final = run
        self.ticket: Final = ticket
        self.result: object = None
        self.error: BaseException | None = None


class Group:
    """Acts of one COMMIT. ``executed`` is released once their statements have run and only the COMMIT is left."""

    __slots__ = ("acts", "changes", "executed")

    def __init__(self, acts: Sequence[Act]) -> None:
        """Take the acts in the order in which they run."""
        self.acts: Final = acts
        self.changes: Sequence[Change] = ()
        self.executed: Final = threading.Lock()
        self.executed.acquire()


class Workbench(Writer, Protocol):
    """The tables as the writer thread drives them: what they cache must follow what is rolled back."""

    def pending(self) -> int:
        """Count the changes noted since the last take."""
        ...

    def undo(self, keep: int) -> None:
        """Forget the changes beyond ``keep`` and everything cached: a rollback took place."""
        ...

    def take(self) -> Sequence[Change]:
        """Hand out the noted changes; the group is committed."""
        ...


@dataclass(frozen=True, slots=True)
class Bench:
    """What one writer thread works with: its connection, its tables, and the check that the file is still ours."""

    db: Database
    tables: Workbench
    check: Callable[[], None]


class GroupWriter:
    """The thread. ``open_bench`` runs in it, since a connection belongs to its thread; so does ``settle``."""

    def __init__(self, open_bench: Callable[[], Bench], settle: Callable[[Group], None]) -> None:
        """Prepare a thread; nothing runs before :meth:`start`."""
        self._open_bench = open_bench
        self._settle = settle
        self._queue: queue.SimpleQueue[Group | None] = queue.SimpleQueue()
        self._opened = threading.Event()
        self._failure: BaseException | None = None
        # A daemon: a kill at any moment is safe, so nobody needs to wait for it at exit.
        self._thread = threading.Thread(target=self._main, name="store-writer", daemon=True)

    def start(self) -> None:
        """Start the thread and wait until the database is open; raises what opening raised. Blocks."""
        self._thread.start()
        self._opened.wait()
        if self._failure is not None:
            raise self._failure

    @property
    def is_alive(self) -> bool:
        """Tell whether the thread runs: nothing that is submitted is done without it."""
        return self._thread.is_alive()

    def submit(self, group: Group) -> None:
        """Queue a group; never blocks."""
        self._queue.put(group)

    def stop(self) -> None:
        """Finish what is queued, close the connection, end the thread. Blocks."""
        self._queue.put(None)
        if self._thread.ident is not None:
            self._thread.join()

    def _main(self) -> None:
        try:
            bench = self._open_bench()
            watch = _ForeignWrites(bench)
        except BaseException as error:  # noqa: BLE001  (handed to whoever called start)
            self._failure = error
            return
        finally:
            self._opened.set()
        try:
            while (group := self._queue.get()) is not None:
                _work(bench, watch, group)
                self._settle(group)
        finally:
            bench.db.close()


class _ForeignWrites:
    """Notices rows written by another process (a repair by hand), so that cached heads are read again."""

    def __init__(self, bench: Bench) -> None:
        self._bench = bench
        self._version = self._read()

    def look(self) -> None:
        version = self._read()
        if version != self._version:
            self._version = version
            self._bench.tables.undo(0)

    def _read(self) -> object:
        return self._bench.db.conn.execute("PRAGMA data_version").fetchone()[0]


def _work(bench: Bench, watch: _ForeignWrites, group: Group) -> None:
    connection = bench.db.conn
    try:
        try:
            _check(bench)
            failpoints.reach("store.before_begin")
            connection.execute("BEGIN IMMEDIATE")
            watch.look()
            for act in group.acts:
                _run(bench, act)
            failpoints.reach("store.before_commit")
        finally:
            group.executed.release()
        connection.execute("COMMIT")
        group.changes = bench.tables.take()
        failpoints.reach("store.after_commit")
    except BaseException as error:  # noqa: BLE001  (each caller of the group gets it; the thread must live)
        _fail(bench, group.acts, error)


def _check(bench: Bench) -> None:
    try:
        bench.check()
    except Unavailable:
        # If it is the log that is gone, what it holds is still open here: bring it home while that lasts.
        bench.db.conn.execute("PRAGMA wal_checkpoint(PASSIVE)").fetchall()
        raise


def _run(bench: Bench, act: Act) -> None:
    connection = bench.db.conn
    kept = bench.tables.pending()
    connection.execute("SAVEPOINT act")
    try:
        act.result = act.run(bench.tables)
        failpoints.reach("store.after_act")
        connection.execute("RELEASE act")
    except BaseException as error:
        if _is_storage_fault(error) or not connection.in_transaction:
            # SQLite may have undone more than this act: nothing of the group can be trusted.
            raise
        connection.execute("ROLLBACK TO act")
        connection.execute("RELEASE act")
        bench.tables.undo(kept)
        act.result, act.error = None, error


def _is_storage_fault(error: BaseException) -> bool:
    cause = error.__cause__ if isinstance(error, Unavailable) else error
    return isinstance(cause, sqlite3.Error) and storage_fault(cause) is not None


def _fail(bench: Bench, acts: Sequence[Act], error: BaseException) -> None:
    try:
        if bench.db.conn.in_transaction:
            bench.db.conn.execute("ROLLBACK")
    except sqlite3.Error:
        # Then BEGIN fails as well, each caller is told, and the next rollback tries again.
        pass
    bench.tables.undo(0)
    for act in acts:
        # An act that had raised keeps its own reason: it did not take place either way.
        if act.error is None:
            act.result, act.error = None, _told(error)


def _told(error: BaseException) -> BaseException:
    # Each caller gets its own exception: a shared one would gather everybody's traceback.
    if isinstance(error, sqlite3.Error):
        return storage_fault(error) or error
    if isinstance(error, Unavailable):
        return Unavailable(error.message, code=error.reason, hint=error.hint)
    return error
