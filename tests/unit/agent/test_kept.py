"""States in a file: the newest stays, what is forgotten stays forgotten, and nobody waits for the disk."""

import asyncio
import threading
import time

import pytest

from broker.agent.kept import Kept
from tests.fakes.running_agent import until


class SlowFile:
    """A file on a disk that writes when it is told to."""

    def __init__(self):
        self.content = None
        self.begun, self.go = threading.Semaphore(0), threading.Semaphore(0)

    def store(self, state):
        self.begun.release()
        assert self.go.acquire(timeout=30)
        self.content = state

    def remove(self):
        self.content = None

    async def is_writing(self):
        await until(lambda: self.begun.acquire(blocking=False))


@pytest.fixture
def file():
    return SlowFile()


@pytest.fixture
def kept(file):
    return Kept(file)


async def saved(kept, *states):
    """Ask for these, in this order."""
    tasks = []
    for state in states:
        tasks.append(asyncio.create_task(kept.save(state)))
        await asyncio.sleep(0)
    return tasks


async def test_the_loop_goes_on_while_a_disk_takes_its_time(file, kept):
    (writing,) = await saved(kept, "a")
    await file.is_writing()
    began = time.monotonic()
    kept.forget()
    await asyncio.sleep(0.01)
    assert time.monotonic() - began < 5
    assert not writing.done()
    file.go.release()
    await writing
    assert file.content is None


@pytest.mark.parametrize("order", [1, -1])
async def test_the_newest_stays_whichever_thread_comes_first(file, kept, order):
    for _ in range(3):
        file.go.release()
    kept._said = 2
    for number, state in [(1, "old"), (2, "new")][::order]:
        kept._store(state, number)
    assert file.content == "new"


async def test_what_comes_after_it_was_forgotten_is_not_taken_away(file, kept):
    (first,) = await saved(kept, "before")
    await file.is_writing()
    kept.forget()
    (second,) = await saved(kept, "after")
    file.go.release()
    await file.is_writing()
    file.go.release()
    await asyncio.gather(first, second)
    assert file.content == "after"


async def test_what_was_waiting_when_it_was_forgotten_is_not_written(file, kept):
    first, second = await saved(kept, "a", "b")
    await file.is_writing()
    kept.forget()
    file.go.release()
    await asyncio.gather(first, second)
    assert file.content is None


async def test_what_the_disk_says_is_said(file, kept):
    def full(state):
        raise OSError(28, "No space left on device")

    file.store = full
    with pytest.raises(OSError, match="No space"):
        await kept.save("a")
