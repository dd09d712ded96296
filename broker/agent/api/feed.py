"""The revocation feed for this node's verifiers and holders of tokens (``broker.agent.v1.Feed``). Only for callers that have an identity."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Final

from broker._proto.broker.server.v1 import feed_pb2
from broker._proto.service import Context
from broker.agent.cache import EstateCache
from broker.agent.entitlement import Entitlement
from broker.agent.feed import FeedRelay, Listener
from broker.agent.upstream import RPC_TIMEOUT
from broker.agent.workloads import Caller
from broker.errors import Invalid

MAX_NAMES: Final = 4096  # of one holder: some thousand tasks at once, in less than a megabyte


class FeedApi:
    """The method of ``broker.agent.v1.Feed``."""

    def __init__(self, entitlement: Entitlement, relay: FeedRelay, cache: EstateCache) -> None:
        self._entitlement = entitlement
        self._relay = relay
        self._cache = cache

    async def Subscribe(  # noqa: N802 - the RPC's name
        self, requests: AsyncIterator[feed_pb2.SubscribeRequest], context: Context, caller: Caller
    ) -> AsyncIterator[feed_pb2.FeedMessage]:
        """Stream the feed after the caller's cursor; its further messages acknowledge what it applied."""
        session, _ = await self._entitlement.of(caller)
        first = await anext(requests, None)
        if first is None:
            raise Invalid("say first what you have applied", code="cursor_missing")
        if len(first.about) > MAX_NAMES:
            raise Invalid(f"more than {MAX_NAMES} names", code="names_too_many")
        with self._relay.joined() as listener, session.listening(self._cache) as bell:
            listener.bell = bell  # one bell for both: the feed's news, and the session's end
            listener.store, listener.sent, listener.acked = first.store, first.acked, first.acked
            listener.about = frozenset(first.about)
            reader = asyncio.create_task(self._read(requests, listener), name="feed-listener")
            try:
                while True:
                    self._entitlement.check(session)
                    self._entitlement.required(session)
                    for message in self._relay.pending(listener):
                        yield message
                    await bell.wait(None)
            finally:
                reader.cancel()
                await asyncio.gather(reader, return_exceptions=True)

    async def FindLeaf(  # noqa: N802 - the RPC's name
        self, request: feed_pb2.FindLeafRequest, context: Context, caller: Caller
    ) -> feed_pb2.FindLeafResponse:
        """Pass the question on to the server, for a caller that has an identity."""
        await self._entitlement.of(caller)
        left = context.time_remaining()  # None: no deadline, whatever grpcio's stubs say
        return await self._relay.find_leaf(request, min(left or RPC_TIMEOUT, RPC_TIMEOUT))

    async def _read(self, requests: AsyncIterator[feed_pb2.SubscribeRequest], listener: Listener) -> None:
        # A verifier that ends its half goes on listening; one that sends nonsense only loses its acknowledgements.
        with suppress(Invalid):
            async for request in requests:
                self._relay.acknowledge(listener, request.store, request.acked)
