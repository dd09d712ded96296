"""The single writer: a thread that runs a group of acts, each in a savepoint, and commits them together.

One COMMIT (one fsync) acknowledges the whole group, so the price of durability is shared by all who wait. What it promises:

- an act that raises is undone alone; the others of its group go on;
- what the storage refuses, at a statement or at the COMMIT, fails the whole group, and nothing of it is told to anyone;
- a group that surely was not committed may run once more, if the storage says that this can help;
- results and changes leave the thread only after the COMMIT, in the order of commits.

It knows neither asyncio, nor tables, nor a database: groups come in ready, outcomes go to a callable, the rest is a :class:`Bench`.
"""

import queue
import threading
from collections.abc import Callable, Sequence
from typing import Final, Protocol

from broker.errors import Unavailable
from broker.server import failpoints
from broker.server.store.ports import Writer
from broker.server.store.rows import Change

RUNS: Final = 2
"""How often a group runs at most: a second loss in a row is an outage, and callers should hear of it."""


class EntangledError(Exception):
    """What an act did cannot be undone alone this time: its group is to run again, and then it can."""


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


class Bench(Protocol):
    """What one writer thread works with: a connection and its tables, as the steps of a group's transaction."""

    @property
    def tables(self) -> Writer:
        """The tables, for the acts."""
        ...

    @property
    def in_transaction(self) -> bool:
        """Tell whether what the acts did so far is still there to be committed."""
        ...

    def begin(self) -> None:
        """Begin a transaction that nobody else writes beside; Unavailable, or the driver's own error."""
        ...

    def begin_act(self) -> None:
        """Begin an act: what follows can be undone alone."""
        ...

    def keep_act(self) -> None:
        """Keep what the act did."""
        ...

    def undo_act(self) -> None:
        """Undo what the act did, and only that; EntangledError where only the whole group can be undone."""
        ...

    def commit(self) -> Sequence[Change]:
        """Make all of it durable, and give every change that subscribers may not have heard of, in order."""
        ...

    def rollback(self) -> None:
        """Undo whatever is begun; never raises."""
        ...

    def fault(self, error: BaseException) -> Unavailable | None:
        """Give what the callers of a whole group are told of this error; None when it is one act's own."""
        ...

    def may_repeat(self, error: BaseException) -> bool:
        """Tell whether the group, which was not committed, may succeed when it runs again at once."""
        ...

    def close(self) -> None:
        """Close the connection."""
        ...


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

    def stop(self, timeout: float | None = None) -> None:
        """Finish what is queued, close the connection, end the thread; wait that many seconds for it at most. Blocks."""
        self._queue.put(None)
        if self._thread.ident is not None:
            self._thread.join(timeout)

    def _main(self) -> None:
        try:
            bench = self._open_bench()
        except BaseException as error:  # noqa: BLE001  (handed to whoever called start)
            self._failure = error
            return
        finally:
            self._opened.set()
        try:
            while (group := self._queue.get()) is not None:
                _work(bench, group)
                self._settle(group)
        finally:
            bench.close()


def _work(bench: Bench, group: Group) -> None:
    try:
        try:
            _execute(bench, group)
            failpoints.reach("store.before_commit")
        finally:
            group.executed.release()
        group.changes = bench.commit()
        failpoints.reach("store.after_commit")
    except BaseException as error:  # noqa: BLE001  (each caller of the group gets it; the thread must live)
        bench.rollback()
        _fail(bench, group.acts, error)


def _execute(bench: Bench, group: Group) -> None:
    for left in reversed(range(RUNS)):
        try:
            failpoints.reach("store.before_begin")
            bench.begin()
            for act in group.acts:
                _run(bench, act)
        except Exception as error:
            if not left or not bench.may_repeat(error):
                raise
            bench.rollback()
            for act in group.acts:
                act.result = act.error = None
        else:
            return


def _run(bench: Bench, act: Act) -> None:
    bench.begin_act()
    try:
        act.result = act.run(bench.tables)
        failpoints.reach("store.after_act")
        bench.keep_act()
    except BaseException as error:
        if bench.fault(error) is not None or not bench.in_transaction:
            # The storage may have undone more than this act: nothing of the group can be trusted.
            raise
        bench.undo_act()
        act.result, act.error = None, error


def _fail(bench: Bench, acts: Sequence[Act], error: BaseException) -> None:
    for act in acts:
        # An act that had raised keeps its own reason: it did not take place either way.
        if act.error is None:
            act.result, act.error = None, _told(bench, error)


def _told(bench: Bench, error: BaseException) -> BaseException:
    # Each caller gets its own exception: a shared one would gather everybody's traceback.
    told = bench.fault(error) or error
    return Unavailable(told.message, code=told.reason, hint=told.hint) if isinstance(told, Unavailable) else told
