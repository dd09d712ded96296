"""Asks a container runtime over its Unix socket: HTTP/1.1, one question a connection, no redirects.

The socket itself must belong to the runtime's user and so must the process that serves it. An answer has a budget; who
asks gives it a time-out. Waits on the event loop, and not in a thread: many ask at once, and each waits for another process.
Knows no runtime, and does not read what the answers mean.
"""

import asyncio
import http
import os
import socket
import stat
import struct
from dataclasses import dataclass
from typing import Final

import httptools

from broker.attestation.contract import AttestorFailed, AttestorUnavailable
from broker.attestation.reads import BlockingReads

MAX_ANSWER: Final = 1 << 20  # bytes of a body; an inspection has some 6 KiB
MAX_HEAD: Final = 1 << 16  # bytes beside the body
MAX_HEADERS: Final = 100  # a runtime sends ten
_CHUNK: Final = 1 << 16  # bytes of one read
_PEER: Final = struct.Struct("iII")  # struct ucred: pid, uid, gid
_QUEUE_PAUSE: Final = 0.005  # seconds until a runtime whose queue is full is tried again
_FRAMING: Final = frozenset({b"content-length", b"transfer-encoding"})


class NotThere(Exception):
    """The runtime answered 404."""


@dataclass(frozen=True, slots=True)
class RuntimeSocket:
    """A runtime's socket, and the user whom it must belong to."""

    path: str
    owner: int
    prefix: str = ""  # of every path: the version of the interface
    reads: BlockingReads | None = None  # to look at a path that its user arranges, and may have made hang

    async def get(self, path: str) -> bytes:
        """Give the body of a 200. ``path`` is ASCII. Raises ``NotThere`` for 404 and ``AttestorFailed`` for all else.

        Waits for as long as it is let: under a time-out of the caller's.
        """
        request = f"GET {self.prefix}{path} HTTP/1.1\r\nHost: runtime\r\nAccept: application/json\r\nConnection: close\r\n\r\n"
        loop = asyncio.get_running_loop()
        try:
            with await self._connected() as connection:
                await loop.sock_sendall(connection, request.encode("ascii"))
                answer = _Answer()
                while not answer.is_whole:
                    answer.take(await loop.sock_recv(connection, _CHUNK))
                return answer.body()
        except TimeoutError:  # an OSError, too
            raise
        except (OSError, httptools.HttpParserError):
            # The text of either could hold a piece of the answer.
            raise AttestorUnavailable(
                "the container runtime cannot be asked", code="runtime_unreachable", hint="check its socket's path"
            ) from None

    async def _connected(self) -> socket.socket:
        while True:
            # One that nobody waits for any more when its thread is done closes with its last reference.
            dialled = (
                self._dialled() if self.reads is None else await self.reads.run(self.owner, lambda _: self._dialled())
            )
            if dialled is not None:
                return dialled
            await asyncio.sleep(_QUEUE_PAUSE)

    def _dialled(self) -> socket.socket | None:
        """Connect, to whom it should be; None: its queue is full."""
        held = os.open(self.path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            state = os.fstat(held)
            if not stat.S_ISSOCK(state.st_mode) or state.st_uid != self.owner:
                raise self._not_trusted()
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
            try:
                # Through the descriptor: what was looked at is what is connected to.
                connection.connect(f"/proc/self/fd/{held}")
                self._require_served(connection)
            except BaseException as error:
                connection.close()
                if isinstance(error, BlockingIOError):
                    return None
                raise
        finally:
            os.close(held)
        return connection

    def _require_served(self, connection: socket.socket) -> None:
        _, uid, _ = _PEER.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
        if uid != self.owner:
            raise self._not_trusted()

    def _not_trusted(self) -> AttestorFailed:
        return AttestorFailed(
            "the container runtime's socket is not a socket that belongs to the runtime's user",
            code="runtime_not_trusted",
            hint="the path must be the socket itself, owned and served by root",
        )


class _Answer:
    """One answer (RFC 9112 section 6): its length, its chunks or the end of the connection say when it is whole."""

    def __init__(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._status = 0
        self._heard = self._length = self._headers = 0
        self._pieces: list[bytes] = []
        self._is_framed = False
        self.is_whole = False

    def take(self, chunk: bytes) -> None:
        """Take what was read, nothing for the end; raises AttestorFailed or the parser's error."""
        if not chunk:
            if not self._status or self._is_framed:
                raise ConnectionError("cut short")
            self.is_whole = True
            return
        self._heard += len(chunk)
        try:
            self._parser.feed_data(chunk)
        except httptools.HttpParserError:
            if not self.is_whole:  # what stands behind a whole answer is nobody's
                raise
        if self._length > MAX_ANSWER or self._heard > MAX_ANSWER + MAX_HEAD:
            raise AttestorFailed("the runtime's answer is too long", code="runtime_answer")

    def body(self) -> bytes:
        """Give the whole body of a 200; raises as :meth:`RuntimeSocket.get` does."""
        if self._status == http.HTTPStatus.NOT_FOUND:
            raise NotThere
        if self._status != http.HTTPStatus.OK:
            is_its_fault = self._status >= http.HTTPStatus.INTERNAL_SERVER_ERROR
            failure = AttestorUnavailable if is_its_fault else AttestorFailed
            raise failure(f"the container runtime answered {self._status}", code="runtime_answer")
        return b"".join(self._pieces)

    # What the parser calls.

    def on_message_begin(self) -> None:
        if self.is_whole:
            raise ValueError("no second answer is read")  # becomes an error of the parser

    def on_header(self, name: bytes, value: bytes) -> None:
        del value
        self._headers += 1
        if self._headers > MAX_HEADERS:
            raise ValueError("too many headers")  # becomes an error of the parser
        self._is_framed = self._is_framed or name.lower() in _FRAMING

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        self._status = 0 if status == http.HTTPStatus.CONTINUE else status

    def on_body(self, piece: bytes) -> None:
        self._length += len(piece)
        self._pieces.append(piece)

    def on_message_complete(self) -> None:
        self.is_whole = self._status != 0


def late() -> AttestorFailed:
    """Make the refusal for a runtime that is too slow."""
    return AttestorUnavailable("the container runtime did not answer in time", code="attestor_timeout")
