"""``broker.agent.v1.Admin``: the operator's questions, asked on the admin socket. Answers only; nothing is changed.

Turns explanations and sessions into messages. Who may ask is the listener's to say.
"""

from typing import Final

from broker._proto.broker.agent.v1 import admin_pb2
from broker._proto.service import Context
from broker.agent.denials import Denials
from broker.agent.explain import Explainer, Explanation, ProcessShown
from broker.agent.sessions import Identity, Sessions, WorkloadSession
from broker.agent.workloads import AdminCaller
from broker.errors import Invalid, NotFound
from broker.spiffe import Selector
from broker.telemetry.log import get_logger

MAX_SELECTORS: Final = 1024  # in one question
MAX_PID: Final = 2**31 - 1  # pid_t

_log = get_logger("agent.admin")


class AdminApi:
    """The methods of ``broker.agent.v1.Admin``; a caller is an operator whom the admin socket has admitted."""

    def __init__(self, explainer: Explainer, denials: Denials, sessions: Sessions) -> None:
        self._explainer = explainer
        self._denials = denials
        self._sessions = sessions

    async def ExplainIdentity(  # noqa: N802 - the RPC's name
        self, request: admin_pb2.ExplainIdentityRequest, context: Context, caller: AdminCaller
    ) -> admin_pb2.Explanation:
        """Say why a process, a set of selectors or an entry gets what it gets."""
        if bool(request.pid) == bool(request.selectors) and (request.pid or not request.entry_id):
            raise Invalid("name a pid, or selectors, or an entry", code="explain_what")
        if len(request.selectors) > MAX_SELECTORS:
            raise Invalid(f"at most {MAX_SELECTORS} selectors", code="too_many_selectors")
        if request.pid:
            _log.info("explained", pid=request.pid, uid=caller.uid)
            return _explanation(await self._explainer.process(_pid(request.pid), request.entry_id))
        if request.selectors:
            return _explanation(self._explainer.selectors(map(Selector, request.selectors), request.entry_id))
        return _explanation(self._explainer.entry(request.entry_id))

    async def ExplainDenial(  # noqa: N802
        self, request: admin_pb2.ExplainDenialRequest, context: Context, caller: AdminCaller
    ) -> admin_pb2.Denial:
        """Say why a caller was refused, by the id that it was told."""
        found = self._denials.find(request.id)
        return admin_pb2.Denial(
            id=found.id,
            at=int(found.at.timestamp()),
            method=found.method,
            explanation=_explanation(found.explanation),
            is_late=found.is_late,
        )

    async def FindSessions(  # noqa: N802
        self, request: admin_pb2.FindSessionsRequest, context: Context, caller: AdminCaller
    ) -> admin_pb2.FindSessionsResponse:
        """Give the live sessions of a process; raises NotFound where there is none."""
        pid = _pid(request.pid)
        found = [session for session in self._sessions if session.process.pid == pid and not session.is_ended]
        if not found:
            raise NotFound(
                f"process {pid} has no session here",
                code="session_not_found",
                hint=f"broker explain identity --pid {pid} says what it would get",
            )
        return admin_pb2.FindSessionsResponse(sessions=[self._session(session) for session in found])

    def _session(self, session: WorkloadSession) -> admin_pb2.Session:
        # What it lost a moment ago is not to be shown.
        self._sessions.entries(session)
        selectors, strengths = self._explainer.shown(session.selectors)
        return admin_pb2.Session(
            process=_process(self._explainer.live(session)),
            selectors=selectors,
            strengths=strengths,
            connections=session.connections,
            identities=[_identity(session, identity) for identity in session.identities.values()],
        )


def _pid(number: int) -> int:
    if not 0 < number <= MAX_PID:
        raise Invalid(f"{number} is not a process id", code="bad_pid")
    return number


def _identity(session: WorkloadSession, identity: Identity) -> admin_pb2.Identity:
    held = identity.x509
    return admin_pb2.Identity(
        session_id=identity.id,
        spiffe_id=str(identity.entry.spiffe_id),
        entry_id=identity.entry.id,
        x509_not_after=int(held.svid.not_after.timestamp()) if held is not None else 0,
        is_shared=held is not None and held.shared,
        jwt_svids=sum(entry_id == identity.entry.id for entry_id, _ in session.jwts),
    )


def _process(shown: ProcessShown) -> admin_pb2.Process:
    return admin_pb2.Process(
        pid=shown.pid,
        uid=shown.uid,
        gid=shown.gid,
        executable=_text(shown.executable),
        started_at=int(shown.started_at.timestamp()) if shown.started_at is not None else 0,
        is_held=shown.is_held,
    )


def _explanation(explained: Explanation) -> admin_pb2.Explanation:
    return admin_pb2.Explanation(
        process=_process(explained.process) if explained.process is not None else None,
        attestors=[
            admin_pb2.Attestor(
                name=row.name,
                state=row.state,
                code=row.code,
                selectors=row.selectors,
                reason=_text(row.reason),
                hint=_text(row.hint),
            )
            for row in explained.attestors
        ],
        selectors=explained.selectors,
        is_matched=explained.is_matched,
        considered=explained.considered,
        entries=[
            admin_pb2.Entry(id=one.entry_id, spiffe_id=one.spiffe_id, code=one.code, lacks=one.lacks, note=one.note)
            for one in explained.entries
        ],
        strengths=dict(explained.strengths),
        code=explained.code,
        message=_text(explained.message),
        status=explained.status,
        most_likely=_text(explained.most_likely),
    )


def _text(text: str) -> str:
    # A file's name need not be Unicode; protobuf's strings must be.
    return text.encode("utf-8", "backslashreplace").decode()
