"""The private gRPC socket behind a listener: dialled from a name of its own for each connection, or once ahead.

gRPC takes a while to accept a connection and to say its first words. One that was dialled ahead has that behind it when a
caller comes; it is nobody's until then, and nobody is answered on it. Whoever comes while there is none has one dialled.
"""

import asyncio
import socket
from pathlib import Path
from typing import cast

from broker.errors import Unavailable
from broker.transport.callers import new_name
from broker.transport.splice import CHUNK, Splice

DIAL_DEADLINE = 10.0  # seconds for the backend to have a place in its queue
_DIAL_PAUSE = 0.005
SPARE_PAUSE = 0.01  # seconds until the next one is dialled: whoever took the last one has his answer first
SPARE_LIFE = 4.0  # seconds: the time that gRPC gives for a client's first bytes runs from the dialling on
MAX_HEARD = 1024  # bytes before the client's first: settings, some fifty


class Spare(asyncio.Protocol):
    """A connection to the backend that waits for a caller, and what the backend has said on it."""

    def __init__(self, name: str) -> None:
        """``name``: that it was dialled from."""
        self.name = name
        self.is_lost = False
        self._transport: asyncio.Transport | None = None
        self._heard = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """It is dialled."""
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        """Keep what the backend says first."""
        self._heard += data
        if len(self._heard) > MAX_HEARD:
            self.abort()

    def eof_received(self) -> None:
        """The backend wants it no more."""
        self.is_lost = True

    def connection_lost(self, exc: Exception | None) -> None:
        """The same."""
        self.is_lost = True

    def abort(self) -> None:
        """Let go of it."""
        self.is_lost = True
        if self._transport is not None:
            self._transport.abort()

    def join(self, splice: Splice) -> None:
        """Make it the back of a splice, for good."""
        assert self._transport is not None  # only such are given out
        self._transport.set_protocol(splice.back)
        splice.back.connection_made(self._transport)
        splice.back.hear_early(self._heard)


class Backend:
    """The private Unix socket that a listener splices to."""

    def __init__(self, path: Path) -> None:
        """``path``: where the backend listens, in a directory that only we can enter."""
        self._path = str(path)
        self.buffer = memoryview(bytearray(CHUNK))
        self._spare: Spare | None = None
        self._next: asyncio.TimerHandle | None = None
        self._dialling: asyncio.Task[None] | None = None

    def keep_spare(self) -> None:
        """Have one connection dialled ahead from now on, until :meth:`close`."""
        self._renew()

    def close(self) -> None:
        """Keep none any more. Harmless when none is kept."""
        if self._next is not None:
            self._next.cancel()
            self._next = None
        if self._dialling is not None:
            self._dialling.cancel()
        self._drop_spare()

    def take(self) -> Spare | None:
        """Give the connection that was dialled ahead; None where there is none."""
        spare, self._spare = self._spare, None
        if spare is None or self._next is None:
            return None
        self._next.cancel()
        self._next = asyncio.get_running_loop().call_later(SPARE_PAUSE, self._renew)
        return None if spare.is_lost else spare

    def _renew(self) -> None:
        loop = asyncio.get_running_loop()
        self._next = loop.call_later(SPARE_LIFE, self._renew)
        self._drop_spare()
        if self._dialling is None or self._dialling.done():
            self._dialling = loop.create_task(self._dial_ahead())

    async def _dial_ahead(self) -> None:
        spare = Spare(new_name())
        try:
            dialled = _dialled(spare.name, self._path)
        except OSError:
            return  # busy, or gone: who comes meanwhile finds out for himself
        try:
            await asyncio.get_running_loop().create_unix_connection(lambda: spare, sock=dialled)
        except BaseException:
            dialled.close()
            raise
        self._spare = spare

    def _drop_spare(self) -> None:
        if self._spare is not None:
            self._spare.abort()
            self._spare = None

    async def join(self, splice: Splice, name: str) -> None:
        """Dial from a socket bound to the abstract ``name`` and join it to the splice's front.

        Raises Unavailable when nobody listens, or the backend's queue stays full for DIAL_DEADLINE seconds.
        """
        dialled = await self._dial(name)
        try:
            await asyncio.get_running_loop().create_unix_connection(lambda: splice.back, sock=dialled)
        except BaseException:
            dialled.close()
            raise

    async def _dial(self, name: str) -> socket.socket:
        try:
            async with asyncio.timeout(DIAL_DEADLINE):
                while True:
                    try:
                        return _dialled(name, self._path)
                    except BlockingIOError:  # the kernel tells nobody of a free place
                        await asyncio.sleep(_DIAL_PAUSE)
        except OSError as error:  # TimeoutError is one
            raise Unavailable("the service behind this socket does not accept connections") from error


def _dialled(name: str, path: str) -> socket.socket:
    """Connect from the abstract ``name``; raises OSError, BlockingIOError where the queue is full.

    Not loop.sock_connect: a Unix socket refused for a full queue (EAGAIN) is not "in progress", and asyncio would take it for
    connected.
    """
    dialled = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        dialled.bind(f"\0{name}")
        dialled.connect(path)
    except BaseException:
        dialled.close()
        raise
    return dialled
