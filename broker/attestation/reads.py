"""Blocking reads on behalf of callers who may be hostile: files on hung file systems, slow user databases.

The threads are the kernel's own kind, which nobody joins, so that a read that never returns cannot hold up the agent's
exit. A place is freed when the read ends, not when its caller gives up, and no user holds more than a few: one user's hung
files starve only that user. Knows nothing of what is read.
"""

import _thread
import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Generic, TypeVar

from broker.clock import SystemClock

T = TypeVar("T")

MAX_READS = 32  # threads at once
MAX_READS_PER_USER = 4
KEPT_THREADS = 2  # that wait for the next read: to start one costs more than most reads do
REST = 1.0  # seconds after which the others that have nothing to do may go
Abandoned = Callable[[], bool]
_Jobs = SimpleQueue[Callable[[], None] | None]  # None: one thread may go


@dataclass(frozen=True, slots=True)
class Deadline:
    """When a read should stop: at a monotonic time, or when nobody waits any more."""

    until: float
    abandoned: Abandoned

    def left(self) -> float:
        """Give the seconds left, more than none; raises ``TimeoutError``."""
        seconds = self.until - SystemClock().monotonic()
        if seconds <= 0 or self.abandoned():
            raise TimeoutError
        return seconds


class BlockingReads:
    """Runs work in threads, at most ``MAX_READS`` and ``MAX_READS_PER_USER`` at a time. One event loop only."""

    def __init__(self) -> None:
        self._running = self._threads = 0
        self._by_user: Counter[int] = Counter()
        self._waiting: list[asyncio.Future[None]] = []
        self._jobs: _Jobs = SimpleQueue()
        self._is_resting = False

    def __del__(self) -> None:
        """Let the threads go that wait for work; one that hangs goes when it returns."""
        for _ in range(self._threads):
            self._jobs.put(None)

    async def run(self, uid: int, work: Callable[[Abandoned], T]) -> T:
        """Give what ``work`` returns, or raise what it raises; it should stop when the function it is given says so."""
        loop = asyncio.get_running_loop()
        while self._running >= MAX_READS or self._by_user[uid] >= MAX_READS_PER_USER:
            turn = loop.create_future()
            self._waiting.append(turn)
            await turn
        self._running += 1
        self._by_user[uid] += 1
        answer: asyncio.Future[T] = loop.create_future()

        def finish(result: T | None, error: BaseException | None) -> None:
            self._free(uid)
            if answer.done():
                return
            if error is not None:
                answer.set_exception(error)
            else:
                answer.set_result(result)  # type: ignore[arg-type]  # None only where T is None

        self._jobs.put(lambda: _work(loop, work, answer.cancelled, finish))
        if self._threads < self._running:
            self._start()
        return await answer

    def _start(self) -> None:
        # Not threading.Thread: its start() holds the event loop until the new thread has had its turn.
        with suppress(RuntimeError):  # no thread can be had: the job waits for one of the others, or for the next try
            _thread.start_new_thread(_serve, (self._jobs,))
            self._threads += 1

    def _rested(self) -> None:
        self._is_resting = False
        while self._threads > self._running + KEPT_THREADS:
            self._threads -= 1
            self._jobs.put(None)

    def _free(self, uid: int) -> None:
        self._running -= 1
        self._by_user[uid] -= 1
        if not self._by_user[uid]:
            del self._by_user[uid]
        if not self._is_resting and self._threads > self._running + KEPT_THREADS:
            self._is_resting = True
            asyncio.get_running_loop().call_later(REST, self._rested)
        waiting, self._waiting = self._waiting, []
        for turn in waiting:
            if not turn.done():
                turn.set_result(None)


class SharedRead(Generic[T]):
    """One answer for all who ask at a time, and never two questions at once. Failures are shared like answers."""

    def __init__(self, read: Callable[[], Awaitable[T]]) -> None:
        self._read = read
        self._current: tuple[float, asyncio.Future[T]] | None = None

    async def newer_than(self, moment: float) -> tuple[float, T]:
        """Give an answer to a question asked after that monotonic time, and when it was asked; raises what it raised."""
        while True:
            begun, task = self._current or (moment, None)
            if task is not None and begun > moment:
                return begun, await asyncio.shield(task)
            if task is not None and not task.done():
                await asyncio.wait({task})
                continue
            task = asyncio.ensure_future(self._read())
            task.add_done_callback(lambda done: done.cancelled() or done.exception())  # seen, though nobody waits
            self._current = (SystemClock().monotonic(), task)


def _serve(jobs: _Jobs) -> None:
    while (job := jobs.get()) is not None:
        job()
        del job  # it holds who asked


def _work(
    loop: asyncio.AbstractEventLoop,
    work: Callable[[Abandoned], T],
    abandoned: Abandoned,
    finish: Callable[[T | None, BaseException | None], None],
) -> None:
    result: T | None = None
    error: BaseException | None = None
    try:
        result = work(abandoned)
    except BaseException as raised:  # noqa: BLE001 - carried to the caller, whatever it is
        error = raised
    with suppress(RuntimeError):  # the loop may be closed by the time that a hung read returns
        loop.call_soon_threadsafe(finish, result, error)
