"""Counts the HTTP/2 frames that cost a server much and their sender nothing, and says when it is too much.

gRPC's core never cuts a client for rapid resets (CVE-2023-44487), floods of SETTINGS, PING or PRIORITY, or a header
block without end. This looks at frame headers only (RFC 9113 section 4.1); it knows no streams and no contents.
"""

from collections.abc import Callable

from broker.errors import Refused

PREFACE_BYTES = 24  # RFC 9113 section 3.4
_HEADER_BYTES = 9

RESET_BURST, RESET_RATE = 1_000, 200.0  # RST_STREAM: a client that cancels all its calls at once is honest
CONTROL_BURST, CONTROL_RATE = (
    1_000,
    100.0,
)  # SETTINGS, PING, PRIORITY, unknown and empty frames: a few a second are normal
MAX_CONTINUATIONS = 8  # frames of one header block; gRPC's metadata limit fits into one

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
    """Feed it all bytes of one client in order; it raises Refused (``http2_flood``) when they are an attack."""

    __slots__ = ("_continuations", "_controls", "_monotonic", "_partial", "_resets", "_skip")

    def __init__(self, monotonic: Callable[[], float]) -> None:
        """``monotonic``: seconds, e.g. the event loop's time."""
        now = monotonic()
        self._monotonic = monotonic
        self._skip = PREFACE_BYTES
        self._partial = b""
        self._continuations = 0
        self._resets = Bucket(RESET_BURST, RESET_RATE, now)
        self._controls = Bucket(CONTROL_BURST, CONTROL_RATE, now)

    def __call__(self, chunk: bytes) -> None:
        """Count what is in a chunk, wherever its frames are cut."""
        if self._partial:
            # Fewer than nine bytes of a header waited; nothing is to be skipped then.
            chunk, self._partial = self._partial + chunk, b""
        position = self._skip
        while position + _HEADER_BYTES <= len(chunk):
            length = int.from_bytes(chunk[position : position + 3], "big")
            self._count(chunk[position + 3], length, chunk[position + 4])
            position += _HEADER_BYTES + length
        if position < len(chunk):
            self._partial = chunk[position:]
            self._skip = 0
        else:
            self._skip = position - len(chunk)

    def _count(self, kind: int, length: int, flags: int) -> None:
        if kind == _CONTINUATION:
            self._continuations += 1
            if self._continuations > MAX_CONTINUATIONS:
                raise Refused("header block without end", code="http2_flood")
            return
        self._continuations = 0
        if kind == _RST_STREAM:
            if not self._resets.take(self._monotonic()):
                raise Refused("too many streams are reset", code="http2_flood")
        elif kind in {_HEADERS, _WINDOW_UPDATE} or (kind == _DATA and (length or flags & _END_STREAM)):
            return
        elif not self._controls.take(self._monotonic()):
            raise Refused("too many control frames", code="http2_flood")
