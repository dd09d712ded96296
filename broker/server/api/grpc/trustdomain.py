"""``spire.api.server.trustdomain.v1.TrustDomain``: federation relationships, and a look at an endpoint at once."""

from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import Any, Final

from broker._proto.google.protobuf import empty_pb2
from broker._proto.service import Context, ServiceBinding
from broker._proto.spire.api.server.trustdomain.v1 import trustdomain_pb2
from broker._proto.spire.api.types import federationrelationship_pb2 as types_pb2
from broker.errors import BrokerError, Invalid
from broker.server.api.access import Caller, name_of
from broker.server.api.grpc import convert
from broker.server.api.grpc.bundle import attempt, status_of
from broker.server.api.grpc.identities import reading
from broker.server.identity.bundles import PublishedBundle
from broker.server.identity.filters import domain_token
from broker.server.identity.polling import Polling
from broker.server.identity.relationships import Edit, Federation, Relationships
from broker.spiffe import SpiffeId, TrustDomain
from broker.spiffe.federation import Profile, Relationship

BINDING: Final = ServiceBinding.of(trustdomain_pb2.DESCRIPTOR, "TrustDomain")
_ALL: Final = types_pb2.FederationRelationshipMask(
    bundle_endpoint_url=True, bundle_endpoint_profile=True, trust_domain_bundle=True
)


class TrustDomains:
    """The service, over its use cases."""

    def __init__(self, relationships: Relationships, polling: Polling) -> None:
        self._relationships = relationships
        self._polling = polling

    async def ListFederationRelationships(  # noqa: N802  # the name on the wire
        self, request: trustdomain_pb2.ListFederationRelationshipsRequest, context: Context, caller: Caller
    ) -> trustdomain_pb2.ListFederationRelationshipsResponse:
        """List relationships by trust domain."""
        size = max(0, request.page_size)
        page = self._relationships.find(size, domain_token(request.page_token) if size else "")
        return trustdomain_pb2.ListFederationRelationshipsResponse(
            federation_relationships=[_shown(one, request) for one in page.items], next_page_token=page.next
        )

    async def GetFederationRelationship(  # noqa: N802
        self, request: trustdomain_pb2.GetFederationRelationshipRequest, context: Context, caller: Caller
    ) -> types_pb2.FederationRelationship:
        """Show one relationship."""
        return _shown(self._relationships.get(_trust_domain(request.trust_domain)), request)

    async def BatchCreateFederationRelationship(  # noqa: N802
        self, request: trustdomain_pb2.BatchCreateFederationRelationshipRequest, context: Context, caller: Caller
    ) -> trustdomain_pb2.BatchCreateFederationRelationshipResponse:
        """Add relationships, each with its own status; their endpoints are asked at once."""
        drafts = [attempt(partial(_converted, message)) for message in request.federation_relationships]
        outcomes = await self._relationships.create(drafts, name_of(caller))
        result = trustdomain_pb2.BatchCreateFederationRelationshipResponse.Result
        return trustdomain_pb2.BatchCreateFederationRelationshipResponse(results=_results(result, outcomes, request))

    async def BatchUpdateFederationRelationship(  # noqa: N802
        self, request: trustdomain_pb2.BatchUpdateFederationRelationshipRequest, context: Context, caller: Caller
    ) -> trustdomain_pb2.BatchUpdateFederationRelationshipResponse:
        """Change the fields that the mask names, or all without a mask."""
        mask = request.input_mask if request.HasField("input_mask") else _ALL
        edits = [attempt(partial(_edit, message, mask)) for message in request.federation_relationships]
        outcomes = await self._relationships.update(edits, name_of(caller))
        result = trustdomain_pb2.BatchUpdateFederationRelationshipResponse.Result
        return trustdomain_pb2.BatchUpdateFederationRelationshipResponse(results=_results(result, outcomes, request))

    async def BatchDeleteFederationRelationship(  # noqa: N802
        self, request: trustdomain_pb2.BatchDeleteFederationRelationshipRequest, context: Context, caller: Caller
    ) -> trustdomain_pb2.BatchDeleteFederationRelationshipResponse:
        """Delete relationships, each with its bundle."""
        wanted = [attempt(partial(_named, name)) for name in request.trust_domains]
        outcomes = await self._relationships.delete(wanted, name_of(caller))
        return trustdomain_pb2.BatchDeleteFederationRelationshipResponse(
            results=[
                trustdomain_pb2.BatchDeleteFederationRelationshipResponse.Result(
                    status=status_of(outcome), trust_domain=name if isinstance(one, BrokerError) else one.name
                )
                for name, one, outcome in zip(request.trust_domains, wanted, outcomes, strict=True)
            ]
        )

    async def RefreshBundle(  # noqa: N802
        self, request: trustdomain_pb2.RefreshBundleRequest, context: Context, caller: Caller
    ) -> empty_pb2.Empty:
        """Ask one trust domain's endpoint now."""
        await self._polling.refresh(_trust_domain(request.trust_domain))
        return empty_pb2.Empty()


def _trust_domain(name: str) -> TrustDomain:
    try:
        return TrustDomain(name)
    except Invalid as error:
        raise Invalid(f"failed to parse trust domain: {error.message}", code=error.reason) from None


def _named(name: str) -> TrustDomain:
    if not name:
        raise Invalid("missing trust domain", code="trust_domain_missing")
    return _trust_domain(name)


def _converted(message: types_pb2.FederationRelationship) -> Federation:
    try:
        trust_domain = _trust_domain(message.trust_domain)
        profile, endpoint_id = _profile(message)
        relationship = Relationship(trust_domain, message.bundle_endpoint_url, profile, endpoint_id)
        if not message.HasField("trust_domain_bundle"):
            return Federation(relationship)
        return Federation(relationship, _bundle_of(message, trust_domain))
    except Invalid as error:
        message_text = f"failed to convert federation relationship: {error.message}"
        raise Invalid(message_text, code=error.reason, hint=error.hint) from None


def _bundle_of(message: types_pb2.FederationRelationship, trust_domain: TrustDomain) -> PublishedBundle:
    with reading("failed to parse bundle"):
        bundle = convert.published_bundle_of(message.trust_domain_bundle)
    if bundle.trust_domain != trust_domain:
        raise Invalid(
            f'trust domain bundle ("{message.trust_domain_bundle.trust_domain}") must match the trust domain of the'
            f' federation relationship ("{trust_domain}")',
            code="bundle_trust_domain",
        )
    return bundle


def _profile(message: types_pb2.FederationRelationship) -> tuple[Profile, SpiffeId | None]:
    match message.WhichOneof("bundle_endpoint_profile"):
        case "https_web":
            return Profile.HTTPS_WEB, None
        case "https_spiffe":
            try:
                return Profile.HTTPS_SPIFFE, SpiffeId(message.https_spiffe.endpoint_spiffe_id)
            except Invalid as error:
                raise Invalid(f"failed to parse endpoint SPIFFE ID: {error.message}", code=error.reason) from None
    raise Invalid("unsupported bundle endpoint profile type: <nil>", code="bundle_endpoint_profile")


def _edit(
    message: types_pb2.FederationRelationship, mask: types_pb2.FederationRelationshipMask
) -> tuple[TrustDomain, Edit]:
    sent = _converted(message)
    return sent.relationship.trust_domain, partial(_edited, sent=sent, mask=mask)


def _edited(current: Federation, *, sent: Federation, mask: types_pb2.FederationRelationshipMask) -> Federation:
    relationship = current.relationship
    if mask.bundle_endpoint_url:
        relationship = replace(relationship, url=sent.relationship.url)
    if mask.bundle_endpoint_profile:
        relationship = replace(
            relationship, profile=sent.relationship.profile, endpoint_id=sent.relationship.endpoint_id
        )
    return Federation(relationship, sent.bundle if mask.trust_domain_bundle else None)


def _results(result: Any, outcomes: Iterable[Federation | BrokerError], request: Any) -> list[Any]:
    made = []
    for outcome in outcomes:
        one = result(status=status_of(outcome))
        if isinstance(outcome, Federation):
            one.federation_relationship.CopyFrom(_shown(outcome, request))
        made.append(one)
    return made


def _shown(federation: Federation, request: Any) -> types_pb2.FederationRelationship:
    mask = request.output_mask if request.HasField("output_mask") else _ALL
    relationship = federation.relationship
    message = types_pb2.FederationRelationship(trust_domain=relationship.trust_domain.name)
    if mask.bundle_endpoint_url:
        message.bundle_endpoint_url = relationship.url
    if mask.bundle_endpoint_profile and relationship.profile is Profile.HTTPS_SPIFFE:
        message.https_spiffe.endpoint_spiffe_id = str(relationship.endpoint_id)
    elif mask.bundle_endpoint_profile:
        message.https_web.SetInParent()
    if mask.trust_domain_bundle and federation.bundle is not None:
        message.trust_domain_bundle.CopyFrom(convert.bundle_message(federation.bundle))
    return message
