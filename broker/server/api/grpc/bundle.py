"""``spire.api.server.bundle.v1.Bundle``: the own bundle, for everybody. Federation is not built yet."""

from datetime import UTC, datetime
from typing import Final

from broker._proto.service import Context, ServiceBinding
from broker._proto.spire.api.server.bundle.v1 import bundle_pb2
from broker._proto.spire.api.types import bundle_pb2 as types_pb2
from broker.errors import Invalid
from broker.server.api.access import Caller, name_of
from broker.server.api.grpc.convert import MAX_TIME, apply_mask, bundle_message, moment_of
from broker.server.authority.upstream import PublicJwtKey
from broker.server.identity.bundles import Bundles
from broker.server.identity.downstream import Downstream
from broker.spiffe import TrustDomain

BINDING: Final = ServiceBinding.of(bundle_pb2.DESCRIPTOR, "Bundle")
NEVER: Final = datetime.fromtimestamp(MAX_TIME, UTC)


class Bundle:
    """The service, over its use cases; methods that are not here answer Unimplemented."""

    def __init__(self, bundles: Bundles, downstream: Downstream) -> None:
        self._bundles = bundles
        self._downstream = downstream

    async def GetBundle(  # noqa: N802  # the name on the wire
        self, request: bundle_pb2.GetBundleRequest, context: Context, caller: Caller
    ) -> types_pb2.Bundle:
        """Give the own trust domain's bundle."""
        message = bundle_message(self._bundles.own())
        if request.HasField("output_mask"):
            apply_mask(message, request.output_mask)
        return message

    async def CountBundles(  # noqa: N802
        self, request: bundle_pb2.CountBundlesRequest, context: Context, caller: Caller
    ) -> bundle_pb2.CountBundlesResponse:
        """Count bundles: the own one."""
        return bundle_pb2.CountBundlesResponse(count=1)

    async def ListFederatedBundles(  # noqa: N802
        self, request: bundle_pb2.ListFederatedBundlesRequest, context: Context, caller: Caller
    ) -> bundle_pb2.ListFederatedBundlesResponse:
        """List federated bundles: none."""
        return bundle_pb2.ListFederatedBundlesResponse()

    async def GetFederatedBundle(  # noqa: N802
        self, request: bundle_pb2.GetFederatedBundleRequest, context: Context, caller: Caller
    ) -> types_pb2.Bundle:
        """Give a federated bundle: there is none."""
        return bundle_message(self._bundles.federated(TrustDomain(request.trust_domain)))

    async def PublishJWTAuthority(  # noqa: N802
        self, request: bundle_pb2.PublishJWTAuthorityRequest, context: Context, caller: Caller
    ) -> bundle_pb2.PublishJWTAuthorityResponse:
        """Put a JWT key of a server below this one into the bundle, and give all that are in it."""
        if not request.HasField("jwt_authority"):
            raise Invalid("missing JWT authority", code="invalid_jwt_authority")
        told = request.jwt_authority
        ends = moment_of(told.expires_at) or NEVER
        await self._downstream.publish(PublicJwtKey(told.key_id, told.public_key, ends), name_of(caller))
        return bundle_pb2.PublishJWTAuthorityResponse(
            jwt_authorities=bundle_message(self._bundles.own()).jwt_authorities
        )
