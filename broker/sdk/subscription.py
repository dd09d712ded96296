"""A listener's end of the feed: one stream through the node agent, reopened when it breaks, acknowledged as applied."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from collections.abc import Set as AbstractSet

import grpc

from broker._proto.broker.agent.v1 import feed_pb2 as agent_feed_pb2
from broker._proto.broker.server.v1 import feed_pb2
from broker._proto.service import ServiceBinding, Stub
from broker.clock import Clock
from broker.errors import BrokerError
from broker.sdk import background
from broker.sdk.endpoint import SECURITY_HEADER
from broker.sdk.feed import FeedState

RETRY_FIRST, RETRY_MOST = 0.05, 2.0
"""Seconds between attempts, doubling: a verifier that is cut off denies, so it must come back fast."""


class FeedSubscription:
    """Feeds a :class:`FeedState` until it is stopped."""

    def __init__(
        self,
        channel: grpc.aio.Channel,
        state: FeedState,
        clock: Clock,
        keys_changed: Callable[[], None],
        *,
        about: AbstractSet[str] = frozenset(),
        heard: Callable[[], None] = lambda: None,
    ) -> None:
        """Prepare; nothing is dialled before :meth:`start` or :meth:`begin`.

        ``about`` makes it a holder's instead of a verifier's: the names of what its tokens are of. ``heard`` is called after
        each message.
        """
        self._api = Stub(channel, ServiceBinding.of(agent_feed_pb2.DESCRIPTOR, "Feed"))
        self._state = state
        self._clock = clock
        self._keys_changed = keys_changed
        self._about = about
        self._on_heard = heard
        self._task: asyncio.Task[None] | None = None
        self._ready = asyncio.Event()

    def begin(self) -> None:
        """Open the stream, and wait for nothing."""
        self._task = asyncio.create_task(self._keep(), name="broker-sdk-feed")

    async def start(self) -> None:
        """Open the stream and wait for the first whole snapshot."""
        self.begin()
        assert self._task is not None
        ready = asyncio.create_task(self._ready.wait())
        try:
            done, _ = await asyncio.wait({self._task, ready}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            ready.cancel()
        if self._task in done:
            self._task.result()

    async def stop(self) -> None:
        """Close the stream."""
        if self._task is not None:
            with contextlib.suppress(BrokerError):
                await background.end(self._task)

    async def _keep(self) -> None:
        pause = RETRY_FIRST
        while True:
            acks: asyncio.Queue[int] = asyncio.Queue()
            with contextlib.suppress(grpc.aio.AioRpcError):
                async for message in self._api.Subscribe(self._requests(acks), metadata=SECURITY_HEADER):
                    self._take(message, acks)
                    pause = RETRY_FIRST
            await asyncio.sleep(pause)
            pause = min(pause * 2, RETRY_MOST)

    def _take(self, message: feed_pb2.FeedMessage, acks: "asyncio.Queue[int]") -> None:
        now = int(self._clock.now().timestamp())
        if self._state.apply(message, monotonic=self._clock.monotonic(), now=now):
            self._keys_changed()
        if message.WhichOneof("kind") == "frame":
            acks.put_nowait(message.seq)
        if self._state.keys and not self._ready.is_set():
            self._ready.set()
        self._on_heard()

    async def _requests(self, acks: "asyncio.Queue[int]") -> AsyncIterator[feed_pb2.SubscribeRequest]:
        yield feed_pb2.SubscribeRequest(acked=self._state.seq, store=self._state.store, about=sorted(self._about))
        while True:
            highest = await acks.get()
            while not acks.empty():
                highest = max(highest, acks.get_nowait())
            yield feed_pb2.SubscribeRequest(acked=highest, store=self._state.store)
