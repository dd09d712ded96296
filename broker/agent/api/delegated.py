"""Other workloads' identities for a delegate (``spire.api.agent.delegatedidentity.v1``), on the admin socket.

A delegate is a workload that has been attested and whose SPIFFE ID the operator has named. It names a process, or the
selectors that it vouches for; identities of administrators and of downstream servers are never among the answers. A named
process is attested by us, and its stream ends with it.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Final

from broker._proto.service import Context
from broker._proto.spire.api.agent.delegatedidentity.v1 import delegatedidentity_pb2 as messages
from broker._proto.spire.api.types import jwtsvid_pb2, selector_pb2, spiffeid_pb2, x509svid_pb2
from broker.agent.answers import combined
from broker.agent.api.audiences import checked_audiences
from broker.agent.cache import Bell, EstateCache
from broker.agent.entitlement import Entitlement
from broker.agent.holdings import X509Holding
from broker.agent.sessions import Sessions, WorkloadSession
from broker.agent.svids import SvidKeeper
from broker.agent.workloads import ATTESTATION_FAILED, ATTESTATION_FAILED_CODE, NO_IDENTITY, AdminCaller, Workloads
from broker.attestation.process import Process
from broker.errors import BrokerError, Invalid, NoIdentity, NotAttested, NotFound, Refused, Unavailable
from broker.registry import Entry
from broker.spiffe import Bundle, Selector, SpiffeId
from broker.telemetry.log import get_logger

NOT_A_DELEGATE: Final = "caller not configured as an authorized delegate"
WHICH: Final = "must provide either selectors or non-zero PID, but not both"
UNPARSED: Final = "could not parse provided selectors"
MAX_SELECTORS: Final = 1024  # in one request
ASK_EVERY: Final = 30.0  # seconds between questions to the attestors about a named process

_log = get_logger("agent.delegated")


@dataclass(slots=True, eq=False)
class _Relayed(Bell):
    """Rings another bell."""

    to: Bell | None = None

    def ring(self) -> None:
        """Pass it on."""
        if self.to is not None:
            self.to.ring()


class DelegatedApi:
    """The methods of ``DelegatedIdentity``."""

    def __init__(
        self,
        entitlement: Entitlement,
        workloads: Workloads,
        sessions: Sessions,
        svids: SvidKeeper,
        cache: EstateCache,
        *,
        delegates: Collection[SpiffeId],
    ) -> None:
        """``delegates``: who may ask; none, and nobody may."""
        self._entitlement = entitlement
        self._workloads = workloads
        self._sessions = sessions
        self._svids = svids
        self._cache = cache
        self._delegates = frozenset(delegates)

    # ---- X.509

    async def SubscribeToX509SVIDs(  # noqa: N802 - the RPC's name
        self, request: messages.SubscribeToX509SVIDsRequest, context: Context, caller: AdminCaller
    ) -> AsyncIterator[messages.SubscribeToX509SVIDsResponse]:
        """Stream the SVIDs, with their keys, of a process or of selectors; an empty message where there is none."""
        delegate = await self._delegate(caller)
        with self._listening(delegate) as bell:
            target = await self._target(delegate, request.pid, request.selectors)
            with self._served(target, bell) as session:
                sent: tuple[object, ...] | None = None
                while True:
                    entries = self._entries(session)
                    held = await self._held(session, entries)
                    # Signing took time.
                    self._still(delegate)
                    self._still_there(target)
                    if self._entries(session) != entries:
                        continue
                    federated = self._federated(entries)
                    sending = (tuple(id(one) for _, one in held), federated)
                    if sending != sent:
                        yield messages.SubscribeToX509SVIDsResponse(
                            x509_svids=[_with_key(entry, one) for entry, one in held], federates_with=federated
                        )
                        sent = sending
                    await self._wait(bell, session, entries, target)
                    self._still(delegate)

    async def SubscribeToX509Bundles(  # noqa: N802
        self, request: messages.SubscribeToX509BundlesRequest, context: Context, caller: AdminCaller
    ) -> AsyncIterator[messages.SubscribeToX509BundlesResponse]:
        """Stream every bundle that is known here and has X.509 authorities."""
        async for bundles in self._bundles(caller, self._cache.x509_der):
            readable = {name: der for name, der in bundles.items() if der}
            yield messages.SubscribeToX509BundlesResponse(ca_certificates=readable)

    # ---- JWT

    async def FetchJWTSVIDs(  # noqa: N802
        self, request: messages.FetchJWTSVIDsRequest, context: Context, caller: AdminCaller
    ) -> messages.FetchJWTSVIDsResponse:
        """Give JWT-SVIDs of a process or of selectors."""
        audiences = checked_audiences(request.audience)
        delegate = await self._delegate(caller)
        target = await self._target(delegate, request.pid, request.selectors)
        response = messages.FetchJWTSVIDsResponse()
        with self._served(target, Bell()) as session:
            for entry in self._entries(session):
                try:
                    held = await self._svids.jwt(session, entry, audiences)
                except BrokerError as error:
                    raise Unavailable(f"could not fetch JWT-SVID: {error.message}", code=error.reason) from error
                self._still(delegate)
                self._still_there(target)
                if entry not in self._entries(session):
                    continue
                response.svids.append(
                    jwtsvid_pb2.JWTSVID(
                        token=held.token,
                        id=_id(entry.spiffe_id),
                        expires_at=int(held.expires_at.timestamp()),
                        issued_at=held.issued_at,
                        hint=entry.hint,
                    )
                )
        if not response.svids:
            raise NoIdentity(NO_IDENTITY)
        return response

    async def SubscribeToJWTBundles(  # noqa: N802
        self, request: messages.SubscribeToJWTBundlesRequest, context: Context, caller: AdminCaller
    ) -> AsyncIterator[messages.SubscribeToJWTBundlesResponse]:
        """Stream the JWT authorities of every bundle that is known here, as JWK Sets."""
        async for bundles in self._bundles(caller, self._cache.jwks):
            yield messages.SubscribeToJWTBundlesResponse(bundles=bundles)

    # ---- who asks

    async def _delegate(self, caller: AdminCaller) -> WorkloadSession:
        if caller.workload is None:
            raise NoIdentity(NO_IDENTITY)
        session, entries = await self._entitlement.of(caller.workload)
        self._require(entries)
        return session

    def _still(self, delegate: WorkloadSession) -> None:
        self._entitlement.check(delegate)
        self._require(self._entitlement.required(delegate))

    def _require(self, entries: Sequence[Entry]) -> None:
        if not any(entry.spiffe_id in self._delegates for entry in entries):
            raise Refused(NOT_A_DELEGATE, code="not_a_delegate", hint="name its SPIFFE ID in authorized_delegates")

    @contextmanager
    def _listening(self, delegate: WorkloadSession) -> Iterator[Bell]:
        # Everything that changes may concern the target; what concerns the delegate itself rings its session's bells.
        with self._cache.listening() as bell:
            relayed = _Relayed(to=bell)
            delegate.bells.add(relayed)
            try:
                yield bell
            finally:
                delegate.bells.discard(relayed)

    # ---- for whom

    async def _target(
        self, delegate: WorkloadSession, pid: int, selectors: Sequence[selector_pb2.Selector]
    ) -> "_Target":
        if bool(pid) == bool(selectors):
            raise Invalid(WHICH, code="delegated_for_whom")
        if pid:
            try:
                process = Process.of_pid(pid)
            except (NotAttested, OverflowError, OSError):
                raise Unavailable(ATTESTATION_FAILED, code=ATTESTATION_FAILED_CODE) from None
            try:
                described = combined(await self._workloads.describe(process))
                process.still_same()
            except BrokerError as error:
                process.close()
                _log.warning("delegated_process_not_attested", pid=pid, code=error.reason, reason=error.message)
                raise Unavailable(ATTESTATION_FAILED, code=ATTESTATION_FAILED_CODE) from error
            except BaseException:
                process.close()
                raise
            return _Target(process, described, is_own=True)
        if len(selectors) > MAX_SELECTORS:
            raise Invalid(f"at most {MAX_SELECTORS} selectors", code="too_many_selectors")
        try:
            given = frozenset(Selector.of(one.type, one.value) for one in selectors)
        except Invalid as error:
            raise Invalid(UNPARSED, code=error.reason) from error
        return _Target(delegate.process, given, is_own=False)

    @contextmanager
    def _served(self, target: "_Target", bell: Bell) -> Iterator[WorkloadSession]:
        loop = asyncio.get_running_loop()
        if target.is_own:
            loop.add_reader(target.process.pidfd, _once(loop, target.process.pidfd, bell))
        try:
            with self._sessions.delegated(target.process, target.selectors, are_vouched=not target.is_own) as session:
                yield session
        finally:
            if target.is_own:
                loop.remove_reader(target.process.pidfd)
                target.process.close()

    def _still_there(self, target: "_Target") -> None:
        if not target.is_own:
            return
        try:
            target.process.still_same()
        except NotAttested as error:
            raise NotFound("the process is gone, or is another one now", code=error.reason) from error

    def _entries(self, session: WorkloadSession) -> tuple[Entry, ...]:
        if not self._cache.is_synced:
            raise Unavailable("the agent has not heard from its server", code="not_synced")
        # NOTE(security): who acts for workloads must not act as an operator, or sign for others.
        return tuple(one for one in self._sessions.entries(session) if not one.admin and not one.downstream)

    async def _held(self, session: WorkloadSession, entries: tuple[Entry, ...]) -> list[tuple[Entry, X509Holding]]:
        if not entries:
            return []
        with suppress(Refused, NotFound):  # the server no longer knows the entry: its withdrawal is on the way
            identities = await self._svids.x509(session, entries)
            return [(one.entry, one.x509) for one in identities if one.x509 is not None]
        return []

    async def _wait(self, bell: Bell, session: WorkloadSession, entries: tuple[Entry, ...], target: "_Target") -> None:
        due = self._svids.due_in(session, entries)
        if target.is_own:
            due = ASK_EVERY if due is None else min(due, ASK_EVERY)
        rang = await bell.wait(due)
        self._still_there(target)
        if target.is_own and not rang:
            try:
                selectors = combined(await self._workloads.describe(target.process))
            except BrokerError as error:
                raise NotFound("the process cannot be attested any more", code=error.reason) from error
            if selectors != session.selectors:
                session.selectors, session.matched_version = selectors, -1

    def _federated(self, entries: Sequence[Entry]) -> list[str]:
        named = frozenset[object]().union(*(entry.federates_with for entry in entries))
        return sorted(str(name.id) for name in self._cache.bundles if name in named)

    async def _bundles(self, caller: AdminCaller, form: Callable[[Bundle], bytes]) -> AsyncIterator[dict[str, bytes]]:
        delegate = await self._delegate(caller)
        with self._listening(delegate) as bell:
            sent: dict[str, bytes] | None = None
            while True:
                bundles = {str(name.id): form(bundle) for name, bundle in self._cache.bundles.items()}
                if bundles != sent:
                    yield bundles
                    sent = bundles
                await bell.wait(None)
                self._still(delegate)


@dataclass(frozen=True, slots=True)
class _Target:
    """For whom: a process that we hold ourselves, or selectors for which the delegate stands."""

    process: Process
    selectors: frozenset[Selector]
    is_own: bool


def _once(loop: asyncio.AbstractEventLoop, pidfd: int, bell: Bell) -> Callable[[], None]:
    def gone() -> None:
        # It stays readable: looked at once is enough.
        loop.remove_reader(pidfd)
        bell.ring()

    return gone


def _with_key(entry: Entry, held: X509Holding) -> messages.X509SVIDWithKey:
    svid = x509svid_pb2.X509SVID(
        cert_chain=held.chain,
        id=_id(entry.spiffe_id),
        expires_at=int(held.svid.not_after.timestamp()),
        hint=entry.hint,
    )
    return messages.X509SVIDWithKey(x509_svid=svid, x509_svid_key=held.key_der)


def _id(spiffe_id: SpiffeId) -> spiffeid_pb2.SPIFFEID:
    return spiffeid_pb2.SPIFFEID(trust_domain=str(spiffe_id.trust_domain), path=spiffe_id.path)
