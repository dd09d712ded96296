"""Whether a program answers and serves (``grpc.health.v1.Health``); the same for server and agent."""

import grpc.aio

from broker._proto.grpc.health.v1 import health_pb2
from broker._proto.service import ServiceBinding
from broker.client.calls import Caller
from broker.errors import Unavailable

_HEALTH = ServiceBinding.of(health_pb2.DESCRIPTOR, "Health")
CHECK_SECONDS = 3.0
"""A health check that takes longer is an answer."""


class Health:
    """Asks one program."""

    def __init__(self, channel: grpc.aio.Channel, *, timeout: float = CHECK_SECONDS) -> None:
        """Call over ``channel``; ``timeout`` is in seconds."""
        self._health = Caller(channel, _HEALTH, timeout=timeout)

    async def require_serving(self, service: str = "") -> None:
        """Return when it serves; raises Unavailable with what it says instead."""
        request = health_pb2.HealthCheckRequest(service=service)
        answer: health_pb2.HealthCheckResponse = await self._health.call("Check", request)
        if answer.status != health_pb2.HealthCheckResponse.SERVING:
            said = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
            raise Unavailable(f"it answers {said}", code="not_serving", hint="its log says what it waits for")
