"""Blocking reads: bounded by user and in all, and a hung one harms only its own user."""

import asyncio
import os
import threading
from collections.abc import Callable

import pytest

from broker.attestation.reads import KEPT_THREADS, MAX_READS, MAX_READS_PER_USER, BlockingReads, SharedRead
from broker.clock import SystemClock


async def test_gives_what_the_work_gives_and_raises_what_it_raises() -> None:
    reads = BlockingReads()
    assert await reads.run(1, lambda _: 42) == 42

    def fail(_):
        raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        await reads.run(1, fail)
    assert (reads._running, dict(reads._by_user)) == (0, {})


@pytest.mark.bears("A07")
async def test_one_users_hung_reads_leave_the_others_alone() -> None:
    reads, released = BlockingReads(), threading.Event()
    hung = [asyncio.create_task(reads.run(1, lambda _: released.wait(30))) for _ in range(MAX_READS_PER_USER + 1)]
    for _ in range(3):
        await asyncio.sleep(0)
    assert reads._running == MAX_READS_PER_USER
    assert await asyncio.wait_for(reads.run(2, lambda _: "served"), 30) == "served"
    # Giving up frees no place: the thread still hangs.
    hung[0].cancel()
    await asyncio.gather(hung[0], return_exceptions=True)
    assert reads._running == MAX_READS_PER_USER
    released.set()
    assert await asyncio.wait_for(asyncio.gather(*hung[1:]), 30) == [True] * MAX_READS_PER_USER
    while reads._running:
        await asyncio.sleep(0.01)


async def test_all_users_together_are_bounded() -> None:
    reads, released = BlockingReads(), threading.Event()
    tasks = [asyncio.create_task(reads.run(uid, lambda _: released.wait(30))) for uid in range(MAX_READS + 5)]
    for _ in range(3):
        await asyncio.sleep(0)
    assert reads._running == MAX_READS
    released.set()
    await asyncio.wait_for(asyncio.gather(*tasks), 30)


async def test_abandoned_work_is_told() -> None:
    reads, told = BlockingReads(), threading.Event()

    def work(abandoned):
        while not abandoned():
            pass
        told.set()

    task = asyncio.create_task(reads.run(1, work))
    await asyncio.sleep(0.01)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert await asyncio.to_thread(told.wait, 5)


async def test_all_who_ask_at_one_time_share_one_answer() -> None:
    asked, go = [], asyncio.Event()

    async def read() -> int:
        asked.append(1)
        await go.wait()
        return len(asked)

    shared, before = SharedRead(read), SystemClock().monotonic() - 1
    waiting = [asyncio.create_task(shared.newer_than(before)) for _ in range(5)]
    await asyncio.sleep(0)
    waiting[0].cancel()  # who gives up takes it from nobody
    # Who wants a newer one waits for the one under way, and asks once more.
    later = asyncio.create_task(shared.newer_than(SystemClock().monotonic()))
    await asyncio.sleep(0)
    assert len(asked) == 1
    go.set()
    answers = [answer for _, answer in await asyncio.gather(*waiting[1:])]
    assert answers == [1] * 4
    begun, answer = await later
    assert answer == 2 and begun > before
    assert (await shared.newer_than(before))[1] == 2


async def test_a_failure_is_shared_and_not_kept() -> None:
    outcomes = iter([OSError("gone"), OSError("again"), "here"])

    async def read() -> str:
        outcome = next(outcomes)
        if isinstance(outcome, OSError):
            raise outcome
        return outcome

    shared, before = SharedRead(read), SystemClock().monotonic() - 1
    both = await asyncio.gather(shared.newer_than(before), shared.newer_than(before), return_exceptions=True)
    assert [str(one) for one in both] == ["gone", "gone"]
    with pytest.raises(OSError, match="again"):
        await shared.newer_than(SystemClock().monotonic())
    assert (await shared.newer_than(SystemClock().monotonic()))[1] == "here"


async def test_threads_stay_for_the_next_read_but_not_all_and_none_without_their_owner() -> None:
    reads, all_together = BlockingReads(), threading.Barrier(MAX_READS)

    def read(_: object) -> int:
        return threading.get_native_id()

    def read_together(_: object) -> int:
        all_together.wait(30)
        return threading.get_native_id()

    threads = set(await asyncio.gather(*(reads.run(uid, read_together) for uid in range(MAX_READS))))
    assert len(threads) == MAX_READS
    await _until(lambda: len(_alive(threads)) == KEPT_THREADS)
    kept = _alive(threads)
    assert {await reads.run(1, read) for _ in range(20)} <= kept  # no thread was started for any of them
    del reads
    await _until(lambda: not _alive(threads))


async def test_a_read_for_which_no_thread_can_be_had_waits_for_one(monkeypatch: pytest.MonkeyPatch) -> None:
    reads, released = BlockingReads(), threading.Event()
    holding = asyncio.create_task(reads.run(1, lambda _: released.wait(30)))
    await asyncio.sleep(0)

    def none(*_: object) -> int:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr("_thread.start_new_thread", none)
    waiting = asyncio.create_task(reads.run(2, lambda _: "served"))
    await asyncio.sleep(0)
    assert not waiting.done()
    released.set()
    assert await asyncio.wait_for(asyncio.gather(holding, waiting), 30) == [True, "served"]


def _alive(threads: set[int]) -> set[int]:
    return {one for one in threads if os.path.exists(f"/proc/self/task/{one}")}


async def _until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.01)
