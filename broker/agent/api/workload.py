"""The SPIFFE Workload API (SPIFFE_Workload_API): X.509- and JWT-SVIDs, bundles, validation.

Every message of a stream is the full set, so that what is absent is withdrawn. A stream whose last identity goes ends
with PERMISSION_DENIED. WIT-SVIDs are not served: their methods answer UNIMPLEMENTED.
"""

from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final, TypeVar

import grpc

from broker._proto.google.protobuf import struct_pb2
from broker._proto.service import Context
from broker._proto.spiffe import workload_pb2
from broker.agent.api.audiences import checked_audiences
from broker.agent.api.pace import Pace
from broker.agent.cache import EstateCache
from broker.agent.entitlement import Entitlement
from broker.agent.holdings import JwtHolding, X509Holding
from broker.agent.sessions import Identity, WorkloadSession
from broker.agent.svids import SvidKeeper
from broker.agent.workloads import NO_IDENTITY, Caller
from broker.clock import Clock
from broker.errors import BrokerError, Invalid, InvalidSpiffeId, NoIdentity, NotFound, Refused, Unavailable
from broker.registry import Entry
from broker.spiffe import Bundle, SpiffeId, TrustDomain, verify_jwt_svid

M = TypeVar("M")

MAX_SIGNINGS: Final = 3  # for one call, where its entry is changed each time
NO_WIT: Final = "WIT-SVIDs are not served"
FOREIGN_CLAIMS: Final = frozenset({"sub", "aud", "exp"})  # of another trust domain's token nothing else is repeated


class WorkloadApi:
    """The methods of ``SpiffeWorkloadAPI``, for callers that the listener has admitted."""

    def __init__(self, entitlement: Entitlement, svids: SvidKeeper, cache: EstateCache, clock: Clock) -> None:
        self._entitlement = entitlement
        self._svids = svids
        self._cache = cache
        self._clock = clock
        self._pace = Pace()

    async def FetchX509SVID(  # noqa: N802 - the RPC's name
        self, request: workload_pb2.X509SVIDRequest, context: Context, caller: Caller
    ) -> AsyncIterator[workload_pb2.X509SVIDResponse]:
        """Stream the caller's X.509-SVIDs with keys and bundles (section 5.2.1)."""
        session = await self._entitlement.session(caller)
        with session.listening(self._cache) as bell:
            entries = await self._entitlement.first(session, bell)
            sent: _Sent | None = None
            while True:
                identities = await self._identities(session, entries)
                await self._pace.turn()
                # Signing took time: the caller may be another program by now, or have lost an entry.
                self._entitlement.check(session)
                if (now := self._entitlement.required(session)) != entries:
                    entries = now
                    continue
                bundles = self._x509_bundles(entries)
                sending = _Sent(tuple(one.x509 for one in identities), bundles, self._cache.crls)
                if sent is None or not sending.is_same(sent):
                    yield self._x509_response(identities, bundles)
                    sent = sending
                await bell.wait(self._svids.due_in(session, entries))
                await self._pace.turn()
                self._entitlement.check(session)
                entries = self._entitlement.required(session)

    async def FetchX509Bundles(  # noqa: N802
        self, request: workload_pb2.X509BundlesRequest, context: Context, caller: Caller
    ) -> AsyncIterator[workload_pb2.X509BundlesResponse]:
        """Stream the X.509 bundles that the caller may use (section 5.2.2)."""
        async for message in self._messages(
            caller,
            lambda entries: workload_pb2.X509BundlesResponse(crl=self._cache.crls, bundles=self._x509_bundles(entries)),
        ):
            yield message

    async def FetchJWTBundles(  # noqa: N802
        self, request: workload_pb2.JWTBundlesRequest, context: Context, caller: Caller
    ) -> AsyncIterator[workload_pb2.JWTBundlesResponse]:
        """Stream the JWT bundles that the caller may use, as JWK Sets (section 6.2.2)."""
        async for message in self._messages(
            caller, lambda entries: workload_pb2.JWTBundlesResponse(bundles=self._jwt_bundles(entries))
        ):
            yield message

    async def FetchJWTSVID(  # noqa: N802
        self, request: workload_pb2.JWTSVIDRequest, context: Context, caller: Caller
    ) -> workload_pb2.JWTSVIDResponse:
        """Give JWT-SVIDs for these audiences: of one identity, or of all (section 6.2.1)."""
        audiences = checked_audiences(request.audience)
        wanted = _requested_id(request.spiffe_id)
        session, entries = await self._entitlement.of(caller)
        if wanted is not None:
            entries = tuple(entry for entry in entries if entry.spiffe_id == wanted)
            if not entries:
                raise NoIdentity(NO_IDENTITY)
        response = workload_pb2.JWTSVIDResponse()
        refusal: BrokerError | None = None
        for entry in entries:
            held = self._svids.cached_jwt(session, entry, audiences) or await self._signed(session, entry, audiences)
            if isinstance(held, BrokerError):
                refusal = refusal or held
            else:
                response.svids.add(spiffe_id=str(held.entry.spiffe_id), svid=held.token, hint=held.entry.hint)
        if not response.svids:
            raise refusal or NoIdentity(NO_IDENTITY)
        return response

    async def _signed(
        self, session: WorkloadSession, entry: Entry, audiences: tuple[str, ...]
    ) -> JwtHolding | Refused | Invalid:
        """Have a JWT-SVID signed, for the entry as it is afterwards; give the refusal that concerns this entry alone."""
        for _ in range(MAX_SIGNINGS):
            try:
                held = await self._svids.jwt(session, entry, audiences)
            except (Refused, Invalid) as error:
                return error
            except BrokerError as error:
                raise _not_fetched(error) from error
            # Signing took time: the caller may be another program by now, the entry gone, or changed.
            self._entitlement.check(session)
            now = {one.id: one for one in self._entitlement.required(session)}.get(entry.id)
            if now is None:
                return NoIdentity(NO_IDENTITY)
            if now == entry:
                return replace(held, entry=now)
            if now.spiffe_id != entry.spiffe_id:
                break  # the caller may have asked for the other one
            entry = now
        raise Unavailable("the entry changes while it is signed for", code="entry_changed")

    async def ValidateJWTSVID(  # noqa: N802
        self, request: workload_pb2.ValidateJWTSVIDRequest, context: Context, caller: Caller
    ) -> workload_pb2.ValidateJWTSVIDResponse:
        """Verify a JWT-SVID on the caller's behalf, under the bundles that the caller may use (section 6.2.3)."""
        if not request.audience:
            raise Invalid("audience must be specified", code="audience_missing")
        if not request.svid:
            raise Invalid("svid must be specified", code="svid_missing")
        session = await self._entitlement.session(caller)
        if not self._cache.is_synced and self._cache.own_bundle is None:
            raise Unavailable("the agent has no bundle yet", code="not_synced")
        allowed = self._allowed(self._entitlement_or_none(session))
        bundles = self._cache.bundles
        for name in set(bundles) - allowed:
            bundles = bundles.without(name)
        svid = verify_jwt_svid(request.svid, bundles, audience=request.audience, now=self._clock.now())
        claims: Mapping[str, Any] = svid.claims
        if svid.id.trust_domain != self._cache.trust_domain:
            claims = {name: value for name, value in claims.items() if name in FOREIGN_CLAIMS}
        response = workload_pb2.ValidateJWTSVIDResponse(spiffe_id=str(svid.id), claims=struct_pb2.Struct())
        response.claims.update(dict(claims))
        return response

    async def FetchWITSVID(  # noqa: N802
        self, request: workload_pb2.WITSVIDRequest, context: Context, caller: Caller
    ) -> AsyncIterator[workload_pb2.WITSVIDResponse]:
        """Say that the WIT profile is not served, to a caller with the security header."""
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, NO_WIT)
        yield workload_pb2.WITSVIDResponse()

    async def FetchWITBundles(  # noqa: N802
        self, request: workload_pb2.WITBundlesRequest, context: Context, caller: Caller
    ) -> AsyncIterator[workload_pb2.WITBundlesResponse]:
        """Say the same of its bundles."""
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, NO_WIT)
        yield workload_pb2.WITBundlesResponse()

    async def _identities(self, session: WorkloadSession, entries: tuple[Entry, ...]) -> tuple[Identity, ...]:
        try:
            return await self._svids.x509(session, entries)
        except (Refused, NotFound) as error:
            # The server no longer knows the entry: its withdrawal is on the way here.
            raise NoIdentity(NO_IDENTITY) from error

    async def _messages(self, caller: Caller, render: "Callable[[Iterable[Entry]], M]") -> AsyncIterator[M]:
        session = await self._entitlement.session(caller)
        with session.listening(self._cache) as bell:
            entries = await self._entitlement.first(session, bell)
            self._entitlement.check(session)
            sent: M | None = None
            while True:
                message = render(entries)
                if message != sent:
                    yield message
                    sent = message
                await bell.wait(self._svids.due_in(session, entries))
                await self._pace.turn()
                self._entitlement.check(session)
                entries = self._entitlement.required(session)

    def _x509_response(
        self, identities: tuple[Identity, ...], bundles: dict[str, bytes]
    ) -> workload_pb2.X509SVIDResponse:
        own = str(self._cache.trust_domain.id)
        response = workload_pb2.X509SVIDResponse(
            crl=self._cache.crls, federated_bundles={name: der for name, der in bundles.items() if name != own}
        )
        for identity in identities:
            held = identity.x509
            assert held is not None  # the keeper gives only such
            response.svids.add(
                spiffe_id=str(identity.entry.spiffe_id),
                x509_svid=held.chain_der,
                x509_svid_key=held.key_der,
                bundle=bundles[own],
                hint=identity.entry.hint,
            )
        return response

    def _x509_bundles(self, entries: Iterable[Entry]) -> dict[str, bytes]:
        # A bundle without X.509 authorities is left out: nothing is trusted under it, and clients cannot read nothing.
        rendered = self._rendered(entries, self._cache.x509_der)
        return {name: der for name, der in rendered.items() if der or name == str(self._cache.trust_domain.id)}

    def _jwt_bundles(self, entries: Iterable[Entry]) -> dict[str, bytes]:
        return self._rendered(entries, self._cache.jwks)

    def _rendered(self, entries: Iterable[Entry], form: "Callable[[Bundle], bytes]") -> dict[str, bytes]:
        bundles = self._cache.bundles
        allowed = self._allowed(entries)
        return {str(name.id): form(bundles[name]) for name in sorted(allowed) if name in bundles}

    def _allowed(self, entries: Iterable[Entry]) -> set[TrustDomain]:
        return {self._cache.trust_domain}.union(*(entry.federates_with for entry in entries))

    def _entitlement_or_none(self, session: WorkloadSession) -> tuple[Entry, ...]:
        try:
            return self._entitlement.required(session)
        except (NoIdentity, Unavailable):
            return ()


@dataclass(frozen=True, slots=True, eq=False)
class _Sent:
    """What a stream last sent, compared by identity: the same holdings and bundle bytes are the same message."""

    holdings: tuple[X509Holding | None, ...]
    bundles: dict[str, bytes]
    crls: tuple[bytes, ...]

    def is_same(self, other: "_Sent") -> bool:
        return (
            len(self.holdings) == len(other.holdings)
            and all(mine is theirs for mine, theirs in zip(self.holdings, other.holdings, strict=True))
            and self.bundles == other.bundles
            and self.crls == other.crls
        )


def _requested_id(text: str) -> SpiffeId | None:
    if not text:
        return None
    try:
        return SpiffeId(text)
    except InvalidSpiffeId as error:
        raise Invalid(f"invalid requested SPIFFE ID: {error.message}", code=error.reason) from None


def _not_fetched(error: BrokerError) -> Unavailable:
    return Unavailable(f"could not fetch JWT-SVID: {error.message}", code=error.reason, hint=error.hint)
