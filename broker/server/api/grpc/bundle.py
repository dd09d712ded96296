"""``spire.api.server.bundle.v1.Bundle``: the own bundle, for everybody. Federation is not built yet."""

from typing import Final

from broker._proto.service import Context, ServiceBinding
from broker._proto.spire.api.server.bundle.v1 import bundle_pb2
from broker._proto.spire.api.types import bundle_pb2 as types_pb2
from broker.server.api.access import Caller
from broker.server.api.grpc.convert import apply_mask, bundle_message
from broker.server.identity.bundles import Bundles
from broker.spiffe import TrustDomain

BINDING: Final = ServiceBinding.of(bundle_pb2.DESCRIPTOR, "Bundle")


class Bundle:
    """The service, over its use cases; methods that are not here answer Unimplemented."""

    def __init__(self, bundles: Bundles) -> None:
        self._bundles = bundles

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
