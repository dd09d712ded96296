"""Keeps files what the Workload API says: X.509-SVID, key and bundle, JWT-SVIDs, JWT bundles, for programs that read files.

One stream or timer per part. A part that cannot be had leaves its files as they are, and is tried again; who looks after
the rest is told by :attr:`Keeping.state`. Knows neither options nor whom to tell.
"""

import asyncio
import base64
import json
import random
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final

import grpc
import grpc.aio
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509 import Certificate

from broker._proto.service import ServiceBinding, Stub
from broker._proto.spiffe import workload_pb2
from broker.cli.connections import SECURITY_HEADER, ask_agent
from broker.cli.credential_files import CredentialDirectory, NewFile
from broker.cli.svid_texts import expiry_of, key_pem, pem_of
from broker.clock import Clock
from broker.errors import BrokerError, Invalid, InvalidSvid, Misconfigured, NoIdentity, Unavailable
from broker.sdk.workload import Identity, read_identity
from broker.spiffe import Bundle, TrustDomain, certificates
from broker.transport.rpc_errors import from_rpc_error

RETRY_FIRST, RETRY_MOST = 0.2, 30.0
"""Seconds between attempts, doubling, with jitter: a node may have many of these commands."""
WRITE_AGAIN: Final = 5.0
"""Seconds until files that could not be written are tried again: a disk that was full."""
RENEW_LEAST: Final = 1.0
"""Seconds between two tokens, however short they live."""

_BINDING: Final = ServiceBinding.of(workload_pb2.DESCRIPTOR, "SpiffeWorkloadAPI")
X509, JWT_BUNDLES, JWT = "x509", "jwt_bundles", "jwt:"


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """Which files there are to be; an empty name is a file that is not wanted."""

    svid: str = "svid.pem"
    key: str = "svid_key.pem"
    bundle: str = "svid_bundle.pem"
    jwt_bundles: str = ""
    jwts: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """File name to audiences."""
    cert_mode: int = 0o644
    key_mode: int = 0o600
    jwt_mode: int = 0o600
    jwt_bundle_mode: int = 0o600
    spiffe_id: str = ""
    hint: str = ""
    add_intermediates_to_bundle: bool = False
    include_federated_domains: bool = False
    omit_expired: bool = False
    remove_withdrawn: bool = False

    @property
    def parts(self) -> Mapping[str, Sequence[str]]:
        """What is kept by itself, and its files; the first file is the one whose absence says that it is missing."""
        x509 = {X509: (self.key, self.svid, self.bundle)} if self.svid else {}
        bundles = {JWT_BUNDLES: (self.jwt_bundles,)} if self.jwt_bundles else {}
        return x509 | bundles | {f"{JWT}{name}": (name,) for name in self.jwts}

    @property
    def secrets(self) -> Mapping[str, Sequence[str]]:
        """The files of each part that are worth something to whoever holds them."""
        return {part: names[:2] if part == X509 else names for part, names in self.parts.items() if part != JWT_BUNDLES}


@dataclass(slots=True)
class Part:
    """How one part stands: until when what is written can be used, and what goes wrong now."""

    written: bool = False
    good_until: datetime | None = None
    failing: str = ""


class Keeping:
    """Keeps the files of one plan. ``changed`` is awaited after each change with the part's name."""

    def __init__(
        self,
        channel: grpc.aio.Channel,
        wanted: Wanted,
        directory: CredentialDirectory,
        clock: Clock,
        *,
        changed: Callable[[str], Awaitable[None]],
        say: Callable[[str], None],
        timeout: float,
    ) -> None:
        """``timeout`` in seconds, for one JWT-SVID, and for the first answer of :meth:`once`."""
        self._channel = channel
        self._stub = Stub(channel, _BINDING)
        self._wanted = wanted
        self._directory = directory
        self._clock = clock
        self._changed = changed
        self._say = say
        self._timeout = timeout
        self._now: dict[str, tuple[NewFile, ...]] = {}
        self.state: dict[str, Part] = {name: Part() for name in wanted.parts}

    def lacking(self) -> Mapping[str, str]:
        """Give the parts that nobody can use now, and why."""
        now = self._clock.now()
        return {
            name: part.failing or ("it has expired" if part.written else "it has not been written yet")
            for name, part in self.state.items()
            if not part.written or (part.good_until is not None and now >= part.good_until)
        }

    async def once(self) -> None:
        """Write every part one time; raises the BrokerError by which one cannot be had."""
        for name in self.state:
            try:
                async with asyncio.timeout(self._timeout):
                    await self._round(name, first=True)
            except TimeoutError:
                raise Unavailable("the node agent did not answer in time", hint="is its server up?") from None

    async def run(self) -> None:
        """Keep them until cancelled; raises the BrokerError that trying again would not change."""
        async with asyncio.TaskGroup() as group:
            for name in self.state:
                group.create_task(self._keep(name), name=f"keep-{name}")

    async def _keep(self, name: str) -> None:
        pause, least = RETRY_FIRST, 0.0
        while True:
            try:
                await self._round(name, first=False)
            except BrokerError as error:
                if type(error) is Invalid:
                    raise  # WE-03, WE-10: the same request will be as wrong the next time
                if not self.state[name].failing:
                    pause = RETRY_FIRST
                await self._failed(name, error)
                least = WRITE_AGAIN if isinstance(error, Misconfigured) else 0.0
            await asyncio.sleep(max(pause, least) * random.uniform(0.8, 1.2))  # noqa: S311 - to spread, not to hide
            pause = min(pause * 2, RETRY_MOST)

    async def _failed(self, name: str, error: BrokerError) -> None:
        part = self.state[name]
        if part.failing != error.message:
            self._say(f"{name}: {error.message}; what is written stays, trying again")
        part.failing = error.message
        if isinstance(error, NoIdentity) and self._wanted.remove_withdrawn and part.written:
            self._directory.remove(self._wanted.secrets.get(name, ()))
            self._now.pop(name, None)
            part.written, part.good_until = False, None
            await self._changed(name)

    async def _round(self, name: str, *, first: bool) -> None:
        if name == X509:
            await self._follow(name, "FetchX509SVID", workload_pb2.X509SVIDRequest(), self._x509_files, first=first)
        elif name == JWT_BUNDLES:
            request = workload_pb2.JWTBundlesRequest()
            await self._follow(name, "FetchJWTBundles", request, self._bundle_files, first=first)
        else:
            await self._renew(name, first=first)

    async def _follow(self, name: str, method: str, request: Any, files: Callable[[Any], Any], *, first: bool) -> None:
        """Write what a stream says, as long as it goes; raises the BrokerError that its end means."""
        call = getattr(self._stub, method)(request, metadata=SECURITY_HEADER)
        try:
            async for message in call:
                await self._put(name, *files(message))
                if first:
                    return
        except grpc.aio.AioRpcError as error:
            raise _told(method, error) from None
        finally:
            call.cancel()
        raise Unavailable("the agent ended the stream", code="stream_ended")

    async def _renew(self, name: str, *, first: bool) -> None:
        """Keep one token: a new one at half of what is left of it."""
        file = name.removeprefix(JWT)
        request = workload_pb2.JWTSVIDRequest(audience=self._wanted.jwts[file], spiffe_id=self._wanted.spiffe_id)
        while True:
            answer = await ask_agent(self._channel, _BINDING, "FetchJWTSVID", request, timeout=self._timeout)
            svid = self._chosen(answer.svids)
            until = datetime.fromtimestamp(expiry_of(svid.svid), self._clock.now().tzinfo)
            await self._put(name, [NewFile(file, svid.svid.encode("ascii"), self._wanted.jwt_mode)], until)
            if first:
                return
            await asyncio.sleep(max((until - self._clock.now()).total_seconds() / 2, RENEW_LEAST))

    async def _put(self, name: str, files: Sequence[NewFile], until: datetime | None) -> None:
        part = self.state[name]
        known = self._now.get(name)
        if known != tuple(files):
            self._directory.write(files)
            self._now[name] = tuple(files)
        part.written, part.good_until, part.failing = True, until, ""
        if known != tuple(files):
            await self._changed(name)

    def _chosen(self, svids: Sequence[Any]) -> Any:
        wanted = self._wanted
        for svid in svids:
            if (not wanted.hint or svid.hint == wanted.hint) and wanted.spiffe_id in {"", svid.spiffe_id}:
                return svid
        if not svids:
            raise Unavailable("the agent answered with no SVID", code="empty_answer")
        raise NoIdentity(
            "this process does not have the identity that was chosen", hint="broker svid x509 shows those that it has"
        )

    def _x509_files(self, message: workload_pb2.X509SVIDResponse) -> tuple[list[NewFile], datetime]:
        svid = self._chosen(message.svids)
        identity = read_identity(svid)
        roots = self._roots(identity, svid.bundle, message.federated_bundles)
        chain = list(identity.tls.chain_der)
        if self._wanted.add_intermediates_to_bundle:
            roots += chain[1:]
            chain = chain[:1]
        wanted = self._wanted
        leaf = certificates.load(chain[0])
        return [
            NewFile(wanted.key, key_pem(identity.tls.key), wanted.key_mode),
            NewFile(wanted.svid, pem_of(chain).encode(), wanted.cert_mode),
            NewFile(wanted.bundle, pem_of(roots).encode(), wanted.cert_mode),
        ], leaf.not_valid_after_utc

    def _roots(self, identity: Identity, own: bytes, federated: Mapping[str, bytes]) -> list[bytes]:
        told = {str(identity.id.trust_domain): own}
        if self._wanted.include_federated_domains:
            told |= {str(TrustDomain(name)): der for name, der in sorted(federated.items())}
        found: list[bytes] = []
        for name, der in told.items():
            bundle = Bundle.from_workload_api(TrustDomain(name), x509_der=der)
            found += [one.public_bytes(Encoding.DER) for one in bundle.x509_authorities if self._is_kept(one)]
        if not found:
            raise InvalidSvid("every authority of the bundle has expired", code="bundle_expired")
        return found

    def _is_kept(self, authority: Certificate) -> bool:
        return not self._wanted.omit_expired or self._clock.now() < authority.not_valid_after_utc

    def _bundle_files(self, message: workload_pb2.JWTBundlesResponse) -> tuple[list[NewFile], None]:
        # As spiffe-helper writes them: trust domain to the key set, in base64.
        told = {str(TrustDomain(name)): base64.b64encode(keys).decode() for name, keys in message.bundles.items()}
        document = json.dumps(dict(sorted(told.items()))).encode()
        return [NewFile(self._wanted.jwt_bundles, document, self._wanted.jwt_bundle_mode)], None


def _told(method: str, error: grpc.aio.AioRpcError) -> BrokerError:
    if error.code() is grpc.StatusCode.UNIMPLEMENTED:
        return Invalid(
            f"what answers there does not serve {method}",
            code="not_implemented",
            hint="is it the Workload API's socket of a node agent?",
        )
    return from_rpc_error(error)
