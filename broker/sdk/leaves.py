"""Which leaf belongs to which workload session: asked on first sight, through the node agent, and remembered for a while.

A token outlives the rotation of the certificate that it was made for, because the session that it names holds the next one, too.
Only the node agent that issued both can say so; the server passes its word on. Ends come by the feed, not from here.
"""

import asyncio
from collections import OrderedDict
from datetime import timedelta
from typing import Final

import grpc

from broker._proto.broker.agent.v1 import feed_pb2 as agent_feed_pb2
from broker._proto.broker.server.v1 import feed_pb2
from broker._proto.service import ServiceBinding, Stub
from broker.clock import Clock
from broker.errors import Unavailable
from broker.sdk.endpoint import SECURITY_HEADER
from broker.tasks import PeerEvidence

MOST_LEAVES: Final = 10_000
"""Answers remembered: some hundred bytes each."""
HELD_SECONDS: Final = 300.0
"""How long a yes counts: longer than any token that it could serve."""
STRANGER_SECONDS: Final = 1.0
"""How long a no counts, so that a stranger who tries and tries again costs no call each time."""
ASK_SECONDS: Final = 2.0
YOUNG: Final = timedelta(seconds=90)
"""A leaf that began so lately, back-dating included, may be known to its agent and not yet to the server."""
RETRY_AFTER: Final = (0.05, 0.2, 0.5)
"""Seconds before a young leaf is asked for again."""
MOST_AT_ONCE: Final = 64


class Leaves:
    """What this verifier was told of leaves and sessions."""

    def __init__(self, channel: grpc.aio.Channel, clock: Clock) -> None:
        """Ask through this channel to the node agent; nothing is asked yet."""
        self._api = Stub(channel, ServiceBinding.of(agent_feed_pb2.DESCRIPTOR, "Feed"))
        self._clock = clock
        self._told: OrderedDict[tuple[str, str], tuple[bool, float]] = OrderedDict()
        self._asking = 0

    def holds(self, session: str, x5t: str) -> bool | None:
        """Say whether this session holds this leaf; None: not known now."""
        told = self._told.get((session, x5t))
        return told[0] if told is not None and self._clock.monotonic() < told[1] else None

    async def ask(self, session: str, evidence: PeerEvidence) -> bool:
        """Find out whether this session holds the leaf; raises Unavailable when nobody can tell."""
        if self._asking >= MOST_AT_ONCE:
            raise Unavailable("too many certificates are looked up at once", code="leaf_unknown")
        self._asking += 1
        try:
            is_held = await self._ask(session, evidence.x5t)
            for pause in RETRY_AFTER if self._clock.now() - evidence.not_before < YOUNG else ():
                if is_held:
                    break
                await asyncio.sleep(pause)
                is_held = await self._ask(session, evidence.x5t)
        finally:
            self._asking -= 1
        until = self._clock.monotonic() + (HELD_SECONDS if is_held else STRANGER_SECONDS)
        self._told[(session, evidence.x5t)] = (is_held, until)
        if len(self._told) > MOST_LEAVES:
            self._told.popitem(last=False)
        return is_held

    async def _ask(self, session: str, x5t: str) -> bool:
        request = feed_pb2.FindLeafRequest(session=session, x5t=x5t)
        try:
            answer: feed_pb2.FindLeafResponse = await self._api.FindLeaf(
                request, metadata=SECURITY_HEADER, timeout=ASK_SECONDS
            )
        except grpc.aio.AioRpcError:
            raise Unavailable(
                "nobody can tell now whose certificate this is",
                code="leaf_unknown",
                hint="is the node agent up, and can it reach the server?",
            ) from None
        return answer.held
