"""``broker.server.v1.Feed``: the revocation feed for node agents and for services with an SVID of ours."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import fields
from typing import Final

from broker._proto.broker.server.v1 import feed_pb2
from broker._proto.service import Context, ServiceBinding
from broker.errors import Refused
from broker.server.api.access import Caller, LocalPeer
from broker.server.store.rows import FrameRow
from broker.server.tasks.feed import Feed as FeedCases
from broker.server.tasks.feed import Heartbeat, Message, Snapshot, Subscription
from broker.spiffe import TrustDomain
from broker.transport.tls import SvidPeer

BINDING: Final = ServiceBinding.of(feed_pb2.DESCRIPTOR, "Feed")

_FIELDS: Final = tuple(field.name for field in fields(FrameRow))


def require_listener(caller: Caller, trust_domain: TrustDomain) -> None:
    """Refuse everyone but the machine's operators and holders of an SVID of this trust domain; raises Refused."""
    if isinstance(caller, LocalPeer):
        return
    if not isinstance(caller, SvidPeer) or not caller.svid.id.is_member_of(trust_domain):
        raise Refused("the feed is for workloads and agents of this trust domain", code="feed_not_allowed")


class Feed:
    """Serves the feed. One frame is written once, for all who get it."""

    def __init__(self, feed: FeedCases, trust_domain: TrustDomain) -> None:
        self._feed = feed
        self._trust_domain = trust_domain
        self._last: tuple[int, feed_pb2.FeedMessage] | None = None

    async def Subscribe(  # noqa: N802 - the RPC's name
        self, requests: AsyncIterator[feed_pb2.SubscribeRequest], context: Context, caller: Caller
    ) -> AsyncIterator[feed_pb2.FeedMessage]:
        """Send a snapshot, then frames and heartbeats, for as long as the caller listens; take in what it acknowledges."""
        require_listener(caller, self._trust_domain)
        with self._feed.subscribe() as subscription:
            acks = asyncio.create_task(_take_acks(requests, subscription), name="broker-feed-acks")
            try:
                async for message in subscription:
                    yield self._message(message)
                    if acks.done():
                        # Who has stopped speaking may still listen; who spoke nonsense is told so.
                        acks.result()
            finally:
                # Not awaited itself: a cancellation of this call would look like its end.
                acks.cancel()
                await asyncio.wait((acks,))
                _ = acks.cancelled() or acks.exception()

    async def FindLeaf(  # noqa: N802 - the RPC's name
        self, request: feed_pb2.FindLeafRequest, context: Context, caller: Caller
    ) -> feed_pb2.FindLeafResponse:
        """Say whether that session lives and holds that leaf: yes or no, and nothing else."""
        require_listener(caller, self._trust_domain)
        return feed_pb2.FindLeafResponse(held=await self._feed.holds_leaf(request.session, request.x5t))

    def _message(self, message: Message) -> feed_pb2.FeedMessage:
        if isinstance(message, FrameRow):
            if self._last is None or self._last[0] != message.seq:
                frame = _frame(message)
                self._last = message.seq, feed_pb2.FeedMessage(seq=message.seq, store=self._feed.store_id, frame=frame)
            return self._last[1]
        if isinstance(message, Snapshot):
            snapshot = feed_pb2.FeedSnapshot(
                issuer=message.issuer, keys=message.keys, frames=map(_frame, message.frames), more=message.more
            )
            for resource, binding in message.bindings:
                snapshot.audiences.add(resource=resource, binding=sorted(binding))
            return feed_pb2.FeedMessage(seq=message.seq, store=self._feed.store_id, snapshot=snapshot)
        assert isinstance(message, Heartbeat)
        heartbeat = feed_pb2.FeedHeartbeat()
        return feed_pb2.FeedMessage(seq=message.seq, store=self._feed.store_id, heartbeat=heartbeat)


async def _take_acks(requests: AsyncIterator[feed_pb2.SubscribeRequest], subscription: Subscription) -> None:
    async for request in requests:
        subscription.ack(request.acked, request.store)


def _frame(row: FrameRow) -> feed_pb2.Frame:
    return feed_pb2.Frame(**{name: getattr(row, name) for name in _FIELDS})
