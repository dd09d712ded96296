"""Looks after sessions whose processes ask for nothing: an idle stream must not outlive what its process was.

Two rounds. One looks at every process each second or so: exit is told by the kernel, but another program, user, control
group or namespace only shows where somebody looks. The other asks the attestors again, because labels change where the
kernel sees nothing. Both spread their work and are bounded in it: a node with thousands of sessions is looked at more slowly,
never at the cost of its callers. Decides nothing: what follows is in :mod:`broker.agent.workloads`.
"""

import asyncio
from collections.abc import Iterable
from heapq import nsmallest
from typing import Final

from broker.agent.sessions import Sessions, WorkloadSession
from broker.agent.workloads import Workloads
from broker.clock import Clock

ROUND: Final = 1.0  # seconds in which every process is looked at, up to LOOKS_PER_SECOND of them
LOOKS_PER_SECOND: Final = 1500  # some 11 microseconds each: below 2 % of a core
SLICE: Final = 50  # looks in one turn of the loop: below a millisecond
FULL_LOOKS_PER_SECOND: Final = 100  # some 60 microseconds each: below 1 % of a core; the longest unseen are next
ASKED_PER_SECOND: Final = 50  # sessions about which the attestors are asked again: up to 1,500 sessions are in time
ASKED_AT_ONCE: Final = 8  # callers that wait for their first attestation have 64 places of their own
REST_OF_UNCONNECTED: Final = 10  # a session without connections is asked about so many times less often


class Rounds:
    """Both rounds. ``ask_every`` in seconds: how often the attestors are asked about a session that is connected."""

    def __init__(self, workloads: Workloads, sessions: Sessions, clock: Clock, ask_every: float) -> None:
        self._workloads = workloads
        self._sessions = sessions
        self._clock = clock
        self._ask_every = ask_every
        self._room = asyncio.Semaphore(ASKED_AT_ONCE)

    async def run(self) -> None:
        """Go round until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._look_round(), name="look-round")
            group.create_task(self._ask_round(), name="ask-round")

    async def _look_round(self) -> None:
        while True:
            # At least one pause in each round: nobody can make it spin.
            slices = self.look_slices()
            took = max(ROUND, len(self._sessions) / LOOKS_PER_SECOND)
            for one in slices:
                self.look_at(one)
                await asyncio.sleep(took / len(slices))

    def look_slices(self) -> list[list[tuple[WorkloadSession, bool]]]:
        """Give every session, in slices for one turn of the loop each, and whether it is looked at fully."""
        sessions = tuple(self._sessions)
        took = max(ROUND, len(sessions) / LOOKS_PER_SECOND)
        full = set(nsmallest(int(FULL_LOOKS_PER_SECOND * took), sessions, key=lambda one: one.checked_at))
        looks = [(one, one in full) for one in sessions]
        return [looks[start : start + SLICE] for start in range(0, len(looks), SLICE)] or [[]]

    def look_at(self, looks: Iterable[tuple[WorkloadSession, bool]]) -> None:
        """Look at these processes; one that changed loses its session."""
        for session, fully in looks:
            if not session.is_ended:
                self._workloads.look(session, fully=fully)

    async def _ask_round(self) -> None:
        while True:
            await asyncio.sleep(ROUND)
            await self.ask()

    async def ask(self) -> None:
        """Ask about those for whom it is time, the longest overdue first."""
        now = self._clock.monotonic()
        due = nsmallest(
            ASKED_PER_SECOND,
            (one for one in self._sessions if self._workloads.is_due(one, now - self._rest(one))),
            key=lambda one: one.ask_at,
        )
        await asyncio.gather(*map(self._ask, due))

    async def _ask(self, session: WorkloadSession) -> None:
        async with self._room:
            await self._workloads.attest_again(session)

    def _rest(self, session: WorkloadSession) -> float:
        return 0.0 if session.connections > 0 else (REST_OF_UNCONNECTED - 1) * self._ask_every
