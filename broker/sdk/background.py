"""A task in the background, which ends with whoever began it."""

import asyncio


async def end(task: asyncio.Task[None]) -> None:
    """Cancel a task and wait until it is over; what it failed with is raised.

    It is not awaited itself: who is cancelled meanwhile could not tell that from the task's own end, and would go on.
    """
    task.cancel()
    await asyncio.wait((task,))
    if not task.cancelled():
        task.result()
