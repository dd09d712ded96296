"""A raw HTTP/2 and gRPC client that can also say what no honest client says. Blocking; frames by hand, answers by hpack."""

import errno
import select
import socket
import struct
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from hpack import Decoder

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, PRIORITY, RST, SETTINGS, PUSH, PING, GOAWAY, WINDOW, CONTINUATION = range(10)
END_STREAM, END_HEADERS, ACK = 0x1, 0x4, 0x1
TABLE_SIZE, INITIAL_WINDOW = 0x1, 0x4  # SETTINGS
NO_ERROR, ENHANCE_YOUR_CALM = 0, 11
WIDE = 2**31 - 1
SECURITY = (("workload.spiffe.io", "true"),)
Headers = Iterable[tuple[str | bytes, str | bytes]]


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big") + payload


def settings(*pairs: tuple[int, int]) -> bytes:
    return frame(SETTINGS, 0, 0, b"".join(struct.pack(">HI", *pair) for pair in pairs))


def integer(value: int, bits: int, first: int = 0) -> bytes:
    """RFC 7541 section 5.1."""
    limit = (1 << bits) - 1
    if value < limit:
        return bytes((first | value,))
    out, value = [first | limit], value - limit
    while value >= 128:
        out.append(value % 128 | 128)
        value //= 128
    return bytes([*out, value])


def literal(headers: Headers) -> bytes:
    """A header block of literals without indexing, neither Huffman-coded."""
    parts = []
    for name, value in headers:
        raw_name = name if isinstance(name, bytes) else name.encode()
        raw_value = value if isinstance(value, bytes) else value.encode()
        parts += [b"\x00", integer(len(raw_name), 7), raw_name, integer(len(raw_value), 7), raw_value]
    return b"".join(parts)


def request_headers(path: str | bytes, metadata: Headers = SECURITY) -> bytes:
    fixed = ((":method", "POST"), (":scheme", "http"), (":path", path), (":authority", "localhost"))
    return literal((*fixed, ("content-type", "application/grpc"), ("te", "trailers"), *metadata))


def message(payload: bytes, *, compressed: int = 0, length: int | None = None) -> bytes:
    """A gRPC message with its prefix; ``length`` is what it says of itself."""
    return struct.pack(">BI", compressed, len(payload) if length is None else length) + payload


@dataclass
class Heard:
    """What came on one stream."""

    headers: dict[str, str] = field(default_factory=dict)
    body: bytearray = field(default_factory=bytearray)
    ended: bool = False
    reset: int | None = None

    @property
    def status(self) -> int | str | None:
        """The gRPC status; ``http <number>`` or ``reset <code>`` where there is none; None while it goes on."""
        if "grpc-status" in self.headers:
            return int(self.headers["grpc-status"])
        if self.reset is not None:
            return f"reset {self.reset}"
        return f"http {self.headers.get(':status')}" if self.ended else None

    @property
    def messages(self) -> list[bytes]:
        found, position = [], 0
        while position + 5 <= len(self.body):
            length = int.from_bytes(self.body[position + 1 : position + 5], "big")
            if position + 5 + length > len(self.body):
                break
            found.append(bytes(self.body[position + 5 : position + 5 + length]))
            position += 5 + length
        return found


class Connection:
    """One connection. ``closed`` once the other side ended it; ``goaway`` its error code, where it said one."""

    def __init__(
        self, path: Path | str, *pairs: tuple[int, int], window: bool = True, say: bytes | None = None, wait: float = 0
    ) -> None:
        """``window``: open the connection's window wide. ``say``: instead of preface and SETTINGS.

        A full queue of the listener is an error after ``wait`` seconds of trying.
        """
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.setblocking(False)
        deadline = time.monotonic() + wait
        while (number := self.sock.connect_ex(str(path))) != 0:
            if number != errno.EAGAIN or time.monotonic() >= deadline:
                self.sock.close()
                raise OSError(number, f"connect: {errno.errorcode[number]}")
            time.sleep(0.002)
        self.streams: dict[int, Heard] = {}
        self.closed = False
        self.goaway: int | None = None
        self.next = 1
        self._may_send = 65535  # of the connection; of each stream:
        self._may_send_on: dict[int, int] = {}
        self._first_window = 65535
        self._buffer = bytearray()
        self._decoder = Decoder(max_header_list_size=1 << 20)
        self._window = window
        self._answers = say is None  # settings and pings; who says something else says nothing of itself
        if say is not None:
            self.send(say)
            return
        wide = () if any(key == INITIAL_WINDOW for key, _ in pairs) else ((INITIAL_WINDOW, WIDE),)
        self.send(PREFACE + settings(*pairs, *(wide if window else ())))
        if window:
            self.send(frame(WINDOW, 0, 0, struct.pack(">I", WIDE - 65535)))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.sock.close()

    def send(self, data: bytes, seconds: float = 30.0) -> bool:
        """Send all, reading what comes meanwhile; give whether the other side took it."""
        view, deadline = memoryview(data), time.monotonic() + seconds
        while view and not self.closed:
            try:
                view = view[self.sock.send(view) :]
            except BlockingIOError:
                if time.monotonic() > deadline:
                    return False
                if self._ready(select.POLLIN | select.POLLOUT, 0.1) & select.POLLIN:
                    self.read()
            except (BrokenPipeError, ConnectionResetError):
                self.read(always=True)
                self.closed = True
        return not view

    def open(self, path: str, payload: bytes | None = b"", metadata: Headers = SECURITY, *, end: bool = True) -> int:
        """Begin a call; ``payload`` None: no message."""
        stream, self.next = self.next, self.next + 2
        self.streams[stream] = Heard()
        flags = END_HEADERS | (END_STREAM if payload is None and end else 0)
        data = frame(HEADERS, flags, stream, request_headers(path, metadata))
        if payload is not None:
            data += data_frames(stream, message(payload), end=end)
        self.send(data)
        return stream

    def upload(self, stream: int, body: bytes, seconds: float = 30.0) -> bool:
        """Send a body as an honest client does: no more at once than the windows allow; give whether all of it went."""
        heard, at, deadline = self.streams[stream], 0, time.monotonic() + seconds
        while at < len(body) and not (self.closed or heard.ended or heard.reset is not None):
            room = min(self._may_send, self._may_send_on.setdefault(stream, self._first_window), 16384)
            if room <= 0:
                if not self.until(lambda: self._may_send > 0 and self._may_send_on[stream] > 0, 1) and (
                    time.monotonic() > deadline
                ):
                    return False
                continue
            piece = body[at : at + room]
            at += len(piece)
            self._may_send -= len(piece)
            self._may_send_on[stream] -= len(piece)
            self.send(frame(DATA, END_STREAM if at == len(body) else 0, stream, piece))
        return at >= len(body)

    def call(self, path: str, payload: bytes = b"", metadata: Headers = SECURITY, seconds: float = 30.0) -> Heard:
        """One call to its end."""
        return self.finish(self.open(path, payload, metadata), seconds)

    def finish(self, stream: int, seconds: float = 30.0) -> Heard:
        """Wait for the end of a stream."""
        heard = self.streams[stream]
        self.until(lambda: heard.status is not None and (heard.ended or heard.reset is not None), seconds)
        return heard

    def first(self, stream: int, count: int = 1, seconds: float = 30.0) -> list[bytes]:
        """Wait for so many messages of a stream, or its end."""
        heard = self.streams[stream]
        self.until(lambda: len(heard.messages) >= count or heard.ended or heard.reset is not None, seconds)
        return heard.messages

    def until(self, condition, seconds: float = 30.0) -> bool:
        """Read until it holds, the connection ends, or the time is up; give whether it holds."""
        deadline = time.monotonic() + seconds
        while not condition() and not self.closed and (left := deadline - time.monotonic()) > 0:
            if self._ready(select.POLLIN, min(left, 0.2)):
                self.read()
        return bool(condition())

    def _ready(self, events: int, seconds: float) -> int:
        poller = select.poll()
        poller.register(self.sock, events)
        return sum(event for _, event in poller.poll(seconds * 1000))

    def wait_closed(self, seconds: float = 30.0) -> bool:
        return self.until(lambda: self.closed, seconds)

    def read(self, *, always: bool = False) -> None:
        """Take what is there."""
        try:
            chunk = self.sock.recv(1 << 18)
        except BlockingIOError:
            return
        except OSError:
            chunk = b""
        if not chunk:
            self.closed = True
            return
        self._buffer += chunk
        while len(self._buffer) >= 9:
            length = int.from_bytes(self._buffer[:3], "big")
            if len(self._buffer) < 9 + length:
                break
            kind, flags = self._buffer[3], self._buffer[4]
            stream = int.from_bytes(self._buffer[5:9], "big") & WIDE
            payload = bytes(self._buffer[9 : 9 + length])
            del self._buffer[: 9 + length]
            self._take(kind, flags, stream, payload, quiet=always)

    def _take(self, kind: int, flags: int, stream: int, payload: bytes, *, quiet: bool) -> None:
        heard = self.streams.get(stream)
        if kind == HEADERS:
            decoded = dict(self._decoder.decode(payload))
            if heard:
                heard.headers |= decoded
                heard.ended |= bool(flags & END_STREAM)
        elif kind == DATA and heard:
            heard.body += payload
            heard.ended |= bool(flags & END_STREAM)
            if self._window and payload and not quiet:
                self.send(frame(WINDOW, 0, 0, struct.pack(">I", len(payload))))
        elif kind == RST and heard:
            heard.reset = int.from_bytes(payload, "big")
        elif kind == WINDOW:
            more = int.from_bytes(payload, "big") & WIDE
            if stream == 0:
                self._may_send += more
            else:
                self._may_send_on[stream] = self._may_send_on.get(stream, self._first_window) + more
        elif kind == GOAWAY:
            self.goaway = int.from_bytes(payload[4:8], "big")
        elif kind in {SETTINGS, PING} and self._answers and not flags & ACK and not quiet:
            for key, value in struct.iter_unpack(">HI", payload if kind == SETTINGS else b""):
                if key == INITIAL_WINDOW:  # it moves the windows of open streams, too
                    for one in self._may_send_on:
                        self._may_send_on[one] += value - self._first_window
                    self._first_window = value
            self.send(frame(kind, ACK, 0, b"" if kind == SETTINGS else payload))


def data_frames(stream: int, body: bytes, *, end: bool) -> bytes:
    """DATA frames of at most 16 KiB."""
    pieces = [body[start : start + 16384] for start in range(0, len(body), 16384)] or [b""]
    return b"".join(
        frame(DATA, END_STREAM if end and number == len(pieces) - 1 else 0, stream, piece)
        for number, piece in enumerate(pieces)
    )
