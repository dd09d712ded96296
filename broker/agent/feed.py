"""One subscription to the server's revocation feed, for all verifiers of this node, and for whoever holds tokens on it.

The relay adds nothing and hides nothing: a heartbeat passes only when the server has said something, so that its silence
is heard by every verifier. It subscribes while somebody listens. The number it acknowledges upward is the lowest that
any verifier has applied. A holder is told of its own tasks alone, and whether it has heard holds up nobody: verifiers refuse.
"""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import grpc.aio

from broker._proto.broker.server.v1 import feed_pb2
from broker.agent.backoff import Backoff
from broker.agent.cache import Bell
from broker.agent.feedstate import FeedState, concerns
from broker.agent.upstream import Upstream, answered
from broker.clock import Clock
from broker.errors import BrokerError, Invalid, Unavailable
from broker.telemetry.log import get_logger
from broker.transport.rpc_errors import from_rpc_error

SILENCE: Final = 10.0  # seconds: verifiers were told nothing since 3, so the stream is tried anew
LINGER: Final = 30.0  # seconds that the subscription stays after its last listener: a restarting one finds it warm
LONGEST_WAIT: Final = 2.0  # seconds between attempts: verifiers deny meanwhile
HOLDER_PACE: Final = 1.0  # seconds, the server's heartbeat: what a holder waits at most while frames of others come

_log = get_logger("agent.feed")


@dataclass(slots=True, eq=False)
class Listener:
    """One local verifier: what it has been sent, what it has applied. With ``about`` a holder of tokens of these names."""

    bell: Bell = field(default_factory=Bell)
    store: str = ""
    sent: int = 0
    acked: int = 0
    heartbeats: int = 0
    about: frozenset[str] = frozenset()
    rung_at: float = 0.0  # by the monotonic clock


class FeedRelay:
    """The subscription and its state. :meth:`run` keeps it; :meth:`messages` serves one listener."""

    def __init__(self, upstream: Upstream, clock: Clock, *, silence: float = SILENCE, linger: float = LINGER) -> None:
        """``silence`` and ``linger`` in seconds."""
        self._upstream = upstream
        self._clock = clock
        self._silence = silence
        self._linger = linger
        self._state = FeedState()
        self._pages: list[feed_pb2.FeedSnapshot] = []
        self._listeners: set[Listener] = set()
        self._wanted = asyncio.Event()
        self._acks = asyncio.Event()
        self._heartbeats = 0
        self.is_live = False  # whether the server has spoken on the present stream

    @contextmanager
    def joined(self) -> Iterator[Listener]:
        """Be a listener for the length of the block."""
        listener = Listener()
        self._listeners.add(listener)
        self._wanted.set()
        try:
            yield listener
        finally:
            self._listeners.discard(listener)
            self._acks.set()

    def acknowledge(self, listener: Listener, store: str, seq: int) -> None:
        """Note what a listener has applied; of another store it means nothing."""
        if store == self._state.store and seq > listener.acked:
            listener.acked = min(seq, self._state.seq)
            self._acks.set()

    def pending(self, listener: Listener) -> Iterator[feed_pb2.FeedMessage]:
        """Give what the listener lacks now: a snapshot, frames, or a heartbeat; nothing while the server is silent."""
        state = self._state
        if not self.is_live or not state.store:
            return
        heartbeats, listener.heartbeats = listener.heartbeats, self._heartbeats
        if listener.store != state.store or listener.sent < state.base or listener.sent > state.seq:
            if listener.store != state.store:
                listener.acked = 0
            listener.store, listener.sent = state.store, state.seq
            yield from state.snapshot(listener.about)
        elif listener.sent < state.seq:
            messages = [one for one in state.after(listener.sent) if concerns(one.frame, listener.about)]
            listener.sent = state.seq
            # That others' tasks ended is the server's word, too, that nothing ended here.
            yield from messages or [self._heartbeat()]
        elif heartbeats != self._heartbeats:
            yield self._heartbeat()

    def _heartbeat(self) -> feed_pb2.FeedMessage:
        state = self._state
        return feed_pb2.FeedMessage(seq=state.seq, store=state.store, heartbeat=feed_pb2.FeedHeartbeat())

    async def find_leaf(self, request: feed_pb2.FindLeafRequest, timeout: float) -> feed_pb2.FindLeafResponse:  # noqa: ASYNC109
        """Ask the server whose leaf this is; raises BrokerError."""
        answer: feed_pb2.FindLeafResponse = await answered(self._upstream.feed.FindLeaf(request, timeout=timeout))
        return answer

    async def run(self) -> None:
        """Subscribe while somebody listens; runs until cancelled."""
        backoff = Backoff(LONGEST_WAIT)
        while True:
            await self._wanted.wait()
            try:
                await self._follow(backoff)
                continue
            except BrokerError as error:
                if isinstance(error, Invalid):
                    self._state = FeedState()
                _log.warning("feed_interrupted", code=error.reason, reason=error.message, seq=self._state.seq)
            finally:
                self.is_live = False
            await self._upstream.pause(backoff.next())

    async def _follow(self, backoff: Backoff) -> None:
        call = self._upstream.feed.Subscribe()
        self._pages = []
        writer = asyncio.create_task(self._acknowledge(call), name="feed-acks")
        try:
            while self._listeners or await self._lingers():
                async with asyncio.timeout(self._silence):
                    message = await call.read()
                if message is grpc.aio.EOF:
                    raise Unavailable("the server ended the feed", code="feed_ended")
                self._take(message)
                backoff.reset()
        except TimeoutError:
            raise Unavailable("the feed has fallen silent", code="feed_silent") from None
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from error
        finally:
            writer.cancel()
            call.cancel()
            await asyncio.gather(writer, return_exceptions=True)

    async def _lingers(self) -> bool:
        """Wait for a listener; give whether one came."""
        self._wanted.clear()
        try:
            async with asyncio.timeout(self._linger):
                await self._wanted.wait()
        except TimeoutError:
            return False
        return True

    async def _acknowledge(self, call: Any) -> None:
        """Say where to begin, then the lowest number applied whenever it grows."""
        told = self._state.seq
        await call.write(feed_pb2.SubscribeRequest(acked=told, store=self._state.store))
        while True:
            await self._acks.wait()
            self._acks.clear()
            applied = min((one.acked for one in self._verifiers()), default=self._state.seq)
            if self.is_live and applied > told:
                told = applied
                await call.write(feed_pb2.SubscribeRequest(acked=told, store=self._state.store))

    def _take(self, message: feed_pb2.FeedMessage) -> None:
        kind = message.WhichOneof("kind")
        if kind == "snapshot":
            self._pages.append(message.snapshot)
            if message.snapshot.more:
                return
            self._state.replace(message.store, message.seq, self._pages)
            self._pages = []
        elif message.store != self._state.store:
            raise Invalid("the feed is of another store", code="feed_gap")
        elif kind == "frame" and message.frame.seq > self._state.seq:
            self._state.apply(message.frame)
        elif kind == "heartbeat":
            self._heartbeats += 1
            self._state.forget(int(self._clock.now().timestamp()))
        self.is_live = True
        if not any(self._verifiers()):
            self._acks.set()
        self._ring(message.frame if kind == "frame" else None)

    def _verifiers(self) -> Iterator[Listener]:
        return (listener for listener in self._listeners if not listener.about)

    def _ring(self, frame: feed_pb2.Frame | None) -> None:
        """Wake who has something to hear: of holders, on a busy day, few."""
        now = self._clock.monotonic()
        for listener in self._listeners:
            if frame is None or concerns(frame, listener.about) or now - listener.rung_at >= HOLDER_PACE:
                listener.rung_at = now
                listener.bell.ring()


async def serve(relay: FeedRelay, listener: Listener) -> AsyncIterator[feed_pb2.FeedMessage]:
    """Give a listener's messages as they come, for ever."""
    while True:
        for message in relay.pending(listener):
            yield message
        await listener.bell.wait(None)
