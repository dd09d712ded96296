"""Who keeps tokens hears what ends them: one stream of the feed for all tasks of a process, about these tasks alone.

The feed reaches every node within milliseconds. A process that holds tokens is told by its node agent only of what it names, and
its acknowledgements hold up nobody. While nothing is heard, nothing is known: :meth:`TokenWatch.silence` says for how long.
"""

import asyncio
from math import inf
from typing import Protocol

import grpc

from broker.clock import Clock
from broker.sdk import background
from broker.sdk.feed import FeedState
from broker.sdk.kept import KeptToken
from broker.sdk.subscription import FeedSubscription
from broker.tasks.keyset import read_keys


class Holder(Protocol):
    """Who keeps tokens."""

    @property
    def names(self) -> frozenset[str]:
        """What the tokens are of, as the feed names it."""

    def drop_ended(self) -> None:
        """Look at what is kept: something has ended."""


class TokenWatch:
    """What the feed says of the tokens that this process keeps. Nothing is dialled before the first is kept."""

    def __init__(self, channel: grpc.aio.Channel, clock: Clock) -> None:
        """Listen by this channel to the node agent."""
        self._channel = channel
        self._clock = clock
        self._holders: set[Holder] = set()
        self._asked: frozenset[str] = frozenset()
        self._covered: frozenset[str] = frozenset()
        self._feed = FeedState()
        self._keys = ""
        self._kids: frozenset[str] = frozenset()
        self._changed = asyncio.Event()
        self._running: asyncio.Task[None] | None = None

    def follow(self, holder: Holder) -> None:
        """Listen for this holder, too; told again when it holds something else."""
        self._holders.add(holder)
        if not holder.names <= self._asked:
            self._changed.set()
        if self._running is None:
            self._running = asyncio.create_task(self._run(), name="broker-sdk-watch")

    def leave(self, holder: Holder) -> None:
        """Listen for this holder no longer; for nobody, the stream is closed."""
        self._holders.discard(holder)
        if not self._holders:
            self._changed.set()

    async def close(self) -> None:
        """Listen no longer."""
        if self._running is not None:
            await background.end(self._running)

    def silence(self, token: KeptToken) -> float:
        """Give the seconds since something was heard that would have told of this token's end; infinite: never yet."""
        return self._feed.silence(self._clock.monotonic()) if token.names <= self._covered else inf

    def is_dead(self, token: KeptToken) -> bool:
        """Say whether something was heard that ends this token."""
        return token.is_dead(self._feed, self._kids)

    async def _run(self) -> None:
        while True:
            await self._changed.wait()
            self._changed.clear()
            # What was left is left out by the next that comes; until then it is told of in vain.
            self._asked = frozenset().union(*(one.names for one in self._holders))
            if self._asked:
                await self._listen(self._asked)

    async def _listen(self, names: frozenset[str]) -> None:
        """Listen for these names until others are asked for; what is known of the last ones counts until these are heard of."""
        feed = FeedState()
        subscription = FeedSubscription(
            self._channel, feed, self._clock, lambda: None, about=names, heard=lambda: self._heard(feed, names)
        )
        subscription.begin()
        try:
            await self._changed.wait()
        finally:
            await subscription.stop()

    def _heard(self, feed: FeedState, names: frozenset[str]) -> None:
        if feed.silence(self._clock.monotonic()) == inf:
            return  # a snapshot that is not whole yet
        self._feed, self._covered = feed, names
        if feed.keys != self._keys:
            self._keys, self._kids = feed.keys, frozenset(read_keys(feed.keys))
        for holder in self._holders:
            holder.drop_ended()
