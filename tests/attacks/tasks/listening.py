"""A verifier's ear: the revocation feed of a real server, and what a verifier that follows it says of a token."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc.aio

from broker._proto.broker.server.v1 import feed_pb2
from broker._proto.service import Stub
from broker.clock import SystemClock
from broker.errors import BrokerError
from broker.sdk.feed import FeedState
from broker.server.api.grpc import feed
from broker.spiffe.jose import parse_compact
from broker.tasks import TaskClaims
from tests.integration.identity_rig import DEADLINE


class Ear:
    """Holds one stream of the feed."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.state = FeedState()
        self.heard: list[feed_pb2.FeedMessage] = []

    async def hear(self) -> None:
        """Take the next message in."""
        message = await asyncio.wait_for(self._stream.read(), DEADLINE)
        assert message is not grpc.aio.EOF
        self.take(message)

    def take(self, message: feed_pb2.FeedMessage) -> None:
        """Take one in, wherever it comes from."""
        self.heard.append(message)
        self.state.apply(message, monotonic=0, now=int(SystemClock().now().timestamp()))

    def says(self, token: str) -> str:
        """Say what the verifier answers at this moment: ``alive``, or the code of its refusal."""
        claims = TaskClaims.parse(parse_compact(token).payload)
        try:
            self.state.require_alive(
                root=claims.task.root or claims.task.id,
                epoch=claims.task.epoch,
                task=claims.task.id,
                session=None if claims.cnf is None else claims.cnf.session,
                jti=claims.jti,
            )
        except BrokerError as error:
            return error.reason
        return "alive"

    async def refuses(self, token: str) -> str:
        """Follow the feed until it kills the token; give the code."""
        async with asyncio.timeout(DEADLINE):
            while (said := self.says(token)) == "alive":
                await self.hear()
        return said


@asynccontextmanager
async def listening(channel: grpc.aio.Channel) -> AsyncIterator[Ear]:
    """Subscribe as a node agent, and have the snapshot."""
    stream = Stub(channel, feed.BINDING).Subscribe()
    await stream.write(feed_pb2.SubscribeRequest())
    ear = Ear(stream)
    await ear.hear()
    try:
        yield ear
    finally:
        stream.cancel()
