"""The byte relay between an accepted connection and a backend, both ways, with back-pressure and half-close.

Two protocols that write into each other's transport: no task, no stream object and no queue per connection. Knows
nothing of what the bytes mean, or whose they are.
"""

import asyncio
from collections.abc import Callable
from typing import cast

CHUNK = 64 * 1024  # read at once; one buffer for all connections of a loop, since a read is passed on before the next
HIGH_WATER = 64 * 1024  # bytes waiting on one side before the other side is no longer read
LINGER = 10.0  # seconds for a peer to take what is still meant for it after the other side has ended


Watch = Callable[[bytes], int | None]
"""Sees every chunk; raises to have the connection cut; a number of bytes: the rest must wait for :meth:`End.release`."""


class End(asyncio.BufferedProtocol):
    """One side of a splice; reading stays paused until both sides are joined."""

    __slots__ = (
        "_buffer",
        "_draining",
        "_early",
        "_held",
        "_linger",
        "_watch",
        "closing",
        "eof",
        "lost",
        "other",
        "splice",
        "spoke",
        "transport",
    )

    def __init__(self, splice: "Splice", buffer: memoryview, watch: "Watch | None") -> None:
        """``watch`` sees every chunk before it is passed on."""
        self.splice = splice
        self.transport: asyncio.Transport | None = None
        self.other: End
        self.spoke = self.eof = self.lost = self.closing = False
        self._buffer = buffer
        self._watch = watch
        self._early = self._held = b""
        self._draining = False
        self._linger: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Hold the transport, and its first bytes in the kernel until there is somebody to give them to."""
        self.transport = cast("asyncio.Transport", transport)
        self.transport.set_write_buffer_limits(high=HIGH_WATER)
        self.transport.pause_reading()
        # Early 3.11 (Debian 12 has 3.11.2) starts to read after this method whatever it said: told again, once it has.
        asyncio.get_running_loop().call_soon(self._hold)
        self.splice.made()

    def _hold(self) -> None:
        if self.other.transport is None:
            self.read(wanted=True)  # a second pause alone would do nothing
            self.read(wanted=False)

    def get_buffer(self, sizehint: int) -> memoryview:
        """The loop's one read buffer."""
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        """Pass a chunk on."""
        self.spoke = True
        chunk = bytes(self._buffer[:nbytes])  # a copy: transports of later Pythons keep what they could not send
        if self._watch:
            try:
                passing = self._watch(chunk)
            except Exception as error:  # noqa: BLE001 - whatever the watch says, the connection ends by it
                self.splice.cut(error)
                return
            if passing is not None and passing < len(chunk):
                self.read(wanted=False)
                chunk, self._held = chunk[:passing], chunk[passing:]
        self.other.write(chunk)

    def release(self) -> None:
        """Pass on what was to wait, and read on. Harmless when nothing is."""
        if self._held:
            chunk, self._held = self._held, b""
            self.other.write(chunk)
            if self.other.transport is None or self.other.transport.get_write_buffer_size() <= HIGH_WATER:
                self.read(wanted=True)

    def write(self, chunk: bytes) -> None:
        """Send, unless this side is ending."""
        if self.transport is None:
            # A loop that reads though it was told not to while a connection is made (uvloop): one chunk at most.
            self._early += chunk
            self.other.read(wanted=False)
        elif not self.closing and not self.lost and not self.transport.is_closing():
            self.transport.write(chunk)

    def hear_early(self, heard: bytes) -> None:
        """Take what this side said before the splice began; the other sends it when it is there."""
        if heard:
            self.spoke = True
            self.other.write(heard)

    def begin(self) -> None:
        """Both sides are there: send what came early, and read."""
        if self._early:
            self.write(self._early)
            self._early = b""
        self.read(wanted=True)

    def pause_writing(self) -> None:
        """Too much waits here: stop reading there."""
        self.other.read(wanted=False)

    def resume_writing(self) -> None:
        """It went out: read there again, or close when that was the last of it."""
        if self._draining:
            # Not here: asyncio calls this while it still writes, and would lose the connection twice.
            asyncio.get_running_loop().call_soon(self._close)
        else:
            self.other.read(wanted=True)

    def read(self, *, wanted: bool) -> None:
        """Start or stop reading; not before what waits was released."""
        if self._held:
            return
        if self.transport and not self.lost and not self.transport.is_closing():
            (self.transport.resume_reading if wanted else self.transport.pause_reading)()

    def eof_received(self) -> bool:
        """Half-close: told to the other side where its transport can, else the end."""
        return self.splice.half_closed(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """This side is gone."""
        self.lost = True
        if self._linger:
            self._linger.cancel()
        self.splice.lost(self)

    def finish(self) -> None:
        """Close once everything is sent, within LINGER seconds."""
        if self.transport is None or self.lost or self.closing or self._draining:
            return
        self.limit(LINGER)
        if self.transport.get_write_buffer_size() == 0:
            self._close()
        else:
            # close() alone would do for a plain socket, but asyncio's TLS drops what its record layer still holds.
            self._draining = True
            self.transport.set_write_buffer_limits(high=0)

    def limit(self, seconds: float) -> None:
        """Abort this side unless it has ended by then."""
        if self._linger is None:
            self._linger = asyncio.get_running_loop().call_later(seconds, self.abort)

    def abort(self) -> None:
        """End now; what was not sent is lost."""
        if self.transport is not None and not self.lost:
            self.transport.abort()

    def _close(self) -> None:
        if self.transport is not None and not self.closing and not self.lost:
            self.closing = True
            # Once only: a second close() makes asyncio's TLS transport deaf to a later abort().
            if not self.transport.is_closing():
                self.transport.close()


class Splice:
    """One relayed connection; ``on_closed(error)`` is called once, when both sides are gone."""

    def __init__(
        self,
        buffer: memoryview,
        on_closed: Callable[[Exception | None], None],
        watch: Watch | None = None,
    ) -> None:
        """Make both ends; ``watch`` sees what comes from the front."""
        self.front = End(self, buffer, watch)
        self.back = End(self, buffer, None)
        self.front.other, self.back.other = self.back, self.front
        self.ended_by: End | None = None  # the side that stopped first
        self._on_closed = on_closed
        self._error: Exception | None = None
        self._ended = False

    def made(self) -> None:
        """One side is there: with the second the bytes begin to flow."""
        if self._ended or self.front.lost or self.back.lost:
            self.abort()
        elif self.front.transport and self.back.transport:
            self.front.begin()
            self.back.begin()

    def half_closed(self, end: End) -> bool:
        """What a side's eof_received answers: whether that side stays open for the other direction."""
        end.eof = True
        self.ended_by = self.ended_by or end
        other = end.other
        if other.eof or not _can_half_close(end) or not _can_half_close(other):
            other.finish()
            return False
        if not (other.lost or other.closing):
            cast("asyncio.Transport", other.transport).write_eof()
        if end is self.back:
            # The backend has said its last word: a front that stays silent must not hold the connection.
            self.front.limit(LINGER)
        return True

    def lost(self, end: End) -> None:
        """One side is gone: so will be the other, after what it is still to be sent."""
        self.ended_by = self.ended_by or end
        end.other.finish()
        if not self._ended and (end.other.lost or end.other.transport is None):
            self._ended = True
            self._on_closed(self._error)

    def close(self) -> None:
        """End both sides after what is buffered has gone out."""
        self.front.finish()
        self.back.finish()

    def cut(self, error: Exception) -> None:
        """End at once, and say why to ``on_closed``."""
        self._error = self._error or error
        self.abort()

    def abort(self) -> None:
        """End at once; what is buffered is lost."""
        self.front.abort()
        self.back.abort()


def _can_half_close(end: End) -> bool:
    return end.transport is not None and end.transport.can_write_eof()
