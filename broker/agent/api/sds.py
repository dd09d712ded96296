"""Envoy's secret discovery on the workload socket (``envoy.service.secret.v3``), as SPIRE's agent serves it.

The caller is attested as for the Workload API and gets what it would get there; Envoy sends no security header. A stream
is answered again when what was asked for changes, or is asked for otherwise; one whose last identity goes ends with
PERMISSION_DENIED. Every answer has a version of its stream and a nonce; a request with another nonce is stale.
"""

import asyncio
import secrets as randomness
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Iterable
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from typing import Final

import grpc

from broker._proto.envoy.config.core.v3 import base_pb2
from broker._proto.envoy.service.discovery.v3 import discovery_pb2
from broker._proto.google.protobuf import any_pb2
from broker._proto.service import Context
from broker.agent.api.secrets import Held, NoValidatorError, SecretNames, needs_svids, secrets, uses_validator
from broker.agent.cache import Bell, EstateCache
from broker.agent.entitlement import Entitlement
from broker.agent.sessions import WorkloadSession
from broker.agent.svids import SvidKeeper
from broker.agent.workloads import NO_IDENTITY, Caller
from broker.errors import Invalid, NoIdentity, NotFound, Refused, Unavailable
from broker.registry import Entry
from broker.telemetry.log import get_logger

MAX_NAMES: Final = 256  # in one request; Envoy asks for one
MAX_WAITING: Final = 16  # requests of one stream that are not looked at yet; Envoy waits for each answer
NONCE_BYTES: Final = 4
NOT_SERVED: Final = "Method is not implemented"

_log = get_logger("agent.sds")


@dataclass(slots=True)
class _Conversation:
    """One stream: what is asked for, what was sent, and whether it was taken."""

    waiting: deque[discovery_pb2.DiscoveryRequest] = field(default_factory=deque)
    is_over: bool = False
    error: Invalid | None = None
    node: base_pb2.Node = field(default_factory=base_pb2.Node)
    type_url: str = ""
    names: tuple[str, ...] | None = None  # None: nothing has been asked for yet
    sent: tuple[any_pb2.Any, ...] | None = None
    version: int = 0
    nonce: str = ""

    def add(self, request: discovery_pb2.DiscoveryRequest) -> None:
        """Keep a request until it can be answered; raises Invalid where the client does not wait for answers."""
        if len(self.waiting) >= MAX_WAITING:
            raise Invalid("too many requests that wait for no answer", code="too_many_requests")
        self.waiting.append(request)

    def take(self, request: discovery_pb2.DiscoveryRequest) -> bool:
        """Take in a request; gives whether it must be answered though nothing has changed."""
        if self.nonce and request.response_nonce != self.nonce:
            _log.debug("sds_stale_request", reason="its nonce is of an earlier answer")
            return False
        if request.HasField("node"):
            self.node = request.node
        if request.HasField("error_detail") or (self.nonce and request.version_info != str(self.version)):
            # Not sent again: Envoy keeps what it had, and the same would be refused again.
            _log.error("sds_answer_refused", reason=request.error_detail.message[:256], version=self.version)
        before, self.names, self.type_url = self.names, _names(request), request.type_url
        return before is None or set(before) != set(self.names)

    def answer(self, resources: tuple[any_pb2.Any, ...]) -> discovery_pb2.DiscoveryResponse:
        """Write the next answer."""
        if resources != self.sent:
            self.version += 1
        self.sent, self.nonce = resources, randomness.token_hex(NONCE_BYTES)
        return discovery_pb2.DiscoveryResponse(
            version_info=str(self.version), resources=resources, type_url=self.type_url, nonce=self.nonce
        )


class SdsApi:
    """The methods of ``envoy.service.secret.v3.SecretDiscoveryService``."""

    def __init__(self, entitlement: Entitlement, svids: SvidKeeper, cache: EstateCache, names: SecretNames) -> None:
        self._entitlement = entitlement
        self._svids = svids
        self._cache = cache
        self._secret_names = names

    async def StreamSecrets(  # noqa: N802 - the RPC's name
        self, requests: AsyncIterator[discovery_pb2.DiscoveryRequest], context: Context, caller: Caller
    ) -> AsyncIterator[discovery_pb2.DiscoveryResponse]:
        """Answer requests for secrets, and again when they change."""
        session = await self._entitlement.session(caller)
        talk = _Conversation()
        with session.listening(self._cache) as bell:
            reader = asyncio.create_task(_read(requests, talk, bell), name="sds-requests")
            try:
                async with aclosing(self._answers(session, talk, bell)) as answers:
                    async for resources in answers:
                        yield talk.answer(resources)
            except NoValidatorError as error:
                await context.abort(grpc.StatusCode.INTERNAL, error.message)
            finally:
                reader.cancel()
                await asyncio.gather(reader, return_exceptions=True)

    async def FetchSecrets(  # noqa: N802
        self, request: discovery_pb2.DiscoveryRequest, context: Context, caller: Caller
    ) -> discovery_pb2.DiscoveryResponse:
        """Answer once."""
        session, entries = await self._entitlement.of(caller)
        names = _names(request)
        try:
            resources = await self._secrets(session, entries, names, request.node)
        except NoValidatorError as error:
            await context.abort(grpc.StatusCode.INTERNAL, error.message)
        self._entitlement.check(session)
        if self._entitlement.required(session) != entries:
            raise Unavailable("the workload's identities are changing", code="identities_changing")
        return discovery_pb2.DiscoveryResponse(type_url=request.type_url, resources=resources)

    async def DeltaSecrets(  # noqa: N802
        self, requests: AsyncIterator[discovery_pb2.DeltaDiscoveryRequest], context: Context, caller: Caller
    ) -> AsyncIterator[discovery_pb2.DeltaDiscoveryResponse]:
        """Say that the incremental form is not served."""
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, NOT_SERVED)
        yield discovery_pb2.DeltaDiscoveryResponse()

    async def _answers(
        self, session: WorkloadSession, talk: _Conversation, bell: Bell
    ) -> AsyncGenerator[tuple[any_pb2.Any, ...], None]:
        entries = await self._entitlement.first(session, bell)
        while True:
            is_asked = False
            while talk.waiting:
                is_asked |= talk.take(talk.waiting.popleft())
            if talk.error is not None:
                raise talk.error
            if talk.names is not None:
                resources = await self._secrets(session, entries, talk.names, talk.node)
                # Signing took time: the caller may be another program by now, or have lost an entry.
                self._entitlement.check(session)
                if (now := self._entitlement.required(session)) != entries:
                    entries = now
                    continue
                if is_asked or resources != talk.sent:
                    yield resources
            if talk.is_over and not talk.waiting:
                return
            await bell.wait(self._svids.due_in(session, entries))
            self._entitlement.check(session)
            entries = self._entitlement.required(session)

    async def _secrets(
        self, session: WorkloadSession, entries: tuple[Entry, ...], names: Iterable[str], node: base_pb2.Node
    ) -> tuple[any_pb2.Any, ...]:
        own = self._cache.own_bundle
        if own is None:
            raise Unavailable("the agent has no bundle yet", code="not_synced")
        allowed = frozenset[object]().union(*(entry.federates_with for entry in entries))
        # NOTE(security): to Envoy an empty trusted_ca means that it verifies nobody.
        federated = {
            name: bundle for name, bundle in self._cache.bundles.items() if name in allowed and bundle.x509_authorities
        }
        held = Held((), own, federated)
        if needs_svids(names, self._secret_names, held.bundles):
            try:
                identities = await self._svids.x509(session, entries)
            except (Refused, NotFound) as error:
                # The server no longer knows the entry: its withdrawal is on the way here.
                raise NoIdentity(NO_IDENTITY) from error
            pairs = [(one.entry.spiffe_id, one.x509) for one in identities if one.x509 is not None]
            held = Held(pairs, own, federated)
        return secrets(names, held, self._secret_names, with_validator=uses_validator(node, self._secret_names))


async def _read(requests: AsyncIterator[discovery_pb2.DiscoveryRequest], talk: _Conversation, bell: Bell) -> None:
    try:
        async for request in requests:
            talk.add(request)
            bell.ring()
    except Invalid as error:
        talk.error = error
    finally:
        talk.is_over = True
        with suppress(RuntimeError):  # the loop may be closing
            bell.ring()


def _names(request: discovery_pb2.DiscoveryRequest) -> tuple[str, ...]:
    if len(request.resource_names) > MAX_NAMES:
        raise Invalid(f"at most {MAX_NAMES} names", code="too_many_names")
    return tuple(name for name in request.resource_names if name)
