"""From a connection to an attested session: snapshot at accept, attest at the first call, compare afterwards.

Nothing that a caller sends is looked at. Outward every refusal is the same sentence; the reason stays in its cause.
"""

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final

from broker.agent.answers import Answer, ask, combined
from broker.agent.sessions import Sessions, WorkloadSession
from broker.attestation.contract import AttestorFailed, WorkloadAttestor
from broker.attestation.process import Facts, Process
from broker.errors import BrokerError, NoIdentity, NotAttested, Unavailable
from broker.telemetry.log import get_logger
from broker.transport.peercred import KernelPeer

NO_IDENTITY: Final = "no identity issued"
ATTESTATION_FAILED: Final = "workload attestation failed"
ATTESTATION_FAILED_CODE: Final = "attestation_failed"
ATTEST_TIMEOUT: Final = 10.0  # seconds for all attestors at once; each has its own, shorter one
CLOSE_AFTER: Final = 0.2  # seconds for the refusal to be read before a changed process's connection is closed
MAX_ATTESTATIONS: Final = 64  # at once: a storm of callers waits here, not in threads

_log = get_logger("agent.workloads")


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


class Workloads:
    """Attests callers. Made with the attestors in use.

    ``drop`` closes the connections that a predicate names; it is set by whoever listens.
    """

    def __init__(self, attestors: Sequence[WorkloadAttestor], sessions: Sessions) -> None:
        self._attestors = tuple(attestors)
        self._sessions = sessions
        self.drop: Callable[[Callable[[Caller], bool]], object] = _nothing_to_drop
        self._room = asyncio.Semaphore(MAX_ATTESTATIONS)
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
            self._close_soon(lambda caller: caller.session is session)
            raise NoIdentity(NO_IDENTITY) from error

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
        process.still_same()
        with suppress(NotAttested):
            caller.executable = process.link("exe")
        session = self._sessions.of(process)
        while session is None and (asking := self._asking.get((process.pid, process.facts))) is not None:
            # Another connection of the same process was first: what it hears is heard for all.
            await asyncio.wait([asking])
            if not asking.cancelled():
                caller.answers = asking.result()
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
            selectors = combined(answers)
            # Whatever the attestors looked at was this process only if it still is.
            process.still_same()
            if caller.is_closed:
                return None
            session = self._sessions.start(process, selectors)
            session.answers = answers
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
        async with self._room:
            return await ask(self._attestors, process, ATTEST_TIMEOUT)

    def _close_soon(self, predicate: Callable[[Caller], bool]) -> None:
        # What it is now may be entitled, too: it is attested anew, on a connection that is its own.
        asyncio.get_running_loop().call_later(CLOSE_AFTER, lambda: self.drop(predicate))

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
            self._close_soon(lambda other: other is caller)
        return outward(error)


def outward(error: NotAttested) -> BrokerError:
    """Give what a caller is told of a failed attestation: nothing of the cause."""
    if isinstance(error, AttestorFailed) or error.reason == "process_unreadable":
        return Unavailable(ATTESTATION_FAILED, code=ATTESTATION_FAILED_CODE)
    return NoIdentity(NO_IDENTITY)


def _nothing_to_drop(predicate: Callable[[Caller], bool]) -> None:
    del predicate
