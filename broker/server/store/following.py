"""Following what other servers commit: a thread with a connection of its own that listens, asks, and so knows that it is alive.

A notification only says when to ask; what is told to subscribers is read from the change log, from the number on that they know.
Without one it asks every ``BEAT_SECONDS``: a notification that is lost costs a moment, and silence is an answer.
"""

import os
import select
import threading
import time
from collections.abc import Callable, Sequence
from typing import Final

import psycopg

from broker.errors import BrokerError, Unavailable
from broker.server.store.postgres_connection import Connection, PostgresSql
from broker.server.store.postgres_transactions import lost_track, require_onward
from broker.server.store.rows import Change
from broker.server.store.tables import SqlReader

BEAT_SECONDS: Final = 0.5
"""Between two questions at most."""
CURRENT_SECONDS: Final = 1.5
"""Without an answer for so long, what memory holds may be behind: callers are told, and nothing is decided from it."""
RETRY_SECONDS: Final = 0.25
"""Between two attempts to connect: it is the shortest part of coming back."""
PAGE: Final = 1_000
"""Changes of one question: a megabyte at most, after which subscribers have a turn."""


class Follower:
    """The thread. ``take_in`` is called in it, with changes in order; ``told`` gives the last one that subscribers know."""

    def __init__(
        self,
        connect: Callable[[], Connection],
        channel: str,
        *,
        told: Callable[[], int],
        is_own: Callable[[int], bool],
        take_in: Callable[[Sequence[Change]], None],
    ) -> None:
        """Prepare a thread; ``is_own`` tells our own notifications by the database's process."""
        self._connect = connect
        self._channel = channel
        self._told = told
        self._is_own = is_own
        self._take_in = take_in
        self._given = 0
        self._contact = time.monotonic()
        self._stopping = threading.Event()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC)
        self._heard = threading.Event()
        self.broken: Unavailable | None = None
        """Why it can never be current again, if so: subscribers would miss something."""
        self._thread = threading.Thread(target=self._main, name="store-follower", daemon=True)

    def start(self) -> None:
        """Start, and wait for the first answer; whoever is not current after that is so for a reason. Blocks."""
        self._thread.start()
        self._heard.wait(CURRENT_SECONDS)

    @property
    def is_current(self) -> bool:
        """Tell whether the database answered a moment ago, and all that it had was given on."""
        return self.broken is None and time.monotonic() - self._contact < CURRENT_SECONDS

    def stop(self) -> None:
        """End the thread. Blocks for a moment."""
        self._stopping.set()
        os.eventfd_write(self._wake, 1)
        if self._thread.ident is not None:
            self._thread.join(2 * BEAT_SECONDS)
        if not self._thread.is_alive():
            os.close(self._wake)

    def _main(self) -> None:
        while not self._stopping.is_set():
            try:
                with self._connect() as connection:
                    connection.execute(f"LISTEN {self._channel}".encode())
                    self._follow(connection)
            except (psycopg.Error, BrokerError) as error:
                if isinstance(error, Unavailable) and error.reason in {"store_rolled_back", "store_lost_track"}:
                    self.broken = error
                    return
            self._stopping.wait(RETRY_SECONDS)

    def _follow(self, connection: Connection) -> None:
        tables = SqlReader(PostgresSql(connection))
        while not self._stopping.is_set():
            while self._ask(tables):
                pass
            self._heard.set()
            self._wait(connection)

    def _wait(self, connection: Connection) -> None:
        """Wait until another server has said something, for a beat at most, or until the end."""
        end = time.monotonic() + BEAT_SECONDS
        ready = select.poll()
        ready.register(connection.fileno(), select.POLLIN)
        ready.register(self._wake, select.POLLIN)
        while not self._stopping.is_set() and (left := end - time.monotonic()) > 0:
            ready.poll(left * 1000)
            said = [note for note in connection.notifies(timeout=0) if not self._is_own(note.pid)]
            if said:
                return

    def _ask(self, tables: SqlReader) -> bool:
        """Give on what is new; tell whether there may be more."""
        # What was given on is on its way to the loop, in order: no need to read it twice.
        known = max(self._told(), self._given)
        changes = tables.changes_since(known, PAGE)
        if changes is None:
            require_onward((known, 0), (tables.change_head(), 0))
            raise lost_track()
        if changes:
            self._take_in(changes)
            self._given = changes[-1].seq
        self._contact = time.monotonic()
        return len(changes) == PAGE
