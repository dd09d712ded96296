"""A Unix socket whose callers the kernel identifies: accept, read the peer, admit, splice to the private gRPC server.

A connection lives no longer than the process that made it: when its pidfd becomes readable the connection is aborted,
whoever else still holds the socket. What a process may do is not known here.
"""

import asyncio
import logging
import socket
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

from broker.errors import BrokerError, Misconfigured, NotAttested, Refused
from broker.transport.acceptor import Acceptor, connection_room
from broker.transport.backend import Backend, Spare
from broker.transport.callers import CallerIndex
from broker.transport.flood import FrameMeter
from broker.transport.peercred import KernelPeer, read_kernel_peer
from broker.transport.socket_path import ClaimedSocket, claim_socket
from broker.transport.splice import Splice
from broker.transport.turnstile import Turnstile

_LOG = logging.getLogger(__name__)
C = TypeVar("C")

MAX_CONNECTIONS = 16_384  # a node runs a few thousand processes; less where descriptors are fewer
MAX_SETUPS = 32  # connections being joined at once; who comes then waits in the kernel's queue
FDS_PER_CONNECTION = 4  # accepted, pidfd, dialled, and gRPC's own end
LOOK_EVERY = 10.0  # seconds between looks whether the path still leads here
SHARE_OF_ONE_UID = 0.75  # of the room: one user that opens connections without end leaves places for the others


class Connection(Generic[C]):
    """One spliced connection and the process behind it."""

    def __init__(self, peer: KernelPeer, caller: C, turnstile: Turnstile) -> None:
        """Made by the listener."""
        self.peer = peer
        self.caller = caller
        self.turnstile = turnstile
        self.name = ""
        self.meter = FrameMeter(asyncio.get_running_loop().time)
        self.splice: Splice
        self.is_open = True

    def watch(self, chunk: bytes) -> int | None:
        """Meter what comes from the process; give how much may pass now, where calls that it begins must wait."""
        before = self.meter.streams
        passing = self.meter.read(chunk)
        return None if self.turnstile.ask(self.meter.streams - before, self.splice.front.release) else passing

    def begun(self) -> None:
        """One of its calls was taken up."""
        self.turnstile.begun()

    def cut(self, error: Exception) -> None:
        """End it at once, for a reason that the listener tells."""
        self.splice.cut(error)

    def abort(self) -> None:
        """End it at once; data in flight is lost."""
        self.splice.abort()


class UnixListener(Generic[C]):
    """Accepts on a Unix socket, asks the kernel who it is, and splices the bytes to the private gRPC server."""

    def __init__(
        self,
        path: Path,
        *,
        mode: int,
        backend: Path,
        index: CallerIndex[C],
        admit: Callable[[KernelPeer], C],
        on_closed: Callable[[C], None] | None = None,
        on_refusal: Callable[[BrokerError, KernelPeer | None], None] | None = None,
        directory_mode: int = 0o755,
        max_connections: int = MAX_CONNECTIONS,
    ) -> None:
        """``admit`` runs on the event loop at accept and must not block: snapshot facts there, attest at the first call.

        It may raise Refused: the connection is closed. The pidfd belongs to the connection (dup it to keep it longer);
        ``on_closed(caller)`` is called once after the connection ended, however it ended; ``on_refusal(error, peer)`` where
        one was refused or cut, with the peer where the kernel named one.
        """
        self._path, self._mode, self._directory_mode = path, mode, directory_mode
        self._backend = Backend(backend)
        self._index = index
        self._admit = admit
        self._on_closed = on_closed
        self._on_refusal = on_refusal
        self._max_connections = max_connections
        self._room = self._room_of_uid = 0
        self._open: set[Connection[C]] = set()
        self._of_uid: Counter[int] = Counter()
        self._of_process: dict[int, tuple[Turnstile, int]] = {}  # by pid: and how many connections pass through it
        self._emptied = asyncio.Event()
        self._setups: set[asyncio.Task[None]] = set()
        self._claimed: ClaimedSocket | None = None
        self._acceptor: Acceptor | None = None
        self._next_look: asyncio.TimerHandle | None = None

    @property
    def connections(self) -> int:
        """How many connections are open."""
        return len(self._open)

    def drop(self, predicate: Callable[[C], bool]) -> int:
        """Abort connections whose caller matches; gives their number."""
        matching = [connection for connection in self._open if predicate(connection.caller)]
        for connection in matching:
            self._end(connection)
        return len(matching)

    async def start(self) -> None:
        """Claim the path and listen. Raises Misconfigured: ``socket_path_unsafe``, ``socket_in_use``."""
        self._room = connection_room(self._max_connections, FDS_PER_CONNECTION)
        self._room_of_uid = max(1, int(self._room * SHARE_OF_ONE_UID))
        self._claimed = claim_socket(self._path, mode=self._mode, directory_mode=self._directory_mode)
        self._accept_on(self._claimed)
        self._backend.keep_spare()
        self._next_look = asyncio.get_running_loop().call_later(LOOK_EVERY, self._look_again)

    def look(self) -> None:
        """Look whether the path still leads here; one that was removed or left by a dead server is taken anew.

        Connections that are open stay. A path that somebody else serves is not taken from him: it is told as an error.
        """
        if self._claimed is None or self._claimed.is_in_place():
            return
        try:
            claimed = self._claimed.claimed_again(mode=self._mode, directory_mode=self._directory_mode)
        except Misconfigured as error:
            _LOG.error("callers are led elsewhere: %s", error.message)
            return
        _LOG.warning("%s had been removed or replaced, and is served again", claimed.path)
        self._claimed = claimed
        self._accept_on(claimed)

    def _look_again(self) -> None:
        self._next_look = asyncio.get_running_loop().call_later(LOOK_EVERY, self._look_again)
        self.look()

    def _accept_on(self, claimed: ClaimedSocket) -> None:
        if self._acceptor is not None:
            self._acceptor.close()
        self._acceptor = Acceptor(claimed.listening, self._accepted, self._has_room)
        self._acceptor.start()

    async def stop(self) -> None:
        """Stop accepting, end all connections, remove the socket. Harmless when repeated."""
        if self._acceptor is None or self._claimed is None:
            return
        if self._next_look is not None:
            self._next_look.cancel()
        self._acceptor.close()
        self._backend.close()
        self._claimed.release()
        self._acceptor = self._claimed = None
        for setup in list(self._setups):
            setup.cancel()
        await asyncio.gather(*self._setups, return_exceptions=True)
        self.drop(lambda _: True)
        if self._open:
            self._emptied.clear()
            await self._emptied.wait()

    def _accepted(self, accepted: socket.socket) -> None:
        try:
            peer = read_kernel_peer(accepted)
        except NotAttested as error:
            accepted.close()
            self._refused(error, None)
            return
        try:
            self._require_room(peer.uid)
            caller = self._admit(peer)
        except BrokerError as error:
            accepted.close()
            peer.close()
            self._refused(error, peer)
            return
        except BaseException:
            accepted.close()
            peer.close()
            raise
        # One for each process: the number is not used again before all its connections are aborted.
        turnstile, connections = self._of_process.get(peer.pid) or (Turnstile(), 0)
        self._of_process[peer.pid] = turnstile, connections + 1
        connection = Connection(peer, caller, turnstile)
        spare = self._backend.take()
        connection.name = self._index.admit(caller, connection, name=spare.name if spare else "")
        self._begin(accepted, connection, spare)

    def _has_room(self) -> bool:
        return len(self._open) < self._room and len(self._setups) < MAX_SETUPS

    def _require_room(self, uid: int) -> None:
        if self._of_uid[uid] >= self._room_of_uid:
            raise Refused(f"uid {uid} has too many connections", code="too_many_connections")

    def _begin(self, accepted: socket.socket, connection: Connection[C], spare: Spare | None) -> None:
        loop = asyncio.get_running_loop()
        connection.splice = Splice(self._backend.buffer, lambda error: self._ended(connection, error), connection.watch)
        self._open.add(connection)
        self._of_uid[connection.peer.uid] += 1
        loop.add_reader(connection.peer.pidfd, self._end, connection)
        if spare is not None:
            spare.join(connection.splice)
        setup = loop.create_task(self._join(accepted, connection))
        self._setups.add(setup)
        setup.add_done_callback(lambda done: self._joined(done, accepted, connection))

    def _end(self, connection: Connection[C]) -> None:
        # Forgotten first: calls that learn in this moment that their process is gone are to know that nobody hears them.
        self._index.forget(connection.name)
        connection.abort()

    async def _join(self, accepted: socket.socket, connection: Connection[C]) -> None:
        loop = asyncio.get_running_loop()
        await loop.connect_accepted_socket(lambda: connection.splice.front, accepted)
        if connection.splice.back.transport is None:
            await self._backend.join(connection.splice, connection.name)

    def _joined(self, setup: asyncio.Task[None], accepted: socket.socket, connection: Connection[C]) -> None:
        # Here and not in the task itself: a task that is cancelled before its first step runs nothing of its own.
        self._setups.discard(setup)
        if self._acceptor:
            self._acceptor.resume()
        error = None if setup.cancelled() else setup.exception()
        if error is None and not setup.cancelled():
            return
        connection.abort()
        if connection.splice.front.transport is None:
            accepted.close()
            self._ended(connection, None)
        if isinstance(error, BrokerError):
            self._refused(error, connection.peer)
        elif error:
            _LOG.error("defect while a connection was set up: %s", type(error).__name__)

    def _ended(self, connection: Connection[C], error: Exception | None) -> None:
        if not connection.is_open:
            return
        connection.is_open = False
        self._index.forget(connection.name)
        asyncio.get_running_loop().remove_reader(connection.peer.pidfd)
        connection.peer.close()
        self._open.discard(connection)
        if not self._open:
            self._emptied.set()
        turnstile, connections = self._of_process.pop(connection.peer.pid)
        if connections > 1:
            self._of_process[connection.peer.pid] = turnstile, connections - 1
        else:
            turnstile.close()
        self._of_uid[connection.peer.uid] -= 1
        if not self._of_uid[connection.peer.uid]:
            del self._of_uid[connection.peer.uid]
        if isinstance(error, BrokerError):
            self._refused(error, connection.peer)
        if self._acceptor:
            self._acceptor.resume()
        if self._on_closed:
            self._on_closed(connection.caller)

    def _refused(self, error: BrokerError, peer: KernelPeer | None) -> None:
        _LOG.debug("refused at the socket: %s", error.reason)
        if self._on_refusal:
            self._on_refusal(error, peer)
