"""``spire.api.server.svid.v1.SVID``: signing for agents' workloads, servers below, and operators."""

from dataclasses import replace
from datetime import timedelta
from typing import Final

from broker._proto.service import Context, ServiceBinding
from broker._proto.spire.api.server.svid.v1 import svid_pb2
from broker.errors import BrokerError, Invalid
from broker.registry.dns_names import checked_dns_names, require_no_overlap
from broker.server.api.access import Caller, agent_of, name_of
from broker.server.api.grpc.convert import error_status, jwt_message, ok_status, x509_message
from broker.server.api.grpc.identities import id_in, reading, workload
from broker.server.api.rate_limits import Limits
from broker.server.authority.csr import requested_names
from broker.server.identity.downstream import Downstream
from broker.server.identity.signing import Signing, X509Request

BINDING: Final = ServiceBinding.of(svid_pb2.DESCRIPTOR, "SVID")


class Svid:
    """The service, over its use cases."""

    def __init__(self, signing: Signing, downstream: Downstream, *, limits: Limits) -> None:
        self._signing = signing
        self._downstream = downstream
        self._limits = limits

    async def MintX509SVID(  # noqa: N802  # the name on the wire
        self, request: svid_pb2.MintX509SVIDRequest, context: Context, caller: Caller
    ) -> svid_pb2.MintX509SVIDResponse:
        """Sign for an operator: here, and only here, the request's names count."""
        if not request.csr:
            raise Invalid("missing CSR", code="csr_size")
        wishes = requested_names(request.csr)
        with reading("CSR URI SAN is invalid"):
            workload(wishes.spiffe_id, self._signing.trust_domain)
        with reading("CSR DNS name is invalid"):
            dns_names = checked_dns_names(wishes.dns_names)
        with reading("CSR DNS name contains a wildcard that covers another non-wildcard name"):
            require_no_overlap(dns_names)
        wishes = replace(wishes, dns_names=dns_names)
        svid = await self._signing.mint_x509(wishes, request.csr, _ttl(request.ttl), name_of(caller))
        return svid_pb2.MintX509SVIDResponse(svid=x509_message(svid))

    async def MintJWTSVID(  # noqa: N802
        self, request: svid_pb2.MintJWTSVIDRequest, context: Context, caller: Caller
    ) -> svid_pb2.MintJWTSVIDResponse:
        """Sign a JWT-SVID for an operator."""
        with reading("invalid SPIFFE ID"):
            spiffe_id = workload(id_in(request, "id"), self._signing.trust_domain)
        svid = await self._signing.mint_jwt(spiffe_id, request.audience, _ttl(request.ttl), name_of(caller))
        return svid_pb2.MintJWTSVIDResponse(svid=jwt_message(svid))

    async def BatchNewX509SVID(  # noqa: N802
        self, request: svid_pb2.BatchNewX509SVIDRequest, context: Context, caller: Caller
    ) -> svid_pb2.BatchNewX509SVIDResponse:
        """Sign for entries of the calling agent; each request has its own status."""
        if not request.params:
            raise Invalid("missing parameters", code="missing_parameters")
        await self._limits.certificates.take(caller, context, len(request.params))
        wanted = [_request(params) for params in request.params]
        signed = iter(
            await self._signing.x509(agent_of(caller).id, [one for one in wanted if isinstance(one, X509Request)])
        )
        outcomes = [one if isinstance(one, Invalid) else next(signed) for one in wanted]
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
        await self._limits.tokens.take(caller, context)
        svid = await self._signing.jwt(agent_of(caller).id, request.entry_id, request.audience)
        return svid_pb2.NewJWTSVIDResponse(svid=jwt_message(svid))

    async def NewDownstreamX509CA(  # noqa: N802
        self, request: svid_pb2.NewDownstreamX509CARequest, context: Context, caller: Caller
    ) -> svid_pb2.NewDownstreamX509CAResponse:
        """Sign an authority for a server below this one."""
        await self._limits.certificates.take(caller, context)
        made = await self._downstream.certify(request.csr, _ttl(request.preferred_ttl), name_of(caller))
        return svid_pb2.NewDownstreamX509CAResponse(ca_cert_chain=made.chain_der, x509_authorities=made.roots_der)


def _request(params: svid_pb2.NewX509SVIDParams) -> X509Request | Invalid:
    if not params.entry_id:
        return Invalid("missing entry ID", code="missing_id")
    if not params.csr:
        return Invalid("missing CSR", code="csr_size")
    return X509Request(params.entry_id, params.csr)


def _ttl(seconds: int) -> timedelta | None:
    # As in SPIRE: no life, and less, mean the usual one.
    return timedelta(seconds=seconds) if seconds > 0 else None
