"""The trust domain's own bundle (``spire.api.server.bundle.v1.Bundle``)."""

import grpc.aio

from broker._proto.service import ServiceBinding
from broker._proto.spire.api.server.bundle.v1 import bundle_pb2
from broker._proto.spire.api.types import bundle_pb2 as types_bundle_pb2
from broker.client.calls import DEADLINE_SECONDS, Caller

_BUNDLE = ServiceBinding.of(bundle_pb2.DESCRIPTOR, "Bundle")


class Bundles:
    """What everybody may know: the authorities."""

    def __init__(self, channel: grpc.aio.Channel, *, timeout: float = DEADLINE_SECONDS) -> None:
        """Call over ``channel``; ``timeout`` is in seconds, for each call."""
        self._bundle = Caller(channel, _BUNDLE, timeout=timeout)

    async def get(self) -> types_bundle_pb2.Bundle:
        """Give the own trust domain's bundle."""
        bundle: types_bundle_pb2.Bundle = await self._bundle.call("GetBundle", bundle_pb2.GetBundleRequest())
        return bundle
