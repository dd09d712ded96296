"""A node agent's workload socket whose answers a test writes by hand, also those that no agent should give."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Self

import grpc
import grpc.aio

from broker._proto.service import handler
from broker._proto.spiffe import workload_pb2
from broker.agent.listener import WORKLOAD


class FakeWorkloadApi:
    """``async with FakeWorkloadApi(path) as fake``: ``say`` sends on every open stream, ``end`` ends them all.

    ``opened`` counts the streams by method. What was said last is the first message of a stream that opens later.
    """

    def __init__(self, socket: Path) -> None:
        self.address = f"unix://{socket}"
        self.opened: Counter[str] = Counter()
        self.closing: grpc.StatusCode | None = None
        self._last: dict[str, Any] = {}
        self._streams: list[tuple[str, asyncio.Queue[Any]]] = []

    async def __aenter__(self) -> Self:
        self._server = grpc.aio.server()
        self._server.add_generic_rpc_handlers((handler(WORKLOAD, self, lambda _, behaviour: behaviour),))
        self._server.add_insecure_port(self.address)
        await self._server.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._server.stop(0)

    def say(self, message: Any) -> None:
        method = {"X509SVIDResponse": "FetchX509SVID", "X509BundlesResponse": "FetchX509Bundles"}[
            type(message).__name__
        ]
        self._last[method] = message
        for name, queue in self._streams:
            if name == method:
                queue.put_nowait(message)

    def end(self, code: grpc.StatusCode | None) -> None:
        """End every stream with this status (None: OK), and every later one at once."""
        self.closing = code
        for _, queue in self._streams:
            queue.put_nowait(None)

    async def FetchX509SVID(self, request: Any, context: Any) -> AsyncIterator[workload_pb2.X509SVIDResponse]:
        async for message in self._stream("FetchX509SVID", context):
            yield message

    async def FetchX509Bundles(self, request: Any, context: Any) -> AsyncIterator[workload_pb2.X509BundlesResponse]:
        async for message in self._stream("FetchX509Bundles", context):
            yield message

    async def _stream(self, method: str, context: Any) -> AsyncIterator[Any]:
        self.opened[method] += 1
        if self.closing is not None:
            await context.abort(self.closing, "no identity issued")
        queue: asyncio.Queue[Any] = asyncio.Queue()
        own = (method, queue)
        self._streams.append(own)
        try:
            if method in self._last:
                yield self._last[method]
            while (message := await queue.get()) is not None:
                yield message
        finally:
            self._streams.remove(own)
        if self.closing is not None:
            await context.abort(self.closing, "no identity issued")
