"""A pace: a few pieces of work in one turn of the loop, in the order of asking."""

import asyncio

from broker.agent.api.pace import Pace


async def test_work_is_spread_over_turns_in_its_order() -> None:
    pace, done, turns = Pace(3), [], []

    async def work(number: int) -> None:
        await pace.turn()
        done.append(number)

    tasks = [asyncio.create_task(work(number)) for number in range(10)]
    while len(done) < 10:
        await asyncio.sleep(0)
        turns.append(len(done))
    assert done == list(range(10))
    assert max(later - before for before, later in zip([0, *turns], turns, strict=False)) <= 3
    await asyncio.gather(*tasks)
    await asyncio.wait_for(pace.turn(), 1)


async def test_one_that_is_cancelled_takes_no_turn() -> None:
    pace, done = Pace(1), []

    async def work(number: int) -> None:
        await pace.turn()
        done.append(number)

    tasks = [asyncio.create_task(work(number)) for number in range(4)]
    await asyncio.sleep(0)
    tasks[2].cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    assert done == [0, 1, 3]
