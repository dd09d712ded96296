"""Workload sessions: one attested process instance each, from its attestation to its end.

A session is shared by the connections of its process. It ends when the process exits, or is no longer the program that
was attested; then everything held for it is dropped and the server is told at once, with the cause. A process that is only
described otherwise keeps its session and loses what it no longer earns. Session ids are per identity of the process: 128
random bits, never used twice. Knows no attestors and no wire.
"""

import asyncio
import secrets
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

from broker.agent.answers import Answer
from broker.agent.cache import Bell, EstateCache
from broker.agent.holdings import JwtHolding, X509Holding
from broker.attestation.process import Process
from broker.clock import Clock
from broker.errors import NotAttested
from broker.registry import Entry
from broker.spiffe import Selector
from broker.tasks.causes import SessionEnd
from broker.telemetry.log import get_logger

FULL_CHECK_EVERY: Final = 1.0  # seconds; between full checks only exit, executable and effective ids are looked at
ID_BYTES: Final = 16
MAX_JWTS: Final = 64  # per session; each is about 1 KiB
_ORDINARY: Final = frozenset({SessionEnd.PROCESS_EXITED, SessionEnd.ENTRY_GONE, SessionEnd.AGENT_STOPPED})

_log = get_logger("agent.sessions")


@dataclass(slots=True, eq=False)
class Identity:
    """One SPIFFE ID of one session, under its own session id."""

    id: str
    entry: Entry
    x509: X509Holding | None = None
    retry_at: float = 0.0  # monotonic: after a failed rotation, not before then
    failures: int = 0  # to rotate it, one after the other
    is_late: bool = False  # signing takes longer than its streams wait for it: they hear of its end


@dataclass(slots=True, eq=False)
class WorkloadSession:
    """One attested process instance and what is held for it."""

    process: Process
    selectors: frozenset[Selector]
    checked_at: float
    identities: dict[str, Identity] = field(default_factory=dict)  # by entry id
    jwts: "OrderedDict[tuple[str, tuple[str, ...]], JwtHolding]" = field(default_factory=OrderedDict)
    pending: dict[object, "asyncio.Task[Any]"] = field(default_factory=dict)  # signing under way
    connections: int = 0
    is_ended: bool = False
    has_exited: bool = False  # its process: nobody hears an answer any more
    are_vouched: bool = False  # a delegate stands for the selectors
    matched_version: int = -1
    matched: tuple[Entry, ...] = ()
    bells: set[Bell] = field(default_factory=set)
    answers: tuple[Answer, ...] = ()  # of the attestors, for explanations and for who asks them again
    vouched_at: float = 0.0  # monotonic: when all attestors had answered for it last
    ask_at: float = 0.0  # monotonic: from then on what was answered is too old for a new connection
    asking: asyncio.Lock = field(default_factory=asyncio.Lock)

    @contextmanager
    def listening(self, cache: EstateCache) -> Iterator[Bell]:
        """Listen to what concerns this session: the cache, and its own end."""
        with cache.listening(self.selectors) as bell:
            self.bells.add(bell)
            try:
                yield bell
            finally:
                self.bells.discard(bell)

    def identity(self, entry: Entry) -> Identity:
        """Give the identity that this session has by an entry, new or known."""
        identity = self.identities.get(entry.id)
        if identity is None or identity.entry.spiffe_id != entry.spiffe_id:
            identity = self.identities[entry.id] = Identity(f"ws_{secrets.token_urlsafe(ID_BYTES)}", entry)
        identity.entry = entry
        return identity

    def remember(self, key: tuple[str, tuple[str, ...]], jwt: JwtHolding) -> None:
        """Keep a JWT-SVID; the one unused for longest makes room."""
        self.jwts[key] = jwt
        self.jwts.move_to_end(key)
        while len(self.jwts) > MAX_JWTS:
            self.jwts.popitem(last=False)


class Sessions:
    """Every living session, by process."""

    def __init__(
        self,
        cache: EstateCache,
        clock: Clock,
        *,
        on_identities_ended: Callable[[list[Identity], SessionEnd], None],
    ) -> None:
        """``on_identities_ended`` is called when a session ends or loses an identity, with those that had a leaf."""
        self._cache = cache
        self._clock = clock
        self._on_identities_ended = on_identities_ended
        self._by_process: dict[tuple[int, int], WorkloadSession] = {}

    def __len__(self) -> int:
        return len(self._by_process)

    def __iter__(self) -> Iterator[WorkloadSession]:
        return iter(tuple(self._by_process.values()))

    def of(self, process: Process) -> WorkloadSession | None:
        """Find the session of the same process with the same facts. One whose process has changed since is ended."""
        session = self._by_process.get(_key(process))
        if session is None:
            return None
        if session.process.facts != process.facts:
            self.end(session, SessionEnd.PROCESS_CHANGED)
            return None
        try:
            self.check(session, fully=True)
        except NotAttested:
            return None
        return session

    def start(self, process: Process, selectors: frozenset[Selector]) -> WorkloadSession:
        """Begin the session of a process that was attested a moment ago; the session owns ``process`` from now on."""
        session = WorkloadSession(process, selectors, self._clock.monotonic())
        if (before := self._by_process.get(_key(process))) is not None:
            self.end(before, SessionEnd.PROCESS_CHANGED)
        self._by_process[_key(process)] = session
        asyncio.get_running_loop().add_reader(process.pidfd, self.end, session, SessionEnd.PROCESS_EXITED)
        return session

    @contextmanager
    def delegated(
        self, process: Process, selectors: frozenset[Selector], *, are_vouched: bool
    ) -> Iterator[WorkloadSession]:
        """A session in whose name a delegate is served: found by nobody, and over with the block.

        ``process`` stays the caller's; it is named in logs. ``are_vouched``: the delegate stands for the selectors.
        """
        session = WorkloadSession(process, selectors, self._clock.monotonic(), are_vouched=are_vouched)
        try:
            yield session
        finally:
            session.is_ended = True
            self._withdraw(session, {}, SessionEnd.PROCESS_EXITED)

    def check(self, session: WorkloadSession, *, fully: bool | None = None) -> None:
        """Raise NotAttested unless the process is still the one that was attested; a session that is not, ends.

        ``fully``: None, where it was not looked at fully for a second.
        """
        if session.is_ended:
            raise NotAttested("the session has ended", code="session_ended")
        now = self._clock.monotonic()
        try:
            if fully or (fully is None and now - session.checked_at >= FULL_CHECK_EVERY):
                session.process.still_same()
                session.checked_at = now
            else:
                session.process.still_there()
        except NotAttested as error:
            is_gone = error.reason == "process_gone"
            self.end(session, SessionEnd.PROCESS_EXITED if is_gone else SessionEnd.PROCESS_CHANGED)
            raise

    def entries(self, session: WorkloadSession, cause: SessionEnd = SessionEnd.ENTRY_GONE) -> tuple[Entry, ...]:
        """Give the entries that the session earns now; what it earns no longer is withdrawn from it, for ``cause``."""
        now = self._clock.now()
        if session.matched_version == self._cache.version and not any(one.is_expired(now) for one in session.matched):
            return session.matched
        session.matched = self._cache.match(session.selectors, now, are_vouched=session.are_vouched)
        session.matched_version = self._cache.version
        self._withdraw(session, {entry.id: entry for entry in session.matched}, cause)
        return session.matched

    def describe(self, session: WorkloadSession, selectors: frozenset[Selector], answers: tuple[Answer, ...]) -> None:
        """Take in what the attestors say of a living session's process now: withdraw, and let its streams look again."""
        session.answers = answers
        if selectors != session.selectors:
            _log.info(
                "workload_described_anew",
                pid=session.process.pid,
                uid=session.process.uid,
                gained=len(selectors - session.selectors),
                lost=len(session.selectors - selectors),
            )
            session.selectors = selectors
            session.matched_version = -1
            for bell in session.bells:
                bell.selectors = selectors
                bell.ring()
        if self._cache.is_synced:
            self.entries(session, SessionEnd.SELECTORS_CHANGED)
        self._let_go_of_nothing(session)

    def release(self, session: WorkloadSession) -> None:
        """Take one connection away; a session without connections that was never given anything is let go."""
        session.connections -= 1
        self._let_go_of_nothing(session)

    def end(self, session: WorkloadSession, cause: SessionEnd) -> None:
        """End a session: its streams wake and find out, the server is told. Harmless when repeated."""
        if session.is_ended:
            return
        session.is_ended = True
        session.has_exited = cause is SessionEnd.PROCESS_EXITED
        asyncio.get_running_loop().remove_reader(session.process.pidfd)
        if self._by_process.get(_key(session.process)) is session:
            del self._by_process[_key(session.process)]
        self._withdraw(session, {}, cause)
        # NOTE(security): attestors that look at it now must not find another process under the number of a descriptor.
        if not session.asking.locked():
            session.process.close()
        for bell in session.bells:
            bell.ring()

    def let_go(self, session_ids: frozenset[str]) -> Sequence[Identity]:
        """Take away the identities whose workload sessions the server calls over; gives them. Their streams get others."""
        gone = []
        for session in self:
            over = [one for one in session.identities.values() if one.id in session_ids]
            for identity in over:
                _log.info("session_over", session=identity.id, spiffe_id=str(identity.entry.spiffe_id))
                del session.identities[identity.entry.id]
            for bell in session.bells if over else ():
                bell.ring()
            gone += over
        return gone

    def end_all(self) -> None:
        """End every session, as the agent stops."""
        for session in self:
            self.end(session, SessionEnd.AGENT_STOPPED)

    def _let_go_of_nothing(self, session: WorkloadSession) -> None:
        if session.connections <= 0 and not session.identities and not session.jwts:
            self.end(session, SessionEnd.SELECTORS_CHANGED)

    def _withdraw(self, session: WorkloadSession, kept: dict[str, Entry], cause: SessionEnd) -> None:
        gone = [
            identity
            for entry_id, identity in session.identities.items()
            if entry_id not in kept or kept[entry_id].spiffe_id != identity.entry.spiffe_id
        ]
        for identity in gone:
            del session.identities[identity.entry.id]
        tokens = [key for key in session.jwts if key[0] not in kept]
        for key in tokens:
            del session.jwts[key]
        if gone or tokens:
            _log_withdrawn(session, gone, len(tokens), cause)
        if reported := [identity for identity in gone if identity.x509 is not None and not identity.x509.shared]:
            self._on_identities_ended(reported, cause)


def _log_withdrawn(session: WorkloadSession, gone: list[Identity], tokens: int, cause: SessionEnd) -> None:
    # The ends of processes and entries come in thousands and are no news; the others are rare and somebody will ask.
    log = _log.debug if cause in _ORDINARY else _log.info
    log(
        "identities_withdrawn",
        pid=session.process.pid,
        uid=session.process.uid,
        cause=cause.value,
        sessions=[identity.id for identity in gone],
        spiffe_ids=[str(identity.entry.spiffe_id) for identity in gone],
        jwt_svids=tokens,
    )


def _key(process: Process) -> tuple[int, int]:
    return process.pid, process.facts.start_time
