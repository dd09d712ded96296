"""An agent pod's side: identities from the node agent's socket, and tasks.

:class:`Workload` holds one connection to the SPIFFE Workload API, keeps the newest X.509-SVIDs and bundles from its streams,
and asks for JWT-SVIDs and tasks. It holds no secret of its own and asks for none: the node agent knows the caller from the
kernel.
"""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import grpc
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import load_der_private_key

from broker._proto.service import ServiceBinding, Stub
from broker._proto.spiffe import workload_pb2
from broker.clock import SystemClock
from broker.errors import BrokerError, Invalid, InvalidBundle, InvalidSvid, NoIdentity, Unavailable
from broker.sdk import background
from broker.sdk.endpoint import CALL_SECONDS, SECURITY_HEADER, socket_target
from broker.sdk.task_blocks import AttachedBlock, TaskBlock
from broker.sdk.watching import TokenWatch
from broker.spiffe import Bundle, BundleSet, SpiffeId, TrustDomain, certificates
from broker.spiffe.jose import b64url_encode
from broker.spiffe.revocation import read_crls
from broker.spiffe.x509svid import parse_x509_svid_id, split_der
from broker.transport.rpc_errors import from_rpc_error
from broker.transport.tls import TlsIdentity

FIRST_ANSWER_SECONDS = 15.0
"""How long the first identity may take: the agent itself waits for an entry that is on its way."""

RETRY_FIRST, RETRY_MOST = 0.1, 5.0
"""Seconds between attempts to reopen a stream, doubling."""


@dataclass(frozen=True, slots=True)
class Identity:
    """One X.509-SVID with its key, as this process holds it. ``repr`` shows no key."""

    id: SpiffeId
    tls: TlsIdentity
    hint: str
    x5t: str


@dataclass(frozen=True, slots=True)
class JwtSvidToken:
    """A JWT-SVID as text; print ``id``, never ``token``."""

    id: SpiffeId
    token: str
    hint: str

    def __repr__(self) -> str:
        """Name the identity and hide the token."""
        return f"JwtSvidToken({self.id}, <secret>)"


class Workload:
    """This process, as the node agent attests it. Use :meth:`connect` with ``async with``."""

    def __init__(self, target: str, spiffe_id: SpiffeId | None = None) -> None:
        """Prepare; nothing is dialled before ``async with``."""
        self._target = target
        self.chosen = spiffe_id
        self._identities: tuple[Identity, ...] = ()
        self._bundles = BundleSet.of()
        self._failures: dict[str, BrokerError] = {}
        self._changed = asyncio.Condition()
        self._version = 0
        self._streams: asyncio.Task[None] | None = None

    @classmethod
    def connect(cls, address: str | None = None, *, spiffe_id: SpiffeId | str = "") -> Self:
        """Name the Workload API: ``address``, or ``SPIFFE_ENDPOINT_SOCKET``.

        ``spiffe_id`` chooses one of this process's identities: no other is used, for tasks neither.
        """
        return cls(socket_target(address), SpiffeId(str(spiffe_id)) if spiffe_id else None)

    async def __aenter__(self) -> Self:
        """Open the connection and the streams."""
        self._channel = grpc.aio.insecure_channel(self._target, options=(("grpc.max_receive_message_length", 4 << 20),))
        self._api = Stub(self._channel, ServiceBinding.of(workload_pb2.DESCRIPTOR, "SpiffeWorkloadAPI"))
        self.watch = TokenWatch(self._channel, SystemClock())
        self._streams = asyncio.create_task(self._follow(), name="broker-sdk-streams")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the streams and the connection."""
        try:
            if self._streams is not None:
                await background.end(self._streams)
        finally:
            await self.watch.close()
            await self._channel.close()

    @property
    def channel(self) -> grpc.aio.Channel:
        """The connection to the node agent, for this product's own services on the same socket."""
        return self._channel

    @property
    def bundles(self) -> BundleSet:
        """The bundles this workload may trust; empty until the first answer."""
        return self._bundles

    @property
    def current(self) -> Identity | None:
        """The default identity at this moment, without waiting."""
        return self._identities[0] if self._identities else None

    async def identity(self, *, hint: str | None = None, timeout: float = FIRST_ANSWER_SECONDS) -> Identity:  # noqa: ASYNC109
        """Give the newest X.509-SVID: the first one, or the one with this hint.

        Raises:
            NoIdentity: no entry matches this process.
            Unavailable: the node agent does not answer in time.
        """
        await self._wait(lambda: bool(self._identities) and bool(self._bundles), timeout)
        for identity in self._identities:
            if hint is None or identity.hint == hint:
                return identity
        raise NoIdentity(f"no identity with the hint {hint!r}", hint="broker entry list shows the hints")

    async def identity_changes(self) -> AsyncIterator[Identity]:
        """Give the default identity now and after each rotation."""
        seen: Identity | None = None
        while True:
            async with self._changed:
                while self.current is None or self.current is seen:
                    await self._changed.wait()
                seen = self.current
            yield seen

    async def wait_for_x5t(self, x5t: str, *, timeout: float) -> None:  # noqa: ASYNC109
        """Wait until this process holds the leaf with that thumbprint."""
        await self._wait(lambda: any(i.x5t == x5t for i in self._identities), timeout)

    async def jwt_svid(self, audience: str | Sequence[str], *, spiffe_id: SpiffeId | str = "") -> JwtSvidToken:
        """Fetch a JWT-SVID for these audiences.

        Raises:
            NoIdentity: no entry matches this process.
            Invalid: the audience is empty or not allowed.
        """
        audiences = [audience] if isinstance(audience, str) else list(audience)
        request = workload_pb2.JWTSVIDRequest(audience=audiences, spiffe_id=str(spiffe_id))
        answer = await self._call("FetchJWTSVID", request)
        if not answer.svids:
            raise Unavailable("the agent answered with no JWT-SVID", code="empty_answer")
        first = answer.svids[0]
        return JwtSvidToken(SpiffeId(first.spiffe_id), first.svid, first.hint)

    async def validate_jwt_svid(self, token: str, *, audience: str) -> tuple[SpiffeId, Mapping[str, Any]]:
        """Let the node agent validate a JWT-SVID; give its subject and claims.

        Raises:
            Invalid: it does not validate.
        """
        request = workload_pb2.ValidateJWTSVIDRequest(audience=audience, svid=token)
        answer = await self._call("ValidateJWTSVID", request)
        return SpiffeId(answer.spiffe_id), dict(answer.claims)

    def task(
        self,
        *,
        user_token: str = "",
        delegation: str = "",
        purpose: str,
        authorization_details: Sequence[Mapping[str, object]],
        ttl: int = 0,
        limits: Mapping[str, object] | None = None,
        supervision: str = "",
        idempotency_key: str = "",
    ) -> TaskBlock:
        """Prepare a task; ``async with`` starts it, leaving the block ends it, and every token of it dies.

        It acts on a user's token, or on a standing ``delegation`` (its id).
        ``ttl`` is in seconds; 0 takes the server's default. ``supervision`` is ``attached``, ``lease`` or
        ``none``; empty takes the server's default.
        """
        return TaskBlock(
            self,
            user_token=user_token,
            delegation=delegation,
            purpose=purpose,
            authorization_details=authorization_details,
            ttl=ttl,
            limits=limits or {},
            supervision=supervision,
            idempotency_key=idempotency_key,
        )

    def attach(self, task_id: str) -> AttachedBlock:
        """Prepare to take up a task that another agent started, or handed off, for this one; ``async with`` takes it up.

        From then on it is this process's, and leaving the block ends it.
        """
        return AttachedBlock(self, task_id, is_resumed=False)

    def resume(self, task_id: str) -> AttachedBlock:
        """Prepare to take up a suspended task of a process of this workload that is gone; ``async with`` takes it up.

        Nothing of the other process goes on but the task: this one asks for tokens of its own.
        """
        return AttachedBlock(self, task_id, is_resumed=True)

    async def _call(self, method: str, request: object) -> Any:
        try:
            return await getattr(self._api, method)(request, metadata=SECURITY_HEADER, timeout=CALL_SECONDS)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from None

    async def _wait(self, ready: Any, timeout: float) -> None:  # noqa: ASYNC109
        async with self._changed:
            try:
                async with asyncio.timeout(timeout):
                    await self._changed.wait_for(lambda: ready() or self._refusal() is not None)
            except TimeoutError:
                raise next(iter(self._failures.values()), None) or Unavailable(
                    "the node agent did not answer in time", hint="is the agent running on this node?"
                ) from None
            refusal = self._refusal()
            if not ready() and refusal is not None:
                raise refusal

    def _refusal(self) -> BrokerError | None:
        # What waiting does not change; anything else may be over at the next attempt.
        return next((one for one in self._failures.values() if isinstance(one, (NoIdentity, Invalid))), None)

    async def _follow(self) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._keep("FetchX509SVID", workload_pb2.X509SVIDRequest(), self._take_svids))
            group.create_task(self._keep("FetchX509Bundles", workload_pb2.X509BundlesRequest(), self._take_bundles))

    async def _keep(self, method: str, request: object, take: Any) -> None:
        pause = RETRY_FIRST
        while True:
            try:
                async for message in getattr(self._api, method)(request, metadata=SECURITY_HEADER):
                    await self._update(method, take, message)
                    pause = RETRY_FIRST
                failure: BrokerError = Unavailable("the agent ended the stream", code="stream_ended")
            except grpc.aio.AioRpcError as error:
                failure = _stream_failure(method, error)
            await self._fail(method, failure)
            if isinstance(failure, Invalid):
                return  # WE-03, WE-10: the same request will be as wrong the next time
            await asyncio.sleep(pause)
            pause = min(pause * 2, RETRY_MOST)

    async def _update(self, method: str, take: Any, message: Any) -> None:
        try:
            taken = take(message)
        except BrokerError as error:
            # WA-09: what cannot be read is an error and is discarded; the stream goes on, the next one may be good.
            await self._fail(method, error)
            return
        async with self._changed:
            taken()
            self._failures.pop(method, None)
            self._version += 1
            self._changed.notify_all()

    async def _fail(self, method: str, failure: BrokerError) -> None:
        async with self._changed:
            self._failures[method] = failure
            if isinstance(failure, NoIdentity):  # WA-15: what is withdrawn is no longer used
                self._identities, self._bundles = (), BundleSet.of()
                self._version += 1
            self._changed.notify_all()

    def _take_svids(self, message: workload_pb2.X509SVIDResponse) -> Any:
        identities = tuple(read_identity(svid) for svid in message.svids)
        if not identities:
            raise InvalidSvid("the agent sent no X.509-SVID", code="empty_answer")
        if self.chosen is not None:
            identities = tuple(one for one in identities if one.id == self.chosen)
            if not identities:
                raise NoIdentity(f"this process does not have the identity {self.chosen}")

        def taken() -> None:
            self._identities = identities

        return taken

    def _take_bundles(self, message: workload_pb2.X509BundlesResponse) -> Any:
        bundles = BundleSet.of(*(_bundle(name, der, message.crl) for name, der in message.bundles.items()))
        if not bundles:  # WA-16: one's own is always there
            raise InvalidBundle("the agent sent no bundle", code="empty_answer")

        def taken() -> None:
            self._bundles = bundles

        return taken


def _stream_failure(method: str, error: grpc.aio.AioRpcError) -> BrokerError:
    if error.code() is grpc.StatusCode.UNIMPLEMENTED:
        return Invalid(
            f"what answers there does not serve {method}",
            code="not_implemented",
            hint="is it the Workload API's socket of a node agent?",
        )
    return from_rpc_error(error)


def read_identity(svid: workload_pb2.X509SVID) -> Identity:
    """Read one X.509-SVID with its key, which must belong together; raises InvalidSvid or InvalidSpiffeId."""
    if not (svid.spiffe_id and svid.x509_svid and svid.x509_svid_key and svid.bundle):
        raise InvalidSvid("the agent sent an X.509-SVID without a part that every one has", code="incomplete_answer")
    chain = tuple(split_der(svid.x509_svid))
    leaf = certificates.load(chain[0])
    identity = parse_x509_svid_id(leaf)
    if str(identity) != svid.spiffe_id:
        raise InvalidSvid("the agent sent a certificate of another identity", code="id_mismatch")
    try:
        key = load_der_private_key(svid.x509_svid_key, None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        # ``from None``: the reader's own words are about the key.
        raise InvalidSvid("the agent sent a key that cannot be read", code="key_malformed") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey):
        raise InvalidSvid("the agent sent a kind of key that X.509-SVIDs do not use", code="key_kind")
    if key.public_key() != leaf.public_key():
        raise InvalidSvid("the agent sent a key that is not the certificate's", code="key_mismatch")
    return Identity(identity, TlsIdentity(chain, key), svid.hint, b64url_encode(hashlib.sha256(chain[0]).digest()))


def _bundle(name: str, der: bytes, crls: Sequence[bytes]) -> Bundle:
    bundle = Bundle.from_workload_api(TrustDomain(name), x509_der=der)
    # A list belongs to the bundle whose authority signed it; the others pass it over.
    return bundle.with_revoked(read_crls(crls, bundle.x509_authorities))
