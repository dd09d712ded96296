"""Asks a container runtime over its Unix socket: HTTP/1.1, one question a connection, no redirects.

The socket itself must belong to the runtime's user and so must the process that serves it. Every read has a deadline
and a budget. Blocks: for a thread of ``BlockingReads``. Knows no runtime, and does not read what the answers mean.
"""

import http.client
import io
import os
import socket
import stat
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, cast

from typing_extensions import override

from broker.attestation.contract import AttestorFailed, AttestorUnavailable
from broker.attestation.reads import Abandoned
from broker.clock import SystemClock

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

MAX_ANSWER: Final = 1 << 20  # bytes of a body; an inspection has some 6 KiB
MAX_HEAD: Final = 1 << 16  # bytes beside the body
_PEER: Final = struct.Struct("iII")  # struct ucred: pid, uid, gid


class NotThere(Exception):
    """The runtime answered 404."""


@dataclass(frozen=True, slots=True)
class Deadline:
    """When to stop: at a monotonic time, or when nobody waits any more."""

    until: float
    abandoned: Abandoned

    def left(self) -> float:
        """Give the seconds left, more than none; raises ``TimeoutError``."""
        seconds = self.until - SystemClock().monotonic()
        if seconds <= 0 or self.abandoned():
            raise TimeoutError
        return seconds


class _Answer(io.RawIOBase):
    """A connection's bytes, each read bounded by the deadline and all of them by a budget."""

    def __init__(self, connection: socket.socket, deadline: Deadline) -> None:
        super().__init__()
        self._connection = connection
        self._deadline = deadline
        self._budget = MAX_ANSWER + MAX_HEAD

    @override
    def readable(self) -> bool:
        return True

    @override
    def readinto(self, buffer: "WriteableBuffer") -> int:
        if self._budget <= 0:
            raise AttestorFailed("the runtime's answer is too long", code="runtime_answer")
        self._connection.settimeout(self._deadline.left())
        count = self._connection.recv_into(memoryview(buffer)[: self._budget])
        self._budget -= count
        return count

    def makefile(self, mode: str) -> io.BufferedReader:
        """Give what ``http.client`` asks of a socket."""
        return io.BufferedReader(self)


@dataclass(frozen=True, slots=True)
class RuntimeSocket:
    """A runtime's socket, and the user whom it must belong to."""

    path: str
    owner: int
    prefix: str = ""  # of every path: the version of the interface

    def get(self, path: str, deadline: Deadline) -> bytes:
        """Give the body of a 200. ``path`` is ASCII. Raises ``NotThere`` for 404 and ``AttestorFailed`` for all else."""
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as connection:
                connection.settimeout(deadline.left())
                self._connect(connection)
                connection.sendall(
                    f"GET {self.prefix}{path} HTTP/1.1\r\nHost: runtime\r\nAccept: application/json\r\n"
                    "Connection: close\r\n\r\n".encode("ascii")
                )
                return _body(_Answer(connection, deadline))
        except TimeoutError:
            raise late() from None
        except (OSError, http.client.HTTPException):
            # The text of either could hold a piece of the answer.
            raise AttestorUnavailable(
                "the container runtime cannot be asked", code="runtime_unreachable", hint="check its socket's path"
            ) from None

    def _connect(self, connection: socket.socket) -> None:
        held = os.open(self.path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            state = os.fstat(held)
            if not stat.S_ISSOCK(state.st_mode) or state.st_uid != self.owner:
                raise self._not_trusted()
            # Through the descriptor: what was looked at is what is connected to.
            connection.connect(f"/proc/self/fd/{held}")
        finally:
            os.close(held)
        _, uid, _ = _PEER.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size))
        if uid != self.owner:
            raise self._not_trusted()

    def _not_trusted(self) -> AttestorFailed:
        return AttestorFailed(
            "the container runtime's socket is not a socket that belongs to the runtime's user",
            code="runtime_not_trusted",
            hint="the path must be the socket itself, owned and served by root",
        )


def _body(answer: _Answer) -> bytes:
    response = http.client.HTTPResponse(cast("socket.socket", answer), method="GET")
    response.begin()
    if response.status == http.HTTPStatus.NOT_FOUND:
        raise NotThere
    if response.status != http.HTTPStatus.OK:
        is_its_fault = response.status >= http.HTTPStatus.INTERNAL_SERVER_ERROR
        failure = AttestorUnavailable if is_its_fault else AttestorFailed
        raise failure(f"the container runtime answered {response.status}", code="runtime_answer")
    body = response.read(MAX_ANSWER + 1)
    if len(body) > MAX_ANSWER or response.length:  # a length that is left over: cut short
        raise AttestorFailed("the runtime's answer is too long or cut short", code="runtime_answer")
    return body


def late() -> AttestorFailed:
    """Make the refusal for a runtime that is too slow."""
    return AttestorUnavailable("the container runtime did not answer in time", code="attestor_timeout")
