"""Tells the server which workload sessions live, and which have ended: at once, in order, until it has heard.

One request at a time; what happens meanwhile goes with the next. After a reconnection everything current is told again.
Refused callers are told, too, in sum and some seconds later: their number is a stranger's to choose. Where nothing happens a
report is sent all the same, often enough: an agent that is silent is taken for lost, and its workloads' tasks are stopped.
"""

import asyncio
import itertools
import secrets
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Final

from broker._proto.broker.server.v1 import sessions_pb2
from broker.agent.backoff import Backoff
from broker.agent.sessions import Identity
from broker.agent.upstream import RPC_TIMEOUT, Upstream, answered
from broker.errors import BrokerError
from broker.tasks.causes import SessionEnd
from broker.telemetry.log import get_logger
from broker.transport.rpc_errors import NotServed

MAX_REPORT: Final = 2000  # sessions in one request: some 300 bytes each, far below gRPC's 4 MiB
MAX_ENDED: Final = 100_000  # untold ends kept while the server is away; above that it learns by expiry

REFUSALS_EVERY: Final = 10.0  # seconds in which refusals are summed up
LEAF_PAUSE: Final = 0.003  # seconds before a new leaf is told of: its process has it first
BEAT: Final = 10.0  # seconds between two reports, until the server has said how soon an agent is missed
BEATS_IN_LEASE: Final = 3  # reports in the time after which the server takes the agent for lost
BEAT_SHORTEST: Final = 0.3
RUN_BYTES: Final = 16
MAX_DETACHED: Final = 10_000  # untold tasks that were let go of; above that the server learns by their deadlines
MAX_REFUSED: Final = 64  # kinds, by reason and user, in one report: a record each in the server's log
OTHERS: Final = ("other", -1)  # the kind of those above that

_CAUSES: Final = {
    SessionEnd.PROCESS_EXITED: sessions_pb2.SESSION_END_PROCESS_EXITED,
    SessionEnd.PROCESS_CHANGED: sessions_pb2.SESSION_END_PROCESS_CHANGED,
    SessionEnd.SELECTORS_CHANGED: sessions_pb2.SESSION_END_SELECTORS_CHANGED,
    SessionEnd.ENTRY_GONE: sessions_pb2.SESSION_END_ENTRY_GONE,
    SessionEnd.ATTESTATION_REFUSED: sessions_pb2.SESSION_END_ATTESTATION_REFUSED,
    SessionEnd.ATTESTATION_LAPSED: sessions_pb2.SESSION_END_ATTESTATION_LAPSED,
    SessionEnd.AGENT_STOPPED: sessions_pb2.SESSION_END_AGENT_STOPPED,
    SessionEnd.SVID_REVOKED: sessions_pb2.SESSION_END_SVID_REVOKED,
}

_log = get_logger("agent.reports")


def session_message(identity: Identity, run: str = "") -> sessions_pb2.WorkloadSession:
    """Write an identity that holds a leaf of its own as the server's message; ``run`` is the agent's."""
    held = identity.x509
    if held is None or held.shared:
        raise ValueError("only an identity with a leaf of its own is reported")
    return sessions_pb2.WorkloadSession(
        id=identity.id,
        spiffe_id=str(identity.entry.spiffe_id),
        entry_id=identity.entry.id,
        x5t=held.svid.x5t,
        not_after=int(held.svid.not_after.timestamp()),
        serial_number=f"{held.svid.serial:x}",
        run=run,
    )


class SessionReports:
    """What is still to be told. :meth:`run` tells it."""

    def __init__(self, upstream: Upstream, on_over: Callable[[frozenset[str]], None] = lambda _: None) -> None:
        """``on_over`` is told of living sessions that the server takes for ended, by their ids."""
        self._upstream = upstream
        self._on_over = on_over
        self.run_id = f"run_{secrets.token_urlsafe(RUN_BYTES)}"
        """Of this run of the agent: what another one told of is not known here."""
        self._is_new_run = True
        self._is_beat_due = True
        self._every = BEAT
        self._detached: dict[str, str] = {}
        self._current: dict[str, sessions_pb2.WorkloadSession] = {}
        self._ended: dict[str, SessionEnd] = {}
        self._refused: Counter[tuple[str, int]] = Counter()
        self._are_refusals_due = False
        self._refusals_timer: asyncio.TimerHandle | None = None
        self._leaves_timer: asyncio.TimerHandle | None = None
        self._news = asyncio.Event()
        self._telling = asyncio.Lock()
        self._news.set()

    def leaf(self, identity: Identity) -> None:
        """An identity holds a new leaf."""
        self._current[identity.id] = session_message(identity, self.run_id)
        if self._leaves_timer is None:
            self._leaves_timer = asyncio.get_running_loop().call_later(LEAF_PAUSE, self._leaves_are_due)

    def _leaves_are_due(self) -> None:
        self._leaves_timer = None
        self._news.set()

    def ended(self, identities: Iterable[Identity], cause: SessionEnd) -> None:
        """These are over."""
        for identity in identities:
            self._current.pop(identity.id, None)
            self._ended[identity.id] = cause
        while len(self._ended) > MAX_ENDED:
            del self._ended[next(iter(self._ended))]
        self._news.set()

    def detached(self, task_id: str, session_id: str) -> None:
        """A process that lives has let go of its attached task."""
        self._detached[task_id] = session_id
        while len(self._detached) > MAX_DETACHED:
            del self._detached[next(iter(self._detached))]
        self._news.set()

    def is_letting_go(self, task_id: str) -> bool:
        """Whether the server has still to hear that a task was let go of."""
        return task_id in self._detached

    def again(self, identities: Iterable[Identity]) -> None:
        """Tell all of these anew: the server may be another one."""
        for identity in identities:
            if identity.x509 is not None and not identity.x509.shared:
                self.leaf(identity)

    def refused(self, code: str, uid: int) -> None:
        """A caller was refused; ``uid`` -1: of a user that is not known."""
        kind = (code, uid)
        if kind not in self._refused and len(self._refused) >= MAX_REFUSED - 1:
            kind = OTHERS
        self._refused[kind] += 1
        if self._refusals_timer is None:
            self._refusals_timer = asyncio.get_running_loop().call_later(REFUSALS_EVERY, self._refusals_are_due)

    def _refusals_are_due(self) -> None:
        self._refusals_timer = None
        self._are_refusals_due = True
        self._news.set()

    @property
    def is_settled(self) -> bool:
        """Whether the server has heard everything that is to be told at once."""
        return not self._current and not self._ended and not self._detached

    async def run(self) -> None:
        """Tell the server; runs until cancelled."""
        backoff = Backoff()
        while True:
            try:
                async with asyncio.timeout(self._every):
                    await self._news.wait()
            except TimeoutError:
                self._is_beat_due = True
            self._news.clear()
            while not self.is_settled or self._are_refusals_due or self._is_beat_due:
                try:
                    await self.tell()
                    backoff.reset()
                except NotServed:
                    self._forget()
                except BrokerError as error:
                    # Of a mere sign of life that was not heard there is nothing to say: that the server is away, others do.
                    log = _log.debug if self.is_settled else _log.warning
                    log("sessions_not_reported", code=error.reason, count=len(self._ended))
                    await self._upstream.pause(backoff.next())

    def _forget(self) -> None:
        """Keep nothing for a server that takes no reports."""
        self._current.clear()
        self._ended.clear()
        self._detached.clear()
        self._refused.clear()
        self._are_refusals_due = self._is_beat_due = False

    async def tell(self) -> None:
        """Tell one request's worth; what was not heard is kept. Raises BrokerError."""
        async with self._telling:
            await self._tell()

    async def settle(self, session_id: str) -> None:
        """Return when the server has heard what is known of one session; raises BrokerError."""
        async with self._telling:
            while session_id in self._current:
                await self._tell()

    async def _tell(self) -> None:
        current = list(self._current.values())[:MAX_REPORT]
        ended = {session_id: self._ended[session_id] for session_id in itertools.islice(self._ended, MAX_REPORT)}
        detached = dict(itertools.islice(self._detached.items(), MAX_REPORT))
        refused = dict(self._refused) if self._are_refusals_due else {}
        request = sessions_pb2.ReportSessionsRequest(
            current=current,
            ended=ended,
            causes={session_id: _CAUSES[cause] for session_id, cause in ended.items()},
            refused=[
                sessions_pb2.RefusedCallers(code=code, uid=uid, count=count) for (code, uid), count in refused.items()
            ],
            run=self.run_id,
            is_new_run=self._is_new_run,
            detached=[sessions_pb2.DetachedTask(task_id=task, session=session) for task, session in detached.items()],
        )
        answer = await answered(self._upstream.sessions.ReportSessions(request, timeout=RPC_TIMEOUT))
        for message in current:
            if self._current.get(message.id) is message:
                del self._current[message.id]
        for session_id in ended:
            self._ended.pop(session_id, None)
        for task_id in detached:
            self._detached.pop(task_id, None)
        if refused:
            self._refused -= Counter(refused)  # in place, it drops what has become 0
            self._are_refusals_due = False
        self._answered(answer)

    def _answered(self, answer: sessions_pb2.ReportSessionsResponse) -> None:
        self._is_new_run = self._is_beat_due = False
        if answer.agent_lease > 0:
            self._every = max(answer.agent_lease / BEATS_IN_LEASE, BEAT_SHORTEST)
        if answer.over:
            self._on_over(frozenset(answer.over))
