"""Bundles: the own trust domain's, and those of others (``spire.api.server.bundle.v1.Bundle``)."""

from collections.abc import Sequence

import grpc.aio

from broker._proto.service import ServiceBinding
from broker._proto.spire.api.server.bundle.v1 import bundle_pb2
from broker._proto.spire.api.types import bundle_pb2 as types_bundle_pb2
from broker.client.calls import DEADLINE_SECONDS, Caller, require_ok

_BUNDLE = ServiceBinding.of(bundle_pb2.DESCRIPTOR, "Bundle")
_PAGE = 20
"""Bundles asked for at once: each may have some hundred KiB."""


class Bundles:
    """The own bundle is for everybody; the others are an operator's."""

    def __init__(self, channel: grpc.aio.Channel, *, timeout: float = DEADLINE_SECONDS) -> None:
        """Call over ``channel``; ``timeout`` is in seconds, for each call."""
        self._bundle = Caller(channel, _BUNDLE, timeout=timeout)

    async def get(self) -> types_bundle_pb2.Bundle:
        """Give the own trust domain's bundle."""
        bundle: types_bundle_pb2.Bundle = await self._bundle.call("GetBundle", bundle_pb2.GetBundleRequest())
        return bundle

    async def get_federated(self, trust_domain: str) -> types_bundle_pb2.Bundle:
        """Give another trust domain's bundle; raises NotFound."""
        request = bundle_pb2.GetFederatedBundleRequest(trust_domain=trust_domain)
        bundle: types_bundle_pb2.Bundle = await self._bundle.call("GetFederatedBundle", request)
        return bundle

    async def list_federated(self) -> Sequence[types_bundle_pb2.Bundle]:
        """Give the bundles of all other trust domains, page by page."""
        found: list[types_bundle_pb2.Bundle] = []
        token = ""
        while True:
            request = bundle_pb2.ListFederatedBundlesRequest(page_size=_PAGE, page_token=token)
            page: bundle_pb2.ListFederatedBundlesResponse = await self._bundle.call("ListFederatedBundles", request)
            found.extend(page.bundles)
            token = page.next_page_token
            if not token:
                return found

    async def set_federated(self, bundle: types_bundle_pb2.Bundle) -> types_bundle_pb2.Bundle:
        """Add or replace another trust domain's bundle; raises Invalid."""
        request = bundle_pb2.BatchSetFederatedBundleRequest(bundle=[bundle])
        answer: bundle_pb2.BatchSetFederatedBundleResponse = await self._bundle.call("BatchSetFederatedBundle", request)
        (result,) = answer.results
        require_ok(result.status, f"the bundle of {bundle.trust_domain} was not set")
        return result.bundle

    async def delete_federated(self, trust_domain: str, mode: str = "restrict") -> None:
        """Delete another trust domain's bundle; ``mode`` is restrict, delete or dissociate.

        Raises NotFound, and Refused while entries federate with it (restrict).
        """
        request = bundle_pb2.BatchDeleteFederatedBundleRequest(trust_domains=[trust_domain], mode=mode.upper())
        answer: bundle_pb2.BatchDeleteFederatedBundleResponse = await self._bundle.call(
            "BatchDeleteFederatedBundle", request
        )
        (result,) = answer.results
        require_ok(result.status, f"the bundle of {trust_domain} was not deleted")
