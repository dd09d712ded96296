"""From a connection to an attested session: snapshot at accept, attest at the first call, compare afterwards.

A process that is not what it was loses its session and its connections, and is attested anew when it comes back. One that
is only described otherwise (a label was changed) keeps them, and loses or gains entries: the attestors are asked again.
Nothing that a caller sends is looked at. Outward every refusal is the same sentence; the reason stays in its cause.
"""

import asyncio
import random
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final

from broker.agent.answers import Answer, ask, asked_again, combined
from broker.agent.room import SharedRoom
from broker.agent.sessions import Sessions, WorkloadSession
from broker.attestation.contract import AttestorFailed, AttestorUnavailable, WorkloadAttestor
from broker.attestation.process import Facts, Process
from broker.clock import Clock
from broker.errors import BrokerError, NoIdentity, NotAttested, Unavailable
from broker.tasks.causes import SessionEnd
from broker.telemetry.log import get_logger
from broker.transport.peercred import KernelPeer

NO_IDENTITY: Final = "no identity issued"
ATTESTATION_FAILED: Final = "workload attestation failed"
ATTESTATION_FAILED_CODE: Final = "attestation_failed"
ATTEST_TIMEOUT: Final = 10.0  # seconds for all attestors at once; each has its own, shorter one
CLOSE_AFTER: Final = 0.2  # seconds for the refusal to be read before a changed process's connection is closed
CLOSE_TOGETHER: Final = 0.05  # seconds in which those that are to be closed are gathered
MAX_ATTESTATIONS: Final = 64  # at once: a storm of callers waits here, not in threads
MAX_OF_ONE_USER: Final = 16  # of them: callers whose files take long to read hold up their own user's, and nobody else

_log = get_logger("agent.workloads")


@dataclass(frozen=True, slots=True)
class Freshness:
    """For how long answers of attestors hold, in seconds."""

    ask_every: float = 30.0
    bridge: float = 300.0  # for so long a last answer holds whose attestor learns nothing: a runtime's restart

    def next_ask(self, now: float) -> float:
        """Give the time of the next question, 10 % earlier or later: those who came together are asked apart."""
        return now + self.ask_every * random.uniform(0.9, 1.1)  # noqa: S311 - spreads load, hides nothing


@dataclass(slots=True, eq=False)
class Caller:
    """What is behind one connection: a process, and its session once it has been attested."""

    process: Process
    session: WorkloadSession | None = None
    is_closed: bool = False
    is_released: bool = False
    attesting: asyncio.Lock = field(default_factory=asyncio.Lock)
    answers: tuple[Answer, ...] = ()  # of the attestors, for who must explain a refusal
    executable: str = ""  # its name as the kernel shows it: for people, proves nothing


@dataclass(frozen=True, slots=True, eq=False)
class AdminCaller:
    """Who is behind a connection to the admin socket; ``workload`` None where its process could not be looked at."""

    uid: int
    workload: Caller | None = None


class Workloads:
    """Attests callers. Made with the attestors in use.

    ``drop`` closes the connections that a predicate names; it is set by whoever listens.
    """

    def __init__(
        self,
        attestors: Sequence[WorkloadAttestor],
        sessions: Sessions,
        clock: Clock,
        freshness: Freshness = Freshness(),
    ) -> None:
        self._attestors = tuple(attestors)
        self._sessions = sessions
        self._clock = clock
        self._freshness = freshness
        self._closing: set[Caller | WorkloadSession] = set()
        self.drop: Callable[[Callable[[Caller], bool]], object] = _nothing_to_drop
        self._room = SharedRoom(MAX_ATTESTATIONS, MAX_OF_ONE_USER)
        self._asking: dict[tuple[int, Facts], asyncio.Future[tuple[Answer, ...]]] = {}

    def admit(self, peer: KernelPeer) -> Caller:
        """Snapshot the process at accept; raises NotAttested. Does not block."""
        return Caller(Process.open(pid=peer.pid, uid=peer.uid, gid=peer.gid, pidfd=peer.pidfd))

    def closed(self, caller: Caller) -> None:
        """The connection is gone."""
        caller.is_closed = True
        if not caller.attesting.locked():
            self._let_go(caller)

    async def session_of(self, caller: Caller) -> WorkloadSession:
        """Give the session behind a connection, attesting it at its first call, and check that it still holds.

        Raises NoIdentity, in the same words whatever the cause, or Unavailable where attestation itself failed.
        """
        try:
            session = caller.session
            if session is None:
                session = await self._attested(caller)
            self._sessions.check(session)
        except NotAttested as error:
            raise self._outward(caller, error) from error
        return session

    def check(self, session: WorkloadSession) -> None:
        """Check fully, as before every message of a stream; raises NoIdentity."""
        try:
            self._sessions.check(session, fully=True)
        except NotAttested as error:
            self._close_soon(session)
            raise NoIdentity(NO_IDENTITY) from error

    def look(self, session: WorkloadSession, *, fully: bool) -> None:
        """Look whether the process still is what was attested, without anybody asking; one that is not loses all."""
        try:
            self._sessions.check(session, fully=fully)
        except NotAttested:
            self._close_soon(session)

    def is_due(self, session: WorkloadSession, now: float) -> bool:
        """Say whether what the attestors said of a session is too old for a new connection; ``now`` is monotonic."""
        return not session.is_ended and now >= session.ask_at

    async def attest_again(self, session: WorkloadSession) -> None:
        """Ask the attestors again, if it is time, and withdraw what no longer holds. Its outcome is in the session."""
        async with session.asking:
            if not self.is_due(session, self._clock.monotonic()):
                return
            try:
                self._take(session, await self.describe(session.process))
            finally:
                if session.is_ended:
                    session.process.close()

    def _take(self, session: WorkloadSession, told: tuple[Answer, ...]) -> None:
        # Whatever the attestors looked at was this process only if it still is.
        self.look(session, fully=True)
        if session.is_ended:
            return
        now = self._clock.monotonic()
        session.ask_at = self._freshness.next_ask(now)
        may_bridge = now - session.vouched_at < self._freshness.bridge
        try:
            answers = asked_again(session.answers, told, may_bridge=may_bridge)
        except BrokerError as error:
            is_lapsed = isinstance(error, AttestorUnavailable)
            _log.warning(
                "workload_not_attested_again", pid=session.process.pid, code=error.reason, reason=error.message
            )
            self._sessions.end(session, SessionEnd.ATTESTATION_LAPSED if is_lapsed else SessionEnd.ATTESTATION_REFUSED)
            self._close_soon(session)
            return
        if not any(answer.error for answer in told):
            session.vouched_at = now
        self._sessions.describe(session, combined(answers), answers)

    async def _attested(self, caller: Caller) -> WorkloadSession:
        async with caller.attesting:
            try:
                if caller.session is None and not caller.is_closed:
                    await self._attest(caller)
            finally:
                if caller.is_closed:
                    self._let_go(caller)
            if caller.session is None or caller.is_closed:
                raise NotAttested("the connection is closed", code="connection_closed")
            return caller.session

    async def _attest(self, caller: Caller) -> None:
        process = caller.process
        with suppress(NotAttested):
            caller.executable = process.link("exe")
        session = self._sessions.of(process)
        if session is not None and self.is_due(session, self._clock.monotonic()):
            await self.attest_again(session)
            session = self._sessions.of(process)
        while session is None and (asking := self._asking.get((process.pid, process.facts))) is not None:
            # Another connection of the same process was first: what it hears is heard for all.
            await asyncio.wait([asking])
            if not asking.cancelled():
                caller.answers = asking.result()
                process.still_same()
                combined(caller.answers)
            session = self._sessions.of(process)
        if session is None:
            session = await self._started(caller)
        if session is None or caller.is_closed:
            return
        if session.process is not process:
            process.close()
        session.connections += 1
        caller.session = session
        caller.answers = session.answers

    async def _started(self, caller: Caller) -> WorkloadSession | None:
        """Ask the attestors and begin the session; ``None``: the connection was closed meanwhile."""
        process = caller.process
        asked = (process.pid, process.facts)
        asking = self._asking[asked] = asyncio.get_running_loop().create_future()
        answers: tuple[Answer, ...] = ()
        try:
            caller.answers = answers = await self.describe(process)
            # Whatever the attestors looked at, and failed at, was this process only if it still is.
            process.still_same()
            selectors = combined(answers)
            if caller.is_closed:
                return None
            session = self._sessions.start(process, selectors)
            session.answers = answers
            session.vouched_at = self._clock.monotonic()
            session.ask_at = self._freshness.next_ask(session.vouched_at)
        finally:
            del self._asking[asked]
            if answers:
                asking.set_result(answers)
            else:
                asking.cancel()  # the next connection asks for itself
        _log.debug("workload_attested", pid=process.pid, uid=process.uid, count=len(selectors))
        return session

    async def describe(self, process: Process) -> tuple[Answer, ...]:
        """Ask the attestors of a process that need not be a caller, as a caller would be asked about."""
        async with self._room.place(process.uid):
            return await ask(self._attestors, process, ATTEST_TIMEOUT)

    def _close_soon(self, gone: Caller | WorkloadSession) -> None:
        # What it is now may be entitled, too: it is attested anew, on a connection that is its own. Closed together: each
        # drop looks at every connection, and thousands may change at once.
        if not self._closing:
            asyncio.get_running_loop().call_later(CLOSE_TOGETHER, self._close_together)
        self._closing.add(gone)

    def _close_together(self) -> None:
        closing, self._closing = self._closing, set()
        asyncio.get_running_loop().call_later(
            CLOSE_AFTER, lambda: self.drop(lambda caller: caller in closing or caller.session in closing)
        )

    def _let_go(self, caller: Caller) -> None:
        if caller.is_released:
            return
        caller.is_released = True
        if caller.session is None:
            caller.process.close()
        else:
            self._sessions.release(caller.session)

    def _outward(self, caller: Caller, error: NotAttested) -> BrokerError:
        if error.reason in {"process_changed", "session_ended"}:
            self._close_soon(caller.session or caller)
        return outward(error)


def outward(error: NotAttested) -> BrokerError:
    """Give what a caller is told of a failed attestation: nothing of the cause."""
    if isinstance(error, AttestorFailed) or error.reason == "process_unreadable":
        return Unavailable(ATTESTATION_FAILED, code=ATTESTATION_FAILED_CODE)
    return NoIdentity(NO_IDENTITY)


def _nothing_to_drop(predicate: Callable[[Caller], bool]) -> None:
    del predicate
