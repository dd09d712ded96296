"""Two methods of the Workload API that answer with who their caller is: enough to see a connection's caller anywhere."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from broker._proto.service import Context, ServiceBinding
from broker._proto.spiffe import workload_pb2

WORKLOAD = ServiceBinding.of(workload_pb2.DESCRIPTOR, "SpiffeWorkloadAPI")
UNARY, STREAM = "/SpiffeWorkloadAPI/FetchJWTSVID", "/SpiffeWorkloadAPI/FetchX509SVID"


class WhoAmI:
    """Raises ``error`` where it is given; the stream sends one message, waits for ``gate``, sends another."""

    def __init__(self, error: Exception | None = None) -> None:
        self.error = error
        self.gate = asyncio.Event()
        self.streams = 0

    async def FetchJWTSVID(self, request: Any, context: Context, caller: Any) -> workload_pb2.JWTSVIDResponse:
        if self.error:
            raise self.error
        return workload_pb2.JWTSVIDResponse(svids=[workload_pb2.JWTSVID(spiffe_id=str(caller))])

    async def FetchX509SVID(
        self, request: Any, context: Context, caller: Any
    ) -> AsyncIterator[workload_pb2.X509SVIDResponse]:
        self.streams += 1
        try:
            yield workload_pb2.X509SVIDResponse(svids=[workload_pb2.X509SVID(spiffe_id=str(caller))])
            await self.gate.wait()
            if self.error:
                raise self.error
            yield workload_pb2.X509SVIDResponse()
        finally:
            self.streams -= 1
