"""``spire.api.server.svid.v1.SVID``: signing for agents' workloads, servers below, and operators."""

from collections.abc import Sequence
from datetime import timedelta
from typing import Final

from broker._proto.service import Context, ServiceBinding
from broker._proto.spire.api.server.svid.v1 import svid_pb2
from broker.errors import BrokerError, Invalid
from broker.server.api.access import Caller, agent_of, name_of
from broker.server.api.grpc.convert import error_status, jwt_message, ok_status, spiffe_id_of, x509_message
from broker.server.authority.csr import requested_names
from broker.server.identity.downstream import Downstream
from broker.server.identity.signing import Signing, X509Request

BINDING: Final = ServiceBinding.of(svid_pb2.DESCRIPTOR, "SVID")


class Svid:
    """The service, over its use cases."""

    def __init__(self, signing: Signing, downstream: Downstream) -> None:
        self._signing = signing
        self._downstream = downstream

    async def MintX509SVID(  # noqa: N802  # the name on the wire
        self, request: svid_pb2.MintX509SVIDRequest, context: Context, caller: Caller
    ) -> svid_pb2.MintX509SVIDResponse:
        """Sign for an operator: here, and only here, the request's names count."""
        spiffe_id, dns_names = requested_names(request.csr)
        svid = await self._signing.mint_x509(spiffe_id, request.csr, dns_names, _ttl(request.ttl), name_of(caller))
        return svid_pb2.MintX509SVIDResponse(svid=x509_message(svid))

    async def MintJWTSVID(  # noqa: N802
        self, request: svid_pb2.MintJWTSVIDRequest, context: Context, caller: Caller
    ) -> svid_pb2.MintJWTSVIDResponse:
        """Sign a JWT-SVID for an operator."""
        svid = await self._signing.mint_jwt(
            spiffe_id_of(request.id), request.audience, _ttl(request.ttl), name_of(caller)
        )
        return svid_pb2.MintJWTSVIDResponse(svid=jwt_message(svid))

    async def BatchNewX509SVID(  # noqa: N802
        self, request: svid_pb2.BatchNewX509SVIDRequest, context: Context, caller: Caller
    ) -> svid_pb2.BatchNewX509SVIDResponse:
        """Sign for entries of the calling agent; each request has its own status."""
        wanted = [X509Request(params.entry_id, params.csr) for params in request.params]
        outcomes = await self._signing.x509(agent_of(caller).id, wanted)
        result = svid_pb2.BatchNewX509SVIDResponse.Result
        ok = ok_status()
        return svid_pb2.BatchNewX509SVIDResponse(
            results=[
                result(status=error_status(outcome))
                if isinstance(outcome, BrokerError)
                else result(status=ok, svid=x509_message(outcome))
                for outcome in outcomes
            ]
        )

    async def NewJWTSVID(  # noqa: N802
        self, request: svid_pb2.NewJWTSVIDRequest, context: Context, caller: Caller
    ) -> svid_pb2.NewJWTSVIDResponse:
        """Sign a JWT-SVID for an entry of the calling agent."""
        audience: Sequence[str] = request.audience
        svid = await self._signing.jwt(agent_of(caller).id, request.entry_id, audience)
        return svid_pb2.NewJWTSVIDResponse(svid=jwt_message(svid))

    async def NewDownstreamX509CA(  # noqa: N802
        self, request: svid_pb2.NewDownstreamX509CARequest, context: Context, caller: Caller
    ) -> svid_pb2.NewDownstreamX509CAResponse:
        """Sign an authority for a server below this one."""
        made = await self._downstream.certify(request.csr, _ttl(request.preferred_ttl), name_of(caller))
        return svid_pb2.NewDownstreamX509CAResponse(ca_cert_chain=made.chain_der, x509_authorities=made.roots_der)


def _ttl(seconds: int) -> timedelta | None:
    if seconds < 0:
        raise Invalid("a life is not negative", code="invalid_ttl")
    return timedelta(seconds=seconds) if seconds else None
