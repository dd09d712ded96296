"""Health of the public socket: ``grpc.health.v1``. Needs no security header, as load balancers and probes have none."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from typing import Final

from broker._proto.grpc.health.v1 import health_pb2
from broker._proto.service import Context
from broker.errors import NotFound

POLL: Final = 1.0  # seconds between looks of a Watch; readiness changes a few times in a life

_Status = health_pb2.HealthCheckResponse


class HealthApi:
    """Check, List and Watch. SERVING once the agent has its estate and can answer workloads."""

    def __init__(
        self, services: Iterable[str], is_ready: Callable[[], bool], parts: Mapping[str, Callable[[], bool]]
    ) -> None:
        """``services``: full names; the empty name, the whole socket, is always known. ``parts`` speak for themselves."""
        self._listed = ("", *services)
        self._asked = dict.fromkeys(self._listed, is_ready) | dict(parts)

    async def Check(  # noqa: N802 - the RPC's name
        self, request: health_pb2.HealthCheckRequest, context: Context, caller: object
    ) -> health_pb2.HealthCheckResponse:
        """Say whether a service is served now."""
        if request.service not in self._asked:
            raise NotFound("unknown service", code="unknown_service")
        return self._now(request.service)

    async def List(  # noqa: N802
        self, request: health_pb2.HealthListRequest, context: Context, caller: object
    ) -> health_pb2.HealthListResponse:
        """Say it of every service; a part is told to who asks for it by name."""
        return health_pb2.HealthListResponse(statuses={name: self._now(name) for name in self._listed})

    async def Watch(  # noqa: N802
        self, request: health_pb2.HealthCheckRequest, context: Context, caller: object
    ) -> AsyncIterator[health_pb2.HealthCheckResponse]:
        """Say it now and at every change."""
        sent: object = None
        while True:
            known = request.service in self._asked
            status = self._now(request.service) if known else _Status(status=_Status.SERVICE_UNKNOWN)
            if status.status != sent:
                yield status
                sent = status.status
            await asyncio.sleep(POLL)

    def _now(self, name: str) -> health_pb2.HealthCheckResponse:
        return _Status(status=_Status.SERVING if self._asked[name]() else _Status.NOT_SERVING)
