"""What node agents tell of their workload sessions: which processes live, which leaf each holds, which are gone.

A session that is gone ends its tasks in the same transaction. An agent speaks only for entries that it may serve, and only of
its own sessions; what it says beyond that is left out and named, so that one stale line does not hold up the others.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from types import MappingProxyType
from typing import Final

from broker.audit.records import Record
from broker.clock import Clock
from broker.errors import BrokerError, Conflict, Invalid, Refused
from broker.server.store.ports import Store, Writer
from broker.server.store.rows import SessionRow
from broker.server.tasks import records
from broker.server.tasks.admission import Vouching
from broker.server.tasks.lifecycle import end_session
from broker.server.tasks.suspension import suspend
from broker.spiffe import SpiffeId
from broker.tasks import Cause, State, Supervision, effective_state
from broker.tasks.causes import SessionEnd
from broker.tasks.texts import SERIAL_NUMBER, THUMBPRINT, check_id

MAX_REPORTED: Final = 10_000
"""Sessions in one report: more than a node has processes with an identity."""
MAX_REFUSED: Final = 64
"""Kinds of refusals in one report, a record each: agents sum them up."""
MAX_DETACHED: Final = 10_000
"""Tasks in one report that their processes have let go of: as many as sessions."""
MAX_UID: Final = 2**32
MAX_COUNT: Final = 2**53  # what a record's number can be
OTHER_CODE: Final = "other"
_CODE: Final = re.compile("[a-z0-9_]{1,64}")
_NO_CAUSES: Final[Mapping[str, SessionEnd]] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class ReportedSession:
    """One living session, in its node agent's words; raises Invalid."""

    id: str
    spiffe_id: SpiffeId
    entry_id: str
    x5t: str
    not_after: datetime
    serial: str = ""
    run: str = ""

    def __post_init__(self) -> None:
        """Check each field."""
        if self.run:
            check_id(self.run, "agent's run")
        check_id(self.id, "workload session id")
        if THUMBPRINT.fullmatch(self.x5t) is None:
            raise Invalid("the thumbprint is not a SHA-256 hash in base64url", code="invalid_thumbprint")
        if SERIAL_NUMBER.fullmatch(self.serial) is None:
            raise Invalid("the serial number is not one in lower hex", code="invalid_serial")


@dataclass(frozen=True, slots=True)
class RefusedCallers:
    """How many callers of one local user were refused at a node agent's socket, and why.

    Refuses nothing: a code that an attestor made up must not hold up the ends of sessions in the same report.
    """

    code: str
    uid: int  # -1: not known
    count: int

    def record(self, node: SpiffeId, at: datetime) -> Record:
        """Write it down, in one row."""
        code = self.code if _CODE.fullmatch(self.code) else OTHER_CODE
        uid = self.uid if 0 <= self.uid < MAX_UID else -1
        return records.workload_refused(node, code, uid, max(1, min(self.count, MAX_COUNT)), at)


@dataclass(frozen=True, slots=True)
class Detached:
    """An attached task that its living process has let go of, by the task's and the workload session's id."""

    task_id: str
    session: str


@dataclass(frozen=True, slots=True)
class AgentRun:
    """One run of a node agent, from its start to its end; raises Invalid. Of what an earlier one attested it knows nothing.

    ``is_new``: nothing of it was heard yet, as far as it knows.
    """

    id: str
    is_new: bool = False

    def __post_init__(self) -> None:
        """Check the id."""
        check_id(self.id, "agent's run")


class Sessions:
    """Takes in the reports of node agents."""

    def __init__(
        self, store: Store, clock: Clock, vouching: Vouching, on_heard: Callable[[SpiffeId], None] = lambda _: None
    ) -> None:
        """``on_heard`` is told of each report of an agent that says its run: it promises to be heard again."""
        self._store = store
        self._on_heard = on_heard
        self._clock = clock
        self._vouching = vouching

    async def report(
        self,
        agent: SpiffeId,
        current: Sequence[ReportedSession],
        ended: Sequence[str],
        causes: Mapping[str, SessionEnd] = _NO_CAUSES,
        refused: Sequence[RefusedCallers] = (),
        *,
        run: AgentRun | None = None,
        detached: Sequence[Detached] = (),
    ) -> dict[str, BrokerError]:
        """Take one report in, wholly or not at all; give the sessions that were left out, each with its reason.

        ``causes``: of those in ``ended``; one that is not named there ended with its process. ``refused``: a record each.
        A new ``run`` ends every session that another one told of. ``detached`` tasks are suspended.

        Raises:
            Invalid: the report is too long.
            Unavailable: nothing of it was kept.
        """
        _check_size(len(current) + len(ended), len(detached), len(refused))
        if run is not None:
            self._on_heard(agent)
        if not (current or ended or refused or detached or (run is not None and run.is_new)):
            # A sign of life and nothing else: no reason to write.
            return {}
        left_out: dict[str, BrokerError] = {}
        spoken_for: list[ReportedSession] = []
        for session in current:
            entry = self._vouching.authorized_entry(agent, session.entry_id)
            if entry is None or entry.spiffe_id != session.spiffe_id:
                left_out[session.id] = Refused(
                    "this node agent may not speak for that entry", code="agent_not_authorized"
                )
            else:
                spoken_for.append(session)

        def act(writer: Writer) -> dict[str, BrokerError]:
            for each in refused:
                writer.record(each.record(agent, self._clock.now()))
            if run is not None and run.is_new:
                self._end_other_runs(writer, agent, run.id)
            left = self._take(writer, agent, spoken_for, ended, causes)
            for one in detached:
                self._detach(writer, agent, one)
            return left

        return left_out | await self._store.write(act)

    def _end_other_runs(self, writer: Writer, agent: SpiffeId, run: str) -> None:
        """End what an earlier run told of: its processes may live, but nobody watches them under these names any more."""
        now = self._clock.now()
        for session in writer.sessions_of_other_runs(agent, run):
            end_session(writer, session.id, agent=agent, now=now, cause=SessionEnd.AGENT_STOPPED)

    def _detach(self, writer: Writer, agent: SpiffeId, detached: Detached) -> None:
        """Suspend a task whose process let go of it. What is not the agent's to say is passed over, as what is over."""
        now = self._clock.now()
        task, session = writer.task(detached.task_id), writer.session(detached.session)
        if task is None or session is None or session.agent != agent or task.session != session.id:
            return
        if task.supervision is Supervision.ATTACHED and effective_state(task, now) is State.ACTIVE:
            suspend(writer, task, Cause.LEASE_LAPSED, by=str(agent), now=now)

    def _take(
        self,
        writer: Writer,
        agent: SpiffeId,
        current: Sequence[ReportedSession],
        ended: Sequence[str],
        causes: Mapping[str, SessionEnd],
    ) -> dict[str, BrokerError]:
        now = self._clock.now()
        left_out: dict[str, BrokerError] = {}
        # Ends first: a report may hold a new session of an entry whose old one is gone.
        for session_id in ended:
            cause = causes.get(session_id, SessionEnd.PROCESS_EXITED)
            end_session(writer, session_id, agent=agent, now=now, cause=cause)
        for session in current:
            known = writer.session(session.id)
            row = SessionRow(
                session.id,
                agent,
                session.spiffe_id,
                session.entry_id,
                session.x5t,
                session.not_after,
                now,
                serial=session.serial,
                run=session.run,
            )
            if row.serial and writer.is_revoked(row.serial):
                left_out[row.id] = Refused("the session's SVID was revoked", code="svid_revoked")
                continue
            try:
                writer.put_session(row)
            except Conflict as error:
                left_out[session.id] = error
                continue
            if known is None:
                writer.record(records.session_started(row))
        return left_out


def _check_size(sessions: int, detached: int, refused: int) -> None:
    if sessions > MAX_REPORTED:
        raise Invalid(f"a report has at most {MAX_REPORTED} sessions", code="too_many_sessions")
    if detached > MAX_DETACHED:
        raise Invalid(f"a report has at most {MAX_DETACHED} detached tasks", code="too_many_detached")
    if refused > MAX_REFUSED:
        raise Invalid(f"a report has at most {MAX_REFUSED} kinds of refusals", code="too_many_refusals")
