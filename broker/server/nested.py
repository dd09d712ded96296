"""Below another SPIFFE server: our authorities are certified by it, and our JWT keys published in its bundle.

Who we are to it is a workload: an SVID from the Workload API of an agent of that server, whose entry says downstream. Who it
is to us is settled by its SPIFFE ID. Its bundle is ours (SPIRE's nested topology: one trust domain, several servers).
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import TracebackType
from typing import Final, Self, TypeVar

import grpc.aio
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, load_der_public_key

from broker._proto.service import ServiceBinding, Stub
from broker._proto.spire.api.server.bundle.v1 import bundle_pb2
from broker._proto.spire.api.server.svid.v1 import svid_pb2
from broker._proto.spire.api.types import bundle_pb2 as types_pb2
from broker.clock import Clock
from broker.errors import BrokerError, Unavailable
from broker.keys import Signer
from broker.sdk import Workload
from broker.server.authority import lint, profile
from broker.server.authority.profile import Issuer
from broker.server.authority.server_svid import SERVER_PATH
from broker.server.authority.upstream import Minted, PublicJwtKey, adopted_roots
from broker.server.store.rows import AdoptedAuthority, AuthorityKind, Source
from broker.spiffe import SpiffeId, TrustDomain
from broker.spiffe.certificates import read, read_authority
from broker.spiffe.chains import TrustAnchors, find_path
from broker.telemetry.log import get_logger
from broker.transport.dialer import SpiffeDialer
from broker.transport.rpc_errors import from_rpc_error

T = TypeVar("T")

DEADLINE: Final = 20.0
"""Seconds for one call: SPIRE signs in milliseconds, but the connection may have to be made first."""
MAX_KEYS: Final = 10_000
"""Authorities in a bundle that is believed."""
NEVER: Final = datetime(9999, 12, 31, tzinfo=UTC)

_SVID: Final = ServiceBinding.of(svid_pb2.DESCRIPTOR, "SVID")
_BUNDLE: Final = ServiceBinding.of(bundle_pb2.DESCRIPTOR, "Bundle")

log = get_logger("upstream")


class ServerUpstream:
    """Another server above us; ``async with`` keeps the connections to it and to the Workload API."""

    is_above = True

    def __init__(self, trust_domain: TrustDomain, clock: Clock, *, address: str, workload_api: Path) -> None:
        """``address`` is host:port; ``workload_api`` the socket of an agent of the server above."""
        self._trust_domain = trust_domain
        self._clock = clock
        self._workload = Workload.connect(f"unix://{workload_api}")
        self._dialer = SpiffeDialer(
            address,
            identity=lambda: self._workload.current.tls if self._workload.current else None,
            bundles=lambda: self._workload.bundles,
            expect=SpiffeId.of(trust_domain, SERVER_PATH),
            clock=clock,
        )
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        """Open both connections; nobody has answered yet."""
        await self._stack.enter_async_context(self._workload)
        channel = await self._stack.enter_async_context(self._dialer)
        self._svid, self._bundle = Stub(channel, _SVID), Stub(channel, _BUNDLE)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close both."""
        await self._stack.aclose()

    async def mint(self, signer: Signer, ttl: timedelta) -> Minted:
        """Have the server above certify a new authority's key; what comes is judged. Raises Unavailable, Refused."""
        request = svid_pb2.NewDownstreamX509CARequest(csr=self._request(signer), preferred_ttl=int(ttl.total_seconds()))
        answer: svid_pb2.NewDownstreamX509CAResponse = await self._call(
            lambda: self._svid.NewDownstreamX509CA(request, timeout=DEADLINE)
        )
        chain = [x509.load_der_x509_certificate(der) for der in answer.ca_cert_chain]
        roots = [x509.load_der_x509_certificate(der) for der in answer.x509_authorities]
        try:
            self._judge(signer, chain, roots)
        except BrokerError as error:
            raise Unavailable(
                f"the upstream server's answer is not a usable authority: {error.message}", code="upstream_answer"
            ) from error
        above = b"".join(one.public_bytes(Encoding.DER) for one in chain[1:])
        return Minted(chain[0].public_bytes(Encoding.DER), above, profile.issuer_key_id(chain[0]), adopted_roots(roots))

    async def publish(self, key: PublicJwtKey) -> tuple[AdoptedAuthority, ...]:
        """Publish a JWT key above, and give all that are published there; raises Unavailable, Refused."""
        told = types_pb2.JWTKey(
            public_key=key.public,
            key_id=key.id,
            expires_at=0 if key.not_after >= NEVER else int(key.not_after.timestamp()),
        )
        answer: bundle_pb2.PublishJWTAuthorityResponse = await self._call(
            lambda: self._bundle.PublishJWTAuthority(
                bundle_pb2.PublishJWTAuthorityRequest(jwt_authority=told), timeout=DEADLINE
            )
        )
        return _jwt_rows(answer.jwt_authorities)

    async def bundle(self) -> tuple[AdoptedAuthority, ...] | None:
        """Give the bundle of the server above; raises Unavailable."""
        told: types_pb2.Bundle = await self._call(
            lambda: self._bundle.GetBundle(bundle_pb2.GetBundleRequest(), timeout=DEADLINE)
        )
        if told.trust_domain != self._trust_domain.name or not told.x509_authorities:
            raise Unavailable("the upstream server's bundle is not ours, or empty", code="upstream_answer")
        try:
            roots = [(x509.load_der_x509_certificate(one.asn1), one.tainted) for one in told.x509_authorities]
        except ValueError:
            raise Unavailable("the upstream server's bundle cannot be read", code="upstream_answer") from None
        tainted = [root for root, is_tainted in roots if is_tainted]
        return (*adopted_roots((root for root, _ in roots), tainted), *_jwt_rows(told.jwt_authorities))

    def _request(self, signer: Signer) -> bytes:
        # Of it the server above believes the key alone; SPIRE's wants to see the name, too.
        name = x509.UniformResourceIdentifier(str(self._trust_domain.id))
        builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
        builder = builder.add_extension(x509.SubjectAlternativeName([name]), critical=False)
        return signer.request(builder).public_bytes(Encoding.DER)

    def _judge(self, signer: Signer, chain: list[x509.Certificate], roots: list[x509.Certificate]) -> None:
        if not chain or not roots:
            raise Unavailable("it is empty")
        if chain[0].public_key() != signer.public_key:
            raise Unavailable("it is for another key")
        now = self._clock.now()
        between = [read_authority(certificate) for certificate in chain[1:]]
        path = find_path(read(chain[0]), between, TrustAnchors(roots), now=now)
        lint.authority(chain[0], Issuer.of(path[1], path[2:]))

    async def _call(self, call: Callable[[], Awaitable[T]]) -> T:
        try:
            async with asyncio.timeout(DEADLINE):
                await self._workload.identity()
                return await call()
        except TimeoutError:
            raise Unavailable("the upstream server does not answer", code="upstream_unavailable") from None
        except grpc.aio.AioRpcError as error:
            raise self._explained(from_rpc_error(error)) from None
        except BrokerError as error:
            raise self._explained(error) from None

    def _explained(self, error: BrokerError) -> BrokerError:
        why = f" ({self._dialer.last_error})" if isinstance(error, Unavailable) and self._dialer.last_error else ""
        return Unavailable(
            f"the upstream server: {error.message}{why}",
            code="upstream_unavailable",
            hint="this server needs an entry with downstream on at the upstream server, and an agent of it on this node",
        )


def _jwt_rows(keys: Iterable[types_pb2.JWTKey]) -> tuple[AdoptedAuthority, ...]:
    rows: list[AdoptedAuthority] = []
    for key in keys:
        try:
            load_der_public_key(key.public_key)
        except (ValueError, TypeError):
            log.warning("upstream_key_unreadable", key_id=key.key_id[:64])
            continue
        ends = datetime.fromtimestamp(key.expires_at, UTC) if 0 < key.expires_at < NEVER.timestamp() else NEVER
        rows.append(AdoptedAuthority(AuthorityKind.JWT, key.key_id, key.public_key, ends, Source.UPSTREAM, key.tainted))
    return tuple(rows[:MAX_KEYS])
