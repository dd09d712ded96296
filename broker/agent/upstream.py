"""The server, as the agent calls it: one stub per service over one channel, deadlines, and errors of our own kind.

Who the server is was settled by the dialer. What it answers is judged by whoever asked.
"""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Final, TypeVar

import grpc.aio

from broker._proto.broker.server.v1 import actions_pb2, feed_pb2, sessions_pb2, tasks_pb2, watch_pb2
from broker._proto.service import ServiceBinding, Stub
from broker._proto.spire.api.server.agent.v1 import agent_pb2
from broker._proto.spire.api.server.bundle.v1 import bundle_pb2
from broker._proto.spire.api.server.entry.v1 import entry_pb2
from broker._proto.spire.api.server.svid.v1 import svid_pb2
from broker.errors import Unavailable
from broker.transport.rpc_errors import from_rpc_error

T = TypeVar("T")

QUICK_FAILURE: Final = 1.0  # seconds: a failure that took longer was no mere change of connections
RECONNECT_PAUSE: Final = 0.05
MAX_ATTEMPTS: Final = 4  # of one call: the agent's SVID and the server's may change one after the other
NOT_AN_AGENT: Final = "access_denied"
"""What our server says to a connection without a role."""
RPC_TIMEOUT: Final = 30.0  # seconds: a server that accepts and never answers must not hold anything for longer

AGENT: Final = ServiceBinding.of(agent_pb2.DESCRIPTOR, "Agent")
BUNDLE: Final = ServiceBinding.of(bundle_pb2.DESCRIPTOR, "Bundle")
ENTRY: Final = ServiceBinding.of(entry_pb2.DESCRIPTOR, "Entry")
SVID: Final = ServiceBinding.of(svid_pb2.DESCRIPTOR, "SVID")
WATCH: Final = ServiceBinding.of(watch_pb2.DESCRIPTOR, "Watch")
SESSIONS: Final = ServiceBinding.of(sessions_pb2.DESCRIPTOR, "Sessions")
TASKS: Final = ServiceBinding.of(tasks_pb2.DESCRIPTOR, "Tasks")
ACTIONS: Final = ServiceBinding.of(actions_pb2.DESCRIPTOR, "Actions")
FEED: Final = ServiceBinding.of(feed_pb2.DESCRIPTOR, "Feed")


class Upstream:
    """Stubs of every service that the agent uses, and the news of a new connection to them."""

    def __init__(self, channel: grpc.aio.Channel, lost: Callable[[], int] = lambda: 0) -> None:
        """Use this channel for all; nothing is sent yet. ``lost`` counts the connections that went."""
        self._channel = channel
        self._connected = asyncio.Event()
        self.lost = lost
        self.agent = Stub(channel, AGENT)
        self.bundle = Stub(channel, BUNDLE)
        self.entry = Stub(channel, ENTRY)
        self.svid = Stub(channel, SVID)
        self.watch = Stub(channel, WATCH)
        self.sessions = Stub(channel, SESSIONS)
        self.tasks = Stub(channel, TASKS)
        self.actions = Stub(channel, ACTIONS)
        self.feed = Stub(channel, FEED)

    async def watch_connection(self, on_connected: Callable[[], None]) -> None:
        """See to it that there is a connection, and tell whoever waits of each new one; runs until cancelled."""
        while True:
            state = self._channel.get_state(try_to_connect=True)
            if state is grpc.ChannelConnectivity.READY:
                self._connected.set()
                self._connected = asyncio.Event()
                on_connected()
            await self._channel.wait_for_state_change(state)

    async def pause(self, seconds: float) -> None:
        """Wait so long after a failure, or until there is a new connection."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._connected.wait()


async def answered_once_more(call: Callable[[], Awaitable[T]], lost: Callable[[], int] = lambda: 0) -> T:
    """As :func:`answered`, with another attempt where the connection went: for calls that may be repeated.

    Each new SVID of the agent, or of the server, means a new connection, and what was under way on the old one is lost.
    ``lost`` counts connections that went: while it grows, the call is made again, a few times.
    """
    loop = asyncio.get_running_loop()
    attempts = 0
    while True:
        began, before = loop.time(), lost()
        try:
            return await answered(call())
        except Unavailable:
            attempts += 1
            is_quick = attempts == 1 and loop.time() - began <= QUICK_FAILURE
            await asyncio.sleep(RECONNECT_PAUSE)
            if attempts == MAX_ATTEMPTS or not (is_quick or lost() != before):
                raise


async def answered(call: Awaitable[T]) -> T:
    """Wait for an answer; a failed call raises the BrokerError that the server meant (``Unavailable``, ``Refused`` …)."""
    try:
        return await call
    except grpc.aio.AioRpcError as error:
        meant = from_rpc_error(error)
        # All that an agent calls is open to agents: this connection was made by one that has no SVID (any more).
        raise _unidentified() if meant.reason == NOT_AN_AGENT else meant from error


def _unidentified() -> Unavailable:
    return Unavailable(
        "the agent has no identity at its server at this moment",
        code="agent_unidentified",
        hint="it joins again by itself, unless the server wants it no more: broker agent health",
    )
