"""``spire.api.server.bundle.v1.Bundle``: the own bundle, for everybody, and those of other trust domains."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from typing import Any, Final, TypeVar

from broker._proto.service import Context, ServiceBinding
from broker._proto.spire.api.server.bundle.v1 import bundle_pb2
from broker._proto.spire.api.types import bundle_pb2 as types_pb2
from broker._proto.spire.api.types import status_pb2
from broker.errors import BrokerError, Invalid, InvalidSpiffeId
from broker.server.api.access import Caller, name_of
from broker.server.api.grpc import convert
from broker.server.api.grpc.convert import MAX_TIME, apply_mask, bundle_message, moment_of
from broker.server.api.rate_limits import Limits
from broker.server.authority.upstream import PublicJwtKey
from broker.server.identity.bundles import Bundles, DeletionMode, PublishedBundle
from broker.server.identity.downstream import Downstream
from broker.server.identity.filters import domain_token
from broker.spiffe import TrustDomain

BINDING: Final = ServiceBinding.of(bundle_pb2.DESCRIPTOR, "Bundle")
NEVER: Final = datetime.fromtimestamp(MAX_TIME, UTC)
_MODES: Final = {0: DeletionMode.RESTRICT, 1: DeletionMode.DELETE, 2: DeletionMode.DISSOCIATE}

T = TypeVar("T")


class Bundle:
    """The service, over its use cases; methods that are not here answer Unimplemented."""

    def __init__(self, bundles: Bundles, downstream: Downstream, *, limits: Limits) -> None:
        self._bundles = bundles
        self._downstream = downstream
        self._limits = limits

    # ---- the own bundle

    async def GetBundle(  # noqa: N802  # the name on the wire
        self, request: bundle_pb2.GetBundleRequest, context: Context, caller: Caller
    ) -> types_pb2.Bundle:
        """Give the own trust domain's bundle."""
        return _shown(self._bundles.own(), request)

    async def AppendBundle(  # noqa: N802
        self, request: bundle_pb2.AppendBundleRequest, context: Context, caller: Caller
    ) -> types_pb2.Bundle:
        """Publish further authorities as the own trust domain's."""
        jwt = _read("failed to convert JWT authority", lambda: convert.jwt_keys_of(request.jwt_authorities))
        x509 = _read("failed to convert X.509 authority", lambda: convert.x509_keys_of(request.x509_authorities))
        return _shown(await self._bundles.append(x509, jwt, name_of(caller)), request)

    # ---- those of others

    async def CountBundles(  # noqa: N802
        self, request: bundle_pb2.CountBundlesRequest, context: Context, caller: Caller
    ) -> bundle_pb2.CountBundlesResponse:
        """Count bundles, the own one among them."""
        return bundle_pb2.CountBundlesResponse(count=self._bundles.count())

    async def ListFederatedBundles(  # noqa: N802
        self, request: bundle_pb2.ListFederatedBundlesRequest, context: Context, caller: Caller
    ) -> bundle_pb2.ListFederatedBundlesResponse:
        """List federated bundles by trust domain."""
        size = max(0, request.page_size)
        page = self._bundles.find(size, domain_token(request.page_token) if size else "")
        return bundle_pb2.ListFederatedBundlesResponse(
            bundles=[_shown(one, request) for one in page.items], next_page_token=page.next
        )

    async def GetFederatedBundle(  # noqa: N802
        self, request: bundle_pb2.GetFederatedBundleRequest, context: Context, caller: Caller
    ) -> types_pb2.Bundle:
        """Give one federated bundle."""
        return _shown(self._bundles.federated(_trust_domain(request.trust_domain)), request)

    async def BatchCreateFederatedBundle(  # noqa: N802
        self, request: bundle_pb2.BatchCreateFederatedBundleRequest, context: Context, caller: Caller
    ) -> bundle_pb2.BatchCreateFederatedBundleResponse:
        """Add bundles, each with its own status."""
        outcomes = await self._bundles.create(_drafts(request.bundle), name_of(caller))
        result = bundle_pb2.BatchCreateFederatedBundleResponse.Result
        return bundle_pb2.BatchCreateFederatedBundleResponse(results=_results(result, outcomes, request))

    async def BatchUpdateFederatedBundle(  # noqa: N802
        self, request: bundle_pb2.BatchUpdateFederatedBundleRequest, context: Context, caller: Caller
    ) -> bundle_pb2.BatchUpdateFederatedBundleResponse:
        """Change the fields that the mask names, or all without a mask."""
        mask = request.input_mask if request.HasField("input_mask") else None
        outcomes = await self._bundles.update(_drafts(request.bundle), partial(_edited, mask=mask), name_of(caller))
        result = bundle_pb2.BatchUpdateFederatedBundleResponse.Result
        return bundle_pb2.BatchUpdateFederatedBundleResponse(results=_results(result, outcomes, request))

    async def BatchSetFederatedBundle(  # noqa: N802
        self, request: bundle_pb2.BatchSetFederatedBundleRequest, context: Context, caller: Caller
    ) -> bundle_pb2.BatchSetFederatedBundleResponse:
        """Add bundles, or replace those that are there."""
        outcomes = await self._bundles.set(_drafts(request.bundle), name_of(caller))
        result = bundle_pb2.BatchSetFederatedBundleResponse.Result
        return bundle_pb2.BatchSetFederatedBundleResponse(results=_results(result, outcomes, request))

    async def BatchDeleteFederatedBundle(  # noqa: N802
        self, request: bundle_pb2.BatchDeleteFederatedBundleRequest, context: Context, caller: Caller
    ) -> bundle_pb2.BatchDeleteFederatedBundleResponse:
        """Delete bundles, and as the mode says what becomes of the entries that federate with them."""
        mode = _MODES.get(request.mode)
        if mode is None:
            raise Invalid(f'failed to parse deletion mode: unhandled delete mode "{request.mode}"', code="invalid_mode")
        wanted = [attempt(partial(_trust_domain, name)) for name in request.trust_domains]
        outcomes = await self._bundles.delete(wanted, mode, name_of(caller))
        return bundle_pb2.BatchDeleteFederatedBundleResponse(
            results=[
                bundle_pb2.BatchDeleteFederatedBundleResponse.Result(status=status_of(outcome), trust_domain=name)
                for name, outcome in zip(request.trust_domains, outcomes, strict=True)
            ]
        )

    # ---- for servers below

    async def PublishJWTAuthority(  # noqa: N802
        self, request: bundle_pb2.PublishJWTAuthorityRequest, context: Context, caller: Caller
    ) -> bundle_pb2.PublishJWTAuthorityResponse:
        """Put a JWT key of a server below this one into the bundle, and give all that are in it."""
        await self._limits.keys.take(caller, context)
        if not request.HasField("jwt_authority"):
            raise Invalid("missing JWT authority", code="invalid_jwt_authority")
        told = request.jwt_authority
        ends = moment_of(told.expires_at) or NEVER
        await self._downstream.publish(PublicJwtKey(told.key_id, told.public_key, ends), name_of(caller))
        return bundle_pb2.PublishJWTAuthorityResponse(
            jwt_authorities=bundle_message(self._bundles.own()).jwt_authorities
        )


def attempt(read: Callable[[], T]) -> T | BrokerError:
    """Read one item of a batch; its failure is its own."""
    try:
        return read()
    except Invalid as error:
        return error


def status_of(outcome: object) -> status_pb2.Status:
    """Write one item's status."""
    return convert.error_status(outcome) if isinstance(outcome, BrokerError) else convert.ok_status()


def _trust_domain(name: str) -> TrustDomain:
    try:
        return TrustDomain(name)
    except InvalidSpiffeId as error:
        raise Invalid(f"trust domain argument is not valid: {error.message}", code=error.reason) from None


def _read(doing: str, read: Callable[[], T]) -> T:
    try:
        return read()
    except Invalid as error:
        raise Invalid(f"{doing}: {error.message}", code=error.reason, hint=error.hint) from None


def _draft(message: types_pb2.Bundle) -> PublishedBundle:
    _trust_domain(message.trust_domain)
    return _read("failed to convert bundle", lambda: convert.published_bundle_of(message))


def _drafts(messages: Iterable[types_pb2.Bundle]) -> list[PublishedBundle | BrokerError]:
    return [attempt(partial(_draft, message)) for message in messages]


def _edited(held: PublishedBundle, sent: PublishedBundle, mask: types_pb2.BundleMask | None) -> PublishedBundle:
    if mask is None:
        return sent
    return replace(
        held,
        x509=sent.x509 if mask.x509_authorities else held.x509,
        jwt=sent.jwt if mask.jwt_authorities else held.jwt,
        sequence=sent.sequence if mask.sequence_number else held.sequence,
        refresh_hint=sent.refresh_hint if mask.refresh_hint else held.refresh_hint,
    )


def _results(result: Any, outcomes: Iterable[PublishedBundle | BrokerError], request: Any) -> list[Any]:
    made = []
    for outcome in outcomes:
        one = result(status=status_of(outcome))
        if isinstance(outcome, PublishedBundle):
            one.bundle.CopyFrom(_shown(outcome, request))
        made.append(one)
    return made


def _shown(bundle: PublishedBundle, request: Any) -> types_pb2.Bundle:
    message = bundle_message(bundle)
    if request.HasField("output_mask"):
        apply_mask(message, request.output_mask)
    return message
