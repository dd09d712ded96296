"""``grpc.health.v1.Health``: whether the server is ready, for whoever is on the admin socket."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Final

from broker._proto.grpc.health.v1 import health_pb2
from broker._proto.service import Context, ServiceBinding
from broker.errors import NotFound
from broker.server.api.access import Caller

BINDING: Final = ServiceBinding.of(health_pb2.DESCRIPTOR, "Health")
LOOK_EVERY: Final = 1.0
"""Seconds between two looks of a watching stream."""
_STATUS = health_pb2.HealthCheckResponse


class Health:
    """The service; every service of ours is as ready as the server."""

    def __init__(self, is_ready: Callable[[], bool], services: Sequence[str]) -> None:
        self._is_ready = is_ready
        self._services = frozenset(services) | {""}

    async def Check(  # noqa: N802  # the name on the wire
        self, request: health_pb2.HealthCheckRequest, context: Context, caller: Caller
    ) -> health_pb2.HealthCheckResponse:
        """Tell the state of one service, or of the server; raises NotFound."""
        if request.service not in self._services:
            raise NotFound("unknown service", code="service_unknown")
        return self._now()

    async def List(  # noqa: N802
        self, request: health_pb2.HealthListRequest, context: Context, caller: Caller
    ) -> health_pb2.HealthListResponse:
        """Tell the state of every service."""
        return health_pb2.HealthListResponse(statuses=dict.fromkeys(sorted(self._services), self._now()))

    async def Watch(  # noqa: N802
        self, request: health_pb2.HealthCheckRequest, context: Context, caller: Caller
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        """Tell the state now and whenever it changes."""
        told = None
        while True:
            state = self._now() if request.service in self._services else _STATUS(status=_STATUS.SERVICE_UNKNOWN)
            if state != told:
                told = state
                yield state
            await asyncio.sleep(LOOK_EVERY)

    def _now(self) -> health_pb2.HealthCheckResponse:
        return _STATUS(status=_STATUS.SERVING if self._is_ready() else _STATUS.NOT_SERVING)
