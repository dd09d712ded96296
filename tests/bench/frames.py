"""Unary gRPC calls by frames, many at once on one connection: a client that costs next to nothing, for who measures a server.

The load shares its processors with who is measured, and gRPC's own library takes as much for a call as the agent does. What is said
is what the library says, header for header. Knows frames (RFC 9113) and the message's prefix; header blocks that come are not read:
an answer is a message that came whole before its stream ended.
"""

import asyncio
import time
from typing import Any

from hpack import Encoder

from broker.sdk.endpoint import SECURITY_HEADER
from tests.attacks.workload_api.frames import (
    ACK,
    DATA,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HEADERS,
    PING,
    PREFACE,
    RST,
    SETTINGS,
    WIDE,
    WINDOW,
    frame,
    message,
    settings,
)

PREFIX = 5
HEAD = 9


class FrameCaller(asyncio.Protocol):
    """So many callers of one method: each asks again when it was answered."""

    def __init__(self, path: str, request: bytes) -> None:
        fixed = ((":method", "POST"), (":scheme", "http"), (":path", path), (":authority", "localhost"))
        named = (("te", "trailers"), ("content-type", "application/grpc"), ("user-agent", "grpc-python-asyncio/bench"))
        more = (("grpc-accept-encoding", "identity, deflate, gzip"), ("grpc-timeout", "10S"), *SECURITY_HEADER)
        encoder = Encoder()
        # Whatever is said a second time is in the table, and from then on each block is the same.
        self._block, self._next_block = (encoder.encode([*fixed, *named, *more]) for _ in range(2))
        self._said = message(request)
        self._stream = 1
        self._heard = b""
        self._open: dict[int, tuple[float, int]] = {}  # by stream: when it was asked, and how much came
        self._until = 0.0
        self.size = 0
        self.took: list[float] = []

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        transport.write(PREFACE + settings() + frame(WINDOW, 0, 0, (WIDE - 65535).to_bytes(4, "big")))

    async def call(self, callers: int, until: float) -> None:
        """Let so many callers ask until that time, and wait for the last answer; raises RuntimeError where one gets none."""
        self.took.clear()
        self._until, self._done = until, asyncio.get_running_loop().create_future()
        self._transport.write(b"".join(self._ask(time.perf_counter()) for _ in range(callers)))
        await self._done

    def data_received(self, data: bytes) -> None:
        heard, at = self._heard + data, 0
        now = time.perf_counter()
        says = [frame(WINDOW, 0, 0, len(data).to_bytes(4, "big"))]
        while len(heard) >= at + HEAD:
            end = at + HEAD + int.from_bytes(heard[at : at + 3], "big")
            if len(heard) < end:
                break
            stream = int.from_bytes(heard[at + 5 : at + HEAD], "big")
            says.append(self._take(heard[at + 3], heard[at + 4], stream, heard[at + HEAD : end], now))
            at = end
        self._heard = heard[at:]
        self._transport.write(b"".join(says))
        if not self._open and not self._done.done():
            self._done.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        self._fail("the connection was lost")

    def close(self) -> None:
        self._transport.close()

    def _ask(self, now: float) -> bytes:
        stream, block = self._stream, self._block
        self._stream, self._block = stream + 2, self._next_block
        self._open[stream] = now, 0
        return frame(HEADERS, END_HEADERS, stream, block) + frame(DATA, END_STREAM, stream, self._said)

    def _take(self, kind: int, flags: int, stream: int, payload: bytes, now: float) -> bytes:
        """Take a frame; give what is said to it."""
        if kind == DATA:
            asked, came = self._open[stream]
            self._open[stream] = asked, came + len(payload)
        if kind in {DATA, HEADERS} and flags & END_STREAM:
            asked, came = self._open.pop(stream)
            if came <= PREFIX:
                self._fail("a call was refused")
                return b""
            self.size = came - PREFIX
            self.took.append(now - asked)
            return self._ask(now) if now < self._until else b""
        if kind in {RST, GOAWAY}:
            self._fail("a call was ended")
        if kind in {SETTINGS, PING} and not flags & ACK:
            return frame(kind, ACK, 0, payload if kind == PING else b"")
        return b""

    def _fail(self, why: str) -> None:
        if not self._done.done():
            self._done.set_exception(RuntimeError(why))
