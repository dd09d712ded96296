"""Writes down what a restart of the agent needs: soon after a change, and no more often than is cheap.

What is written is a whole and true state of one moment; a change during a write is in the next. After :meth:`Keeping.forget`
nothing of before reaches the disk any more, whatever was under way.
"""

import asyncio
from collections.abc import Callable
from datetime import datetime
from typing import Final

from broker.agent.cache import Bell, EstateCache
from broker.agent.estate_file import EstateFile, KeptEstate, worth_keeping
from broker.agent.kept import Kept
from broker.agent.svids import SvidKeeper
from broker.clock import Clock
from broker.spiffe import SpiffeId
from broker.telemetry.log import get_logger

SOON: Final = 0.05  # seconds from a change to its writing: changes come in bursts, a crash may come at once
REST: Final = 1.0  # seconds between two writes at least
REST_RATIO: Final = 50.0  # and so many times as long as the last one took: below 2 % of a core

_log = get_logger("agent.keeping")


class Keeping:
    """Keeps the estate and the spares in a file. :meth:`run` writes; :meth:`note` says that there is something."""

    def __init__(
        self,
        file: EstateFile,
        cache: EstateCache,
        clock: Clock,
        *,
        agent_id: Callable[[], SpiffeId | None],
        heard_at: Callable[[], datetime | None],
    ) -> None:
        """``agent_id`` and ``heard_at`` are asked at each write; None: there is nothing to be written."""
        self._file = file
        self._cache = cache
        self._clock = clock
        self._agent_id = agent_id
        self._heard_at = heard_at
        self._bell = Bell()
        self._kept = Kept(file)
        self._failed = ""
        self.svids: SvidKeeper | None = None

    def note(self) -> None:
        """Something changed that the next run should know."""
        self._bell.ring()

    async def run(self) -> None:
        """Write after each change; runs until cancelled, and writes a last time then."""
        try:
            with self._cache.listening() as self._bell:
                rest_until = 0.0
                while True:
                    await self._bell.wait(None)
                    await asyncio.sleep(max(SOON, rest_until - self._clock.monotonic()))
                    await self._bell.wait(0)
                    began = self._clock.monotonic()
                    await self.save()
                    ended = self._clock.monotonic()
                    rest_until = ended + max(REST, (ended - began) * REST_RATIO)
        finally:
            await self.save()

    async def save(self) -> None:
        """Write now."""
        kept = self._now()
        if kept is None:
            return
        try:
            await self._kept.save(kept)
            self._failed = ""
        except OSError as error:
            reason = error.strerror or type(error).__name__
            if reason != self._failed:
                _log.error(
                    "estate_not_kept", reason=reason, hint="a restart while the server is away would serve nobody"
                )
            self._failed = reason

    def forget(self) -> None:
        """Delete the file: this agent may serve nobody."""
        self._kept.forget()

    def _now(self) -> KeptEstate | None:
        agent_id, heard_at = self._agent_id(), self._heard_at()
        if agent_id is None or heard_at is None or not self._cache.is_synced or self.svids is None:
            return None
        spares = self.svids.spares.kept()
        entries, is_partial = worth_keeping(self._cache.entries, (one.entry_id for one in spares))
        is_partial = is_partial or self._cache.is_partial
        return KeptEstate(agent_id, heard_at, entries, self._cache.told, spares, is_partial, self._cache.crls)
