"""``broker.server.v1.Sessions``: what node agents tell of their workload sessions."""

from typing import Final

from broker._proto.broker.server.v1 import sessions_pb2
from broker._proto.service import Context, ServiceBinding
from broker.errors import Invalid
from broker.server.api.access import Caller, agent_of
from broker.server.api.grpc.convert import moment_of
from broker.server.tasks.sessions import AgentRun, Detached, RefusedCallers, ReportedSession
from broker.server.tasks.sessions import Sessions as SessionCases
from broker.spiffe import SpiffeId
from broker.tasks.causes import SessionEnd
from broker.telemetry.log import get_logger

BINDING: Final = ServiceBinding.of(sessions_pb2.DESCRIPTOR, "Sessions")

_CAUSES: Final = {
    sessions_pb2.SESSION_END_PROCESS_EXITED: SessionEnd.PROCESS_EXITED,
    sessions_pb2.SESSION_END_PROCESS_CHANGED: SessionEnd.PROCESS_CHANGED,
    sessions_pb2.SESSION_END_SELECTORS_CHANGED: SessionEnd.SELECTORS_CHANGED,
    sessions_pb2.SESSION_END_ENTRY_GONE: SessionEnd.ENTRY_GONE,
    sessions_pb2.SESSION_END_ATTESTATION_REFUSED: SessionEnd.ATTESTATION_REFUSED,
    sessions_pb2.SESSION_END_ATTESTATION_LAPSED: SessionEnd.ATTESTATION_LAPSED,
    sessions_pb2.SESSION_END_AGENT_STOPPED: SessionEnd.AGENT_STOPPED,
    sessions_pb2.SESSION_END_SVID_REVOKED: SessionEnd.SVID_REVOKED,
}

_OVER: Final = frozenset({"session_ended", "svid_revoked"})

log = get_logger("sessions")


class Sessions:
    """The service, over its use cases."""

    def __init__(self, sessions: SessionCases, agent_lease: float = 0.0) -> None:
        """``agent_lease`` in seconds; 0: no agent is missed."""
        self._sessions = sessions
        self._agent_lease = agent_lease

    async def ReportSessions(  # noqa: N802  # the name on the wire
        self, request: sessions_pb2.ReportSessionsRequest, context: Context, caller: Caller
    ) -> sessions_pb2.ReportSessionsResponse:
        """Take in what lives and what has ended; what hangs on an ended session ends with it."""
        agent = agent_of(caller).id
        causes = {
            # An end is an end, also where a newer agent gives a cause that is not known here.
            session_id: _CAUSES.get(number, SessionEnd.OTHER)
            for session_id, number in request.causes.items()
        }
        refused = [RefusedCallers(one.code, one.uid, one.count) for one in request.refused]
        current = [_reported(one) for one in request.current]
        left_out = await self._sessions.report(
            agent,
            current,
            request.ended,
            causes,
            refused,
            run=AgentRun(request.run, request.is_new_run) if request.run else None,
            detached=[Detached(one.task_id, one.session) for one in request.detached],
        )
        for error in left_out.values():
            log.warning("session_left_out", agent=str(agent), code=error.reason)
        over = [session_id for session_id, error in left_out.items() if error.reason in _OVER]
        return sessions_pb2.ReportSessionsResponse(agent_lease=self._agent_lease, over=over)


def _reported(message: sessions_pb2.WorkloadSession) -> ReportedSession:
    not_after = moment_of(message.not_after)
    if not_after is None:
        raise Invalid("a session's leaf has an end", code="invalid_time")
    return ReportedSession(
        message.id,
        SpiffeId(message.spiffe_id),
        message.entry_id,
        message.x5t,
        not_after,
        message.serial_number,
        message.run,
    )
