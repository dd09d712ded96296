"""X.509-SVIDs taken back (``broker.server.v1.Revocations``)."""

import grpc.aio

from broker._proto.broker.server.v1 import revocations_pb2
from broker._proto.service import ServiceBinding
from broker.client.calls import DEADLINE_SECONDS, Caller

_REVOCATIONS = ServiceBinding.of(revocations_pb2.DESCRIPTOR, "Revocations")


class Revocations:
    """What an operator may take back."""

    def __init__(self, channel: grpc.aio.Channel, *, timeout: float = DEADLINE_SECONDS) -> None:
        """Call over ``channel``; ``timeout`` is in seconds, for each call."""
        self._revocations = Caller(channel, _REVOCATIONS, timeout=timeout)

    async def revoke(self, request: revocations_pb2.RevokeSvidsRequest) -> revocations_pb2.RevokeSvidsResponse:
        """Revoke what the request names; raises NotFound, Refused, Invalid, Conflict."""
        answer: revocations_pb2.RevokeSvidsResponse = await self._revocations.call("RevokeSvids", request)
        return answer
