"""Counts the HTTP/2 frames that cost a server much and their sender nothing, and says when it is too much.

gRPC's core never cuts a client for rapid resets (CVE-2023-44487), floods of SETTINGS, PING or PRIORITY, or a header
block without end, takes header blocks of any size, and overlooks frames on streams that were never opened, or ended. This
looks at frame headers only (RFC 9113 section 4.1); of contents it knows nothing.
"""

from collections.abc import Callable

from broker.errors import Refused

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"  # RFC 9113 section 3.4
_HEADER_BYTES = 9
_STREAM_MASK = 0x7FFFFFFF  # the first bit is reserved

RESET_BURST, RESET_RATE = 1_000, 200.0  # RST_STREAM: a client that cancels all its calls at once is honest
CONTROL_BURST, CONTROL_RATE = (
    1_000,
    100.0,
)  # SETTINGS, PING, PRIORITY, unknown and empty frames: a few a second are normal
WINDOW_BURST, WINDOW_RATE = 20_000, 10_000.0  # WINDOW_UPDATE: a plain client sends one or two for every answer it reads
MAX_CONTINUATIONS = 8  # frames of one header block; gRPC's clients fill a frame before they begin another
MAX_SENDING = 1_024  # streams remembered: four times what may be open, since a client need not end what we have ended
MAX_HEADER_BLOCK = 32 * 1024  # bytes, as sent: twice the metadata that a call may carry

LARGE_BLOCK = 1024  # bytes: what a call needs has a few hundred, and what is said again a byte or two
LARGE_BURST, LARGE_RATE = 8, 20.0  # larger ones: each of their bytes may stand for a header of 4 KiB (an HPACK bomb)

_DATA, _HEADERS, _RST_STREAM, _WINDOW_UPDATE, _CONTINUATION = 0x0, 0x1, 0x3, 0x8, 0x9
_END_STREAM = 0x1


class Bucket:
    """A budget that refills with time."""

    __slots__ = ("_burst", "_left", "_rate", "_when")

    def __init__(self, burst: int, rate: float, now: float) -> None:
        """``burst`` at once, ``rate`` a second after that; ``now`` in monotonic seconds."""
        self._burst, self._rate = burst, rate
        self._left, self._when = float(burst), now

    def take(self, now: float) -> bool:
        """Spend one; False when there is none left."""
        self._left = min(self._burst, self._left + (now - self._when) * self._rate) - 1
        self._when = now
        return self._left >= 0


class FrameMeter:
    """Feed it all bytes of one client in order; it raises Refused when they are no HTTP/2, or an attack.

    Codes: ``not_http2`` (no preface), ``http2_violation`` (a stream opened out of order; a frame for one that was
    never opened, or data for one that its sender has ended), ``http2_flood``.
    """

    __slots__ = (
        "_block",
        "_continuations",
        "_controls",
        "_forgotten",
        "_large",
        "_monotonic",
        "_opened",
        "_partial",
        "_resets",
        "_sending",
        "_skip",
        "_spoke",
        "_windows",
        "streams",
    )

    def __init__(self, monotonic: Callable[[], float]) -> None:
        """``monotonic``: seconds, e.g. the event loop's time."""
        now = monotonic()
        self._monotonic = monotonic
        self._spoke = False  # whether the preface has been seen
        self._skip = 0
        self._partial = b""
        self._opened = 0  # the highest stream that was opened
        self.streams = 0  # how many were
        self._sending: dict[int, None] = {}  # on which of them the client may still send, oldest first
        self._forgotten = 0  # up to which one this is no longer known
        self._block = self._continuations = 0
        self._resets = Bucket(RESET_BURST, RESET_RATE, now)
        self._controls = Bucket(CONTROL_BURST, CONTROL_RATE, now)
        self._large = Bucket(LARGE_BURST, LARGE_RATE, now)
        self._windows = Bucket(WINDOW_BURST, WINDOW_RATE, now)

    def __call__(self, chunk: bytes) -> None:
        """Count what is in a chunk, wherever its frames are cut."""
        self.read(chunk)

    def read(self, chunk: bytes) -> int:
        """Count, and give how many bytes of the chunk stand before the first frame that opens a stream."""
        early = len(self._partial)
        if self._partial:
            # A part of the preface or of a frame's header waited; nothing is to be skipped then.
            chunk, self._partial = self._partial + chunk, b""
        position = self._skip
        if not self._spoke:
            if not PREFACE.startswith(chunk[: len(PREFACE)]):
                raise Refused("the connection does not speak HTTP/2", code="not_http2")
            if len(chunk) < len(PREFACE):
                self._partial = chunk
                return len(chunk)
            self._spoke = True
            position = len(PREFACE)
        opened, first = self.streams, -1
        while position + _HEADER_BYTES <= len(chunk):
            length = int.from_bytes(chunk[position : position + 3], "big")
            stream = int.from_bytes(chunk[position + 5 : position + 9], "big") & _STREAM_MASK
            self._count(chunk[position + 3], length, chunk[position + 4], stream)
            if first < 0 and self.streams > opened:
                first = position
            position += _HEADER_BYTES + length
        if position < len(chunk):
            self._partial = chunk[position:]
            self._skip = 0
        else:
            self._skip = position - len(chunk)
        return max(0, (len(chunk) if first < 0 else first) - early)

    def _count(self, kind: int, length: int, flags: int, stream: int) -> None:
        if kind == _CONTINUATION:
            self._continuations += 1
            self._add_to_block(length)
            return
        self._continuations = self._block = 0
        if kind == _HEADERS:
            self._open(stream, flags)
            self._add_to_block(length)
        elif kind == _DATA:
            self._require_sending(stream)
            if flags & _END_STREAM:
                self._sending.pop(stream, None)
            elif not length:
                self._take(self._controls, "control frames")
        elif kind == _RST_STREAM:
            self._require_opened(stream)
            self._sending.pop(stream, None)
            self._take(self._resets, "streams are reset")
        elif kind == _WINDOW_UPDATE:
            if stream:
                self._require_opened(stream)
            self._take(self._windows, "windows are opened")
        else:
            self._take(self._controls, "control frames")

    def _open(self, stream: int, flags: int) -> None:
        # A request has no trailers in gRPC: every block opens a stream of the client's, above all before it.
        if stream <= self._opened or not stream % 2:
            raise Refused("a stream is opened out of order", code="http2_violation")
        self._opened = stream
        self.streams += 1
        if not flags & _END_STREAM:
            self._sending[stream] = None
            if len(self._sending) > MAX_SENDING:
                self._forgotten = next(iter(self._sending))
                del self._sending[self._forgotten]

    def _add_to_block(self, length: int) -> None:
        if self._block <= LARGE_BLOCK < self._block + length:
            self._take(self._large, "large header blocks")
        self._block += length
        if self._block > MAX_HEADER_BLOCK or self._continuations > MAX_CONTINUATIONS:
            raise Refused("a header block is too long", code="http2_flood")

    def _require_opened(self, stream: int) -> None:
        if not 0 < stream <= self._opened or not stream % 2:
            raise Refused("a frame for a stream that was never opened", code="http2_violation")

    def _require_sending(self, stream: int) -> None:
        if stream not in self._sending:
            self._require_opened(stream)
            if stream > self._forgotten:
                raise Refused("data on a stream that its sender has ended", code="http2_violation")

    def _take(self, bucket: Bucket, what: str) -> None:
        if not bucket.take(self._monotonic()):
            raise Refused(f"too many {what}", code="http2_flood")
