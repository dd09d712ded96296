"""Tells the server which version the agent is, as SPIRE's agent does: each time that it is heard again, since it may be another."""

import asyncio

from broker._proto.spire.api.server.agent.v1 import agent_pb2
from broker.agent.upstream import RPC_TIMEOUT, Upstream, answered
from broker.errors import BrokerError
from broker.telemetry.log import get_logger
from broker.version import __version__

_log = get_logger("agent.introduction")


class Introduction:
    """What :meth:`run` says whenever it is due; a server that does not want to know is left alone until the next time."""

    def __init__(self, upstream: Upstream) -> None:
        self._upstream = upstream
        self._due = asyncio.Event()

    def again(self) -> None:
        """The server speaks (again)."""
        self._due.set()

    async def run(self) -> None:
        """Introduce the agent; runs until cancelled."""
        status = agent_pb2.PostStatusRequest(agent_version=__version__)
        while True:
            await self._due.wait()
            self._due.clear()
            try:
                await answered(self._upstream.agent.PostStatus(status, timeout=RPC_TIMEOUT))
            except BrokerError as error:
                _log.debug("version_not_told", code=error.reason)
