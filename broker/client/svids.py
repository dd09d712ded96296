"""SVIDs minted by hand, without an entry (``spire.api.server.svid.v1.SVID``)."""

from collections.abc import Sequence

import grpc.aio

from broker._proto.service import ServiceBinding
from broker._proto.spire.api.server.svid.v1 import svid_pb2
from broker._proto.spire.api.types import jwtsvid_pb2, x509svid_pb2
from broker.client.calls import DEADLINE_SECONDS, Caller, spiffe_id_message
from broker.spiffe import SpiffeId

_SVID = ServiceBinding.of(svid_pb2.DESCRIPTOR, "SVID")


class Svids:
    """What an operator may sign."""

    def __init__(self, channel: grpc.aio.Channel, *, timeout: float = DEADLINE_SECONDS) -> None:
        """Call over ``channel``; ``timeout`` is in seconds, for each call."""
        self._svid = Caller(channel, _SVID, timeout=timeout)

    async def mint_x509(self, csr_der: bytes, *, ttl: int = 0) -> x509svid_pb2.X509SVID:
        """Sign this request; ``ttl`` in seconds, 0 takes the server's default."""
        request = svid_pb2.MintX509SVIDRequest(csr=csr_der, ttl=ttl)
        answer: svid_pb2.MintX509SVIDResponse = await self._svid.call("MintX509SVID", request)
        return answer.svid

    async def mint_jwt(self, identity: SpiffeId, audience: Sequence[str], *, ttl: int = 0) -> jwtsvid_pb2.JWTSVID:
        """Sign a JWT-SVID for these audiences; ``ttl`` in seconds, 0 takes the server's default."""
        request = svid_pb2.MintJWTSVIDRequest(id=spiffe_id_message(identity), audience=audience, ttl=ttl)
        answer: svid_pb2.MintJWTSVIDResponse = await self._svid.call("MintJWTSVID", request)
        return answer.svid
