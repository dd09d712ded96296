"""While the server is away: what an earlier run was told is taken up, and nobody is served by a word that is too old.

The server is asked first. Only where it does not answer, or not in time, the kept estate counts; where it says that this
agent is banned, it never does.
"""

import asyncio
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Final

from broker.agent.cache import EstateCache
from broker.agent.estate_file import EstateFile, KeptEstate
from broker.agent.svids import SvidKeeper
from broker.clock import Clock
from broker.errors import InvalidJson
from broker.spiffe import SpiffeId
from broker.telemetry.log import get_logger

RESUME_AFTER: Final = 2.0  # seconds for a server that accepts and says nothing; callers wait as long for an identity
LOOK_EVERY: Final = 0.5  # seconds between looks at the age of the server's word
NOTES: Final = 20  # times that the server's word is written down in the longest time offline

_log = get_logger("agent.offline")


class Offline:
    """What holds without the server, and for how long. ``longest`` None: until the SVIDs expire."""

    def __init__(
        self,
        file: EstateFile,
        cache: EstateCache,
        clock: Clock,
        *,
        longest: timedelta | None,
        is_online: Callable[[], bool],
        note: Callable[[], None],
    ) -> None:
        """``note`` is called when the time of the server's last word should be written down."""
        self._file = file
        self._cache = cache
        self._clock = clock
        self._longest = longest
        self._is_online = is_online
        self._note = note
        self._kept: KeptEstate | None = None
        self._unheard = asyncio.Event()
        self._heard_steady: float | None = None
        self._noted: datetime | None = None
        self._is_suspended = False
        self.heard_at: datetime | None = None
        self.svids: SvidKeeper | None = None

    @property
    def has_something(self) -> bool:
        """Whether there is, or was, an estate to serve by: then nothing that the server says of this agent ends it."""
        return self._kept is not None or self._cache.is_synced or self._is_suspended

    def load(self, agent_id: SpiffeId) -> None:
        """Read what the run before kept; what is not usable is removed."""
        try:
            self._kept = self._file.load(agent_id)
        except InvalidJson as error:
            _log.warning("kept_estate_unusable", code=error.reason, reason=error.message)
            self._file.remove()

    def heard(self) -> None:
        """The server has spoken, and what is held is what it says."""
        self._kept = None
        self.heard_at, self._heard_steady = self._clock.now(), self._clock.monotonic()
        if self._is_suspended:
            self._is_suspended = False
            self._cache.unsuspend()
            _log.info("served_again")
        if self._longest is not None and (
            self._noted is None or abs(self.heard_at - self._noted) > self._longest / NOTES
        ):
            self._noted = self.heard_at
            self._note()

    def unheard(self) -> None:
        """An attempt to reach the server has failed."""
        self._unheard.set()

    def forget(self) -> None:
        """This agent may serve nobody: what was kept does not count any more."""
        self._kept = None
        self._is_suspended = False

    async def run(self) -> None:
        """Take up what was kept, if it must be, and watch the age of the server's word; runs until cancelled."""
        if self._kept is not None:
            try:
                async with asyncio.timeout(RESUME_AFTER):
                    await self._unheard.wait()
            except TimeoutError:
                pass
            self.resume()
        while True:
            await asyncio.sleep(LOOK_EVERY)
            self.look()

    def resume(self) -> None:
        """Serve by what the run before was told, unless the server has spoken since."""
        kept, self._kept = self._kept, None
        if kept is None or self._cache.is_synced:
            return
        self.heard_at = kept.heard_at
        self._cache.resume(kept.entries, kept.bundles, kept.crls, is_partial=kept.is_partial)
        if self.svids is not None:
            self.svids.spares.resume(kept.spares)
        _log.warning("estate_resumed", entries=len(kept.entries), count=len(kept.spares), seconds=round(self.age()))
        self.look()

    def age(self) -> float:
        """Give the seconds since the server's last word, by the clock that says more: either may have stood still."""
        wall = (self._clock.now() - self.heard_at).total_seconds() if self.heard_at is not None else 0.0
        steady = self._clock.monotonic() - self._heard_steady if self._heard_steady is not None else 0.0
        return max(wall, steady)

    def look(self) -> None:
        """Stop serving where the server's word is too old."""
        if self._longest is None or self._is_suspended or not self._cache.is_synced or self._is_online():
            return
        if self.age() > self._longest.total_seconds():
            self._is_suspended = True
            self._cache.suspend()
            _log.error(
                "offline_too_long",
                seconds=round(self.age()),
                hint="nobody is served until the server is back; max_offline sets how long",
            )
