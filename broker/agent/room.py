"""Room for a number of things at once, of which no user takes more than a share: one user's storm leaves places for others.

Who waits for his own user's share holds no place of the others'. Knows nothing of what takes the places.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass


@dataclass(slots=True)
class _Share:
    places: asyncio.Semaphore
    users: int = 0  # who hold or want one of the places


class SharedRoom:
    """``async with room.place(uid)``: waits for a place. One event loop only."""

    def __init__(self, places: int, of_one_user: int) -> None:
        self._places = asyncio.Semaphore(places)
        self._of_one_user = of_one_user
        self._shares: dict[int, _Share] = {}

    def __len__(self) -> int:
        """Of how many users somebody holds or wants a place."""
        return len(self._shares)

    @asynccontextmanager
    async def place(self, uid: int) -> AsyncIterator[None]:
        """Hold a place as long as the block."""
        share = self._shares.setdefault(uid, _Share(asyncio.Semaphore(self._of_one_user)))
        share.users += 1
        try:
            async with share.places, self._places:
                yield
        finally:
            share.users -= 1
            if not share.users:
                del self._shares[uid]
