"""Spreads work that falls due for thousands of streams in one moment over turns of the event loop.

A rotation wakes every stream that a process holds open; done at once, the messages would keep all other callers waiting
for seconds. Knows no streams.
"""

import asyncio
from collections import deque
from typing import Final

AT_ONCE: Final = 16  # in one turn of the loop: a few ms of checking, rendering and sending


class Pace:
    """``await pace.turn()`` before a piece of work; used from one event loop."""

    def __init__(self, at_once: int = AT_ONCE) -> None:
        self._at_once = self._left = at_once
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._is_ticking = False

    async def turn(self) -> None:
        """Go on now, or in a later turn of the loop, in the order of asking."""
        loop = asyncio.get_running_loop()
        if not self._is_ticking:
            self._is_ticking = True
            loop.call_soon(self._tick)
        if self._left:
            self._left -= 1
            return
        mine = loop.create_future()
        self._waiting.append(mine)
        await mine

    def _tick(self) -> None:
        self._left = self._at_once
        while self._waiting and self._left:
            next_one = self._waiting.popleft()
            if not next_one.done():  # cancelled: its stream has ended
                self._left -= 1
                next_one.set_result(None)
        self._is_ticking = bool(self._waiting)
        if self._is_ticking:
            asyncio.get_running_loop().call_soon(self._tick)
