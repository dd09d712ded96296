"""Nobody's storm takes all the room."""

import asyncio
from contextlib import AsyncExitStack

import pytest

from broker.agent.room import SharedRoom


@pytest.mark.bears("A07", "A23")
async def test_one_user_leaves_room_for_others() -> None:
    room = SharedRoom(4, 2)
    async with AsyncExitStack() as taken:
        for _ in range(2):
            await taken.enter_async_context(room.place(1))
        third = asyncio.create_task(taken.enter_async_context(room.place(1)))
        # Who waits for his own user's share holds none of the others' places.
        for _ in range(2):
            await asyncio.wait_for(taken.enter_async_context(room.place(2)), 30)
        assert not third.done()
        third.cancel()
        with pytest.raises(asyncio.CancelledError):
            await third
    assert len(room) == 0


async def test_all_users_together_have_no_more_than_there_is() -> None:
    room = SharedRoom(2, 2)
    async with AsyncExitStack() as taken:
        for uid in (1, 2):
            await taken.enter_async_context(room.place(uid))
        third = asyncio.create_task(taken.enter_async_context(room.place(3)))
        await asyncio.sleep(0)
        assert not third.done()
        await taken.aclose()
        await asyncio.wait_for(third, 30)
        await taken.aclose()
    assert len(room) == 0
