"""Tells the server which workload sessions live, and which have ended: at once, in order, until it has heard.

One request at a time; what happens meanwhile goes with the next. After a reconnection everything current is told again.
Refused callers are told, too, in sum and some seconds later: their number is a stranger's to choose.
"""

import asyncio
from collections import Counter
from collections.abc import Iterable
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


def session_message(identity: Identity) -> sessions_pb2.WorkloadSession:
    """Write an identity that holds a leaf of its own as the server's message."""
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
    )


class SessionReports:
    """What is still to be told. :meth:`run` tells it."""

    def __init__(self, upstream: Upstream) -> None:
        self._upstream = upstream
        self._current: dict[str, sessions_pb2.WorkloadSession] = {}
        self._ended: dict[str, SessionEnd] = {}
        self._refused: Counter[tuple[str, int]] = Counter()
        self._are_refusals_due = False
        self._refusals_timer: asyncio.TimerHandle | None = None
        self._news = asyncio.Event()
        self._telling = asyncio.Lock()

    def leaf(self, identity: Identity) -> None:
        """An identity holds a new leaf."""
        self._current[identity.id] = session_message(identity)
        self._news.set()

    def ended(self, identities: Iterable[Identity], cause: SessionEnd) -> None:
        """These are over."""
        for identity in identities:
            self._current.pop(identity.id, None)
            self._ended[identity.id] = cause
        while len(self._ended) > MAX_ENDED:
            del self._ended[next(iter(self._ended))]
        self._news.set()

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
        return not self._current and not self._ended

    async def run(self) -> None:
        """Tell the server; runs until cancelled."""
        backoff = Backoff()
        while True:
            await self._news.wait()
            self._news.clear()
            while not self.is_settled or self._are_refusals_due:
                try:
                    await self.tell()
                    backoff.reset()
                except NotServed:
                    self._forget()
                except BrokerError as error:
                    _log.warning("sessions_not_reported", code=error.reason, count=len(self._ended))
                    await asyncio.sleep(backoff.next())

    def _forget(self) -> None:
        """Keep nothing for a server that takes no reports."""
        self._current.clear()
        self._ended.clear()
        self._refused.clear()
        self._are_refusals_due = False

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
        ended = list(self._ended)[:MAX_REPORT]
        request = sessions_pb2.ReportSessionsRequest(current=current, ended=ended)
        for session_id in ended:
            request.causes[session_id] = _CAUSES[self._ended[session_id]]
        refused = dict(self._refused) if self._are_refusals_due else {}
        for (code, uid), count in refused.items():
            request.refused.add(code=code, uid=uid, count=count)
        await answered(self._upstream.sessions.ReportSessions(request, timeout=RPC_TIMEOUT))
        for message in current:
            if self._current.get(message.id) is message:
                del self._current[message.id]
        for session_id in ended:
            self._ended.pop(session_id, None)
        if refused:
            self._refused -= Counter(refused)  # in place, it drops what has become 0
            self._are_refusals_due = False
