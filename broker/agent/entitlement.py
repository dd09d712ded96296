"""Which entries a caller's session has, waiting a moment for a first one that may be on its way."""

import asyncio
from typing import Final

from broker.agent.cache import Bell, EstateCache
from broker.agent.sessions import Sessions, WorkloadSession
from broker.agent.workloads import NO_IDENTITY, Caller, Workloads
from broker.errors import NoIdentity, Unavailable
from broker.registry import Entry

NOT_SYNCED: Final = "the agent has not heard from its server"


class Entitlement:
    """Caller to session to entries, for every service of the public socket."""

    def __init__(self, workloads: Workloads, sessions: Sessions, cache: EstateCache, wait: float) -> None:
        """``wait`` in seconds: how long a caller without an entry, or before the first sync, is kept."""
        self._workloads = workloads
        self._sessions = sessions
        self._cache = cache
        self._wait = wait

    async def session(self, caller: Caller) -> WorkloadSession:
        """Give the caller's attested session; raises NoIdentity or Unavailable."""
        return await self._workloads.session_of(caller)

    async def of(self, caller: Caller) -> tuple[WorkloadSession, tuple[Entry, ...]]:
        """Give the caller's session and its entries, at least one; raises NoIdentity or Unavailable."""
        session = await self._workloads.session_of(caller)
        entries = self._sessions.entries(session) if self._cache.is_synced else ()
        if not entries:
            with session.listening(self._cache) as bell:
                entries = await self.first(session, bell)
        return session, entries

    async def first(self, session: WorkloadSession, bell: Bell) -> tuple[Entry, ...]:
        """Give the session's entries, waiting for the first; raises NoIdentity, or Unavailable before the first sync.

        Entries that are there at once come without a look at the process: whoever has just asked for its session has had
        one, and whoever sends it something takes another.
        """
        if self._cache.is_synced and (entries := self._sessions.entries(session)):
            return entries
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._wait
        while True:
            self._workloads.check(session)
            if self._cache.is_synced and (entries := self._sessions.entries(session)):
                return entries
            left = deadline - loop.time()
            if left <= 0 or not await bell.wait(left):
                break
        self._workloads.check(session)
        return self.required(session)

    def required(self, session: WorkloadSession) -> tuple[Entry, ...]:
        """Give the session's entries as they are now; raises NoIdentity where there is none, Unavailable while nobody is served."""
        if not self._cache.is_synced:
            raise Unavailable(NOT_SYNCED, code="not_synced")
        entries = self._sessions.entries(session)
        if not entries:
            if self._cache.is_partial:
                raise Unavailable(NOT_SYNCED, code="not_synced")
            raise NoIdentity(NO_IDENTITY)
        return entries

    def check(self, session: WorkloadSession) -> None:
        """Check the session's process fully; raises NoIdentity."""
        self._workloads.check(session)

    async def check_caller(self, caller: Caller) -> None:
        """Check the process behind a connection fully; raises NoIdentity or Unavailable."""
        self._workloads.check(caller.session or await self._workloads.session_of(caller))
