"""Calls to the server on a local caller's behalf: with the identity that its attestation gave it, and its process looked at.

No request carries an identity. The agent vouches for the attested session by naming its id and the leaf it holds; a session that
shares a spare SVID is not vouched for. What the server answers, errors included, is passed on.
"""

from collections.abc import Callable
from typing import Any

from broker._proto.broker.server.v1 import sessions_pb2
from broker._proto.service import Context
from broker.agent.entitlement import Entitlement
from broker.agent.reports import SessionReports, session_message
from broker.agent.sessions import WorkloadSession
from broker.agent.svids import SvidKeeper
from broker.agent.upstream import RPC_TIMEOUT, Upstream, answered
from broker.agent.workloads import NO_IDENTITY, Caller
from broker.errors import Invalid, InvalidSpiffeId, NoIdentity, Refused, Unavailable
from broker.spiffe import SpiffeId


class OnBehalf:
    """What the services that ask the server for local callers have in common."""

    def __init__(
        self,
        entitlement: Entitlement,
        svids: SvidKeeper,
        upstream: Upstream,
        *,
        reports: SessionReports,
        on_over: Callable[[frozenset[str]], None],
    ) -> None:
        """``on_over`` is told of a living session that the server takes for ended."""
        self._entitlement = entitlement
        self._svids = svids
        self._upstream = upstream
        self._reports = reports
        self._on_over = on_over

    async def _workload(self, caller: Caller, wanted: str) -> sessions_pb2.WorkloadSession:
        session, workload = await self._named(caller, wanted)
        self._entitlement.check(session)
        return workload

    async def _named(self, caller: Caller, wanted: str) -> tuple[WorkloadSession, sessions_pb2.WorkloadSession]:
        """Give the caller's session, and how the server is told of it; whoever tells it looks at the process then."""
        session, entries = await self._entitlement.of(caller)
        try:
            spiffe_id = SpiffeId(wanted) if wanted else entries[0].spiffe_id
        except InvalidSpiffeId as error:
            raise Invalid(f"invalid requested SPIFFE ID: {error.message}", code=error.reason) from None
        chosen = [entry for entry in entries if entry.spiffe_id == spiffe_id][:1]
        if not chosen:
            raise NoIdentity(NO_IDENTITY)
        (identity,) = await self._svids.x509(session, chosen)
        if identity.x509 is None or identity.x509.shared:
            raise Unavailable("this process has no SVID of its own while the server is away", code="svid_shared")
        return session, session_message(identity, self._reports.run_id)

    async def _forward(self, call: Callable[..., Any], request: Any, context: Context, caller: Caller) -> Any:
        try:
            answer = await answered(call(request, timeout=time_left(context)))
        except Refused as error:
            self._take_note(error, request.workload)
            raise
        # The answer may hold a token: only the process that asked may have it.
        await self._entitlement.check_caller(caller)
        return answer

    def _take_note(self, error: Refused, workload: sessions_pb2.WorkloadSession) -> None:
        if error.reason == "session_ended":
            # Ended from the other side: the process lives, and is another session from now on.
            self._on_over(frozenset({workload.id}))


def time_left(context: Context) -> float:
    """Give the seconds that a call still has, and no more than one to the server may take."""
    left = context.time_remaining()  # None: no deadline, whatever grpcio's stubs say
    return min(left or RPC_TIMEOUT, RPC_TIMEOUT)
