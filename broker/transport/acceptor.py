"""The accept loop: takes connections as fast as there is room for them, and waits where there is none.

Never spins: when descriptors run out it rests, when its owner is full it leaves callers in the kernel's queue. What a
connection is for is its owner's business.
"""

import asyncio
import errno
import logging
import resource
import socket
from collections.abc import Callable

_LOG = logging.getLogger(__name__)

BACKLOG = 1024  # honest callers wait here while the loop is busy; above it connect() fails at once
BATCH = 8  # accepted in one turn of the loop, so that a burst of callers cannot hold it
REST = 0.2  # seconds to wait when the process or the system is out of descriptors
RESERVED_FDS = 96  # kept for files, health and admin sockets, and gRPC's own; see connection_room
_EXHAUSTED = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})


def raise_file_limit() -> int:
    """Lift the soft limit of open files to the hard one; gives the limit. Call once, at the start of a program."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def connection_room(wanted: int, fds_each: int) -> int:
    """How many connections this process has descriptors for, at most ``wanted``, at least one."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return wanted
    return max(1, min(wanted, (soft - RESERVED_FDS) // fds_each))


class Acceptor:
    """Accepts on one listening socket and hands each connection to ``accepted``, non-blocking and not inheritable."""

    def __init__(
        self,
        listening: socket.socket,
        accepted: Callable[[socket.socket], None],
        has_room: Callable[[], bool],
        make_room: Callable[[], None] = lambda: None,
    ) -> None:
        """Own ``listening``; ``accepted`` must not block and owns the connection.

        ``make_room`` is called when somebody waits and there is no room; it may end connections, whose owner then
        calls :meth:`resume`.
        """
        self._listening = listening
        self._accepted = accepted
        self._has_room = has_room
        self._make_room = make_room
        self._loop = asyncio.get_running_loop()
        self._reading = False
        self._rest: asyncio.TimerHandle | None = None
        self._closed = False

    def start(self) -> None:
        """Begin."""
        self._listening.setblocking(False)
        self.resume()

    def resume(self) -> None:
        """Go on after a connection ended; harmless at any time."""
        if not (self._reading or self._closed or self._rest):
            self._reading = True
            self._loop.add_reader(self._listening.fileno(), self._accept)

    def close(self) -> None:
        """Stop, and close the listening socket."""
        if self._closed:
            return
        self._closed = True
        self._pause()
        if self._rest:
            self._rest.cancel()
        self._listening.close()

    def _pause(self) -> None:
        if self._reading:
            self._reading = False
            self._loop.remove_reader(self._listening.fileno())

    def _accept(self) -> None:
        if not self._has_room():
            self._pause()
            self._make_room()
            return
        for _ in range(BATCH):
            if self._closed or not self._has_room():
                return
            try:
                connection, _address = self._listening.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                if error.errno not in _EXHAUSTED:
                    # The connection that failed is gone already (EPROTO, ENETDOWN …): the next one may be well.
                    _LOG.debug("accept: %s", error.strerror)
                    return
                self._exhausted(error)
                return
            connection.setblocking(False)
            self._accepted(connection)

    def _exhausted(self, error: OSError) -> None:
        # The socket stays readable while we cannot accept: without a rest the loop would spin on it.
        _LOG.warning("accept rests: %s", error.strerror)
        self._pause()
        self._rest = self._loop.call_later(REST, self._rested)

    def _rested(self) -> None:
        self._rest = None
        self.resume()
