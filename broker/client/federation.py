"""Federation relationships (``spire.api.server.trustdomain.v1.TrustDomain``)."""

from collections.abc import Sequence

import grpc.aio

from broker._proto.service import ServiceBinding
from broker._proto.spire.api.server.trustdomain.v1 import trustdomain_pb2
from broker._proto.spire.api.types.federationrelationship_pb2 import FederationRelationship
from broker.client.calls import DEADLINE_SECONDS, Caller, require_ok

_TRUST_DOMAIN = ServiceBinding.of(trustdomain_pb2.DESCRIPTOR, "TrustDomain")
_PAGE = 20
"""Relationships asked for at once: each shows its bundle."""


class Relationships:
    """What an operator does with federation relationships."""

    def __init__(self, channel: grpc.aio.Channel, *, timeout: float = DEADLINE_SECONDS) -> None:
        """Call over ``channel``; ``timeout`` is in seconds, for each call."""
        self._service = Caller(channel, _TRUST_DOMAIN, timeout=timeout)

    async def create(self, relationships: Sequence[FederationRelationship]) -> Sequence[FederationRelationship]:
        """Create relationships; raises Conflict, Invalid for the first that failed, when all have been tried."""
        request = trustdomain_pb2.BatchCreateFederationRelationshipRequest(federation_relationships=relationships)
        answer: trustdomain_pb2.BatchCreateFederationRelationshipResponse = await self._service.call(
            "BatchCreateFederationRelationship", request
        )
        for sent, result in zip(relationships, answer.results, strict=True):
            require_ok(result.status, f"the relationship with {sent.trust_domain} was not created")
        return [result.federation_relationship for result in answer.results]

    async def update(self, relationships: Sequence[FederationRelationship]) -> Sequence[FederationRelationship]:
        """Replace relationships; raises NotFound, Invalid for the first that failed, when all have been tried."""
        request = trustdomain_pb2.BatchUpdateFederationRelationshipRequest(federation_relationships=relationships)
        answer: trustdomain_pb2.BatchUpdateFederationRelationshipResponse = await self._service.call(
            "BatchUpdateFederationRelationship", request
        )
        for sent, result in zip(relationships, answer.results, strict=True):
            require_ok(result.status, f"the relationship with {sent.trust_domain} was not updated")
        return [result.federation_relationship for result in answer.results]

    async def get(self, trust_domain: str) -> FederationRelationship:
        """Give one relationship; raises NotFound."""
        request = trustdomain_pb2.GetFederationRelationshipRequest(trust_domain=trust_domain)
        found: FederationRelationship = await self._service.call("GetFederationRelationship", request)
        return found

    async def list(self) -> Sequence[FederationRelationship]:
        """Give all relationships, page by page."""
        found: list[FederationRelationship] = []
        token = ""
        while True:
            request = trustdomain_pb2.ListFederationRelationshipsRequest(page_size=_PAGE, page_token=token)
            page: trustdomain_pb2.ListFederationRelationshipsResponse = await self._service.call(
                "ListFederationRelationships", request
            )
            found.extend(page.federation_relationships)
            token = page.next_page_token
            if not token:
                return found

    async def delete(self, trust_domain: str) -> None:
        """Delete one relationship, and with it the bundle that it brought; raises NotFound."""
        request = trustdomain_pb2.BatchDeleteFederationRelationshipRequest(trust_domains=[trust_domain])
        answer: trustdomain_pb2.BatchDeleteFederationRelationshipResponse = await self._service.call(
            "BatchDeleteFederationRelationship", request
        )
        (result,) = answer.results
        require_ok(result.status, f"the relationship with {trust_domain} was not deleted")

    async def refresh(self, trust_domain: str) -> None:
        """Have the server ask the trust domain's endpoint now; raises NotFound, and BrokerError when nothing came of it."""
        await self._service.call("RefreshBundle", trustdomain_pb2.RefreshBundleRequest(trust_domain=trust_domain))
