"""Notices a wall clock that was stepped and a machine that was asleep: what waits by time is then late, or early."""

import asyncio
from collections.abc import Callable
from typing import Final

from broker.clock import Clock
from broker.telemetry.log import get_logger

CLOCK_LOOK: Final = 5.0  # seconds between looks for a stepped clock
CLOCK_STEP: Final = 2.0  # seconds of difference that count as a step
STOPPED: Final = 15.0  # seconds without a turn of the loop that count as sleep

_log = get_logger("agent.clock")


class ClockWatch:
    """Compares the wall clock with the steady one. ``on_step``: look at every time again; ``on_sleep``: connections are dead."""

    def __init__(self, clock: Clock, on_step: Callable[[], None], on_sleep: Callable[[], None]) -> None:
        """Look at nothing yet."""
        self._clock = clock
        self._on_step = on_step
        self._on_sleep = on_sleep

    async def run(self) -> None:
        """Look again and again, until cancelled."""
        wall, steady = self._clock.now(), self._clock.monotonic()
        while True:
            await asyncio.sleep(CLOCK_LOOK)
            wall_now, steady_now = self._clock.now(), self._clock.monotonic()
            # A stepped clock or a suspended machine: what streams wait for by time may be due already.
            stepped = (wall_now - wall).total_seconds() - (steady_now - steady)
            if abs(stepped) > CLOCK_STEP:
                _log.warning("clock_stepped", seconds=round(stepped))
                self._on_step()
            if stepped > CLOCK_STEP or steady_now - steady > CLOCK_LOOK + STOPPED:
                # What slept for long has connections that are dead, and does not know it.
                _log.warning("awake_again", seconds=round(max(stepped, steady_now - steady)))
                self._on_sleep()
            wall, steady = wall_now, steady_now
