"""The loop's side of writing, with a hand-driven writer in place of the thread."""

import asyncio
import time
from collections.abc import Callable

import pytest

from broker.errors import Unavailable
from broker.server.store import writing
from broker.server.store.group import Group
from broker.server.store.rows import Change
from broker.server.store.writing import GROUP_LIMIT, HOLD_SECONDS, QUEUE_LIMIT, SEVERAL, WriteQueue


class HandWriter:
    """Takes groups, and finishes them when the test says so."""

    def __init__(self, *, executes: bool = True) -> None:
        self.groups: list[Group] = []
        self.executes = executes

    def submit(self, group: Group) -> None:
        self.groups.append(group)
        if self.executes:
            group.executed.release()


def nothing(_: object) -> None:
    return None


async def turns(count: int = 5) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


def queue_with(writer: HandWriter) -> WriteQueue:
    return WriteQueue(writer.submit, asyncio.get_running_loop(), pace=0)


def start(queue: WriteQueue, count: int) -> list["asyncio.Task[None]"]:
    return [asyncio.ensure_future(queue.put(nothing)) for _ in range(count)]


async def finish(queue: WriteQueue, group: Group, change: Callable[[Group], None] = nothing) -> None:
    change(group)
    queue.settle_soon(group)
    await turns()


async def test_all_who_are_ready_share_a_group_and_the_rest_waits_for_its_end() -> None:
    writer = HandWriter()
    queue = queue_with(writer)
    first = start(queue, GROUP_LIMIT + 3)
    await turns()
    assert [len(group.acts) for group in writer.groups] == [GROUP_LIMIT]
    second = start(queue, 2)
    await turns()
    assert len(writer.groups) == 1

    await finish(queue, writer.groups[0])
    assert [task.done() for task in first] == [True] * GROUP_LIMIT + [False] * 3
    assert [len(group.acts) for group in writer.groups] == [GROUP_LIMIT, 5]
    await finish(queue, writer.groups[1])
    await asyncio.gather(*first, *second)
    await queue.drained()


async def test_more_than_may_wait_are_told_to_come_again() -> None:
    writer = HandWriter()
    queue = queue_with(writer)
    waiting = start(queue, QUEUE_LIMIT)
    await turns()
    with pytest.raises(Unavailable) as overloaded:
        await queue.put(nothing)
    assert overloaded.value.reason == "store_overloaded"

    while writer.groups:
        await finish(queue, writer.groups.pop(0))
    await asyncio.gather(*waiting)
    late = start(queue, 1)
    await turns()
    await finish(queue, writer.groups.pop())
    await asyncio.gather(*late)


async def test_who_gives_up_before_the_start_takes_the_act_along() -> None:
    writer = HandWriter()
    queue = queue_with(writer)
    (given_up,) = start(queue, 1)
    await asyncio.sleep(0)
    given_up.cancel()
    await turns()
    assert writer.groups == []
    await queue.drained()


async def test_who_gives_up_after_the_start_leaves_the_act_running() -> None:
    writer = HandWriter()
    queue = queue_with(writer)
    given_up, kept = start(queue, 2)
    await turns()
    given_up.cancel()
    await finish(queue, writer.groups[0])
    assert (given_up.cancelled(), kept.done()) == (True, True)


async def test_the_loop_stands_still_for_a_bounded_time_only() -> None:
    writer = HandWriter(executes=False)
    queue = queue_with(writer)
    (waiting,) = start(queue, 1)
    before = time.monotonic()
    await turns()
    assert HOLD_SECONDS <= time.monotonic() - before < 1000 * HOLD_SECONDS
    await finish(queue, writer.groups[0])
    await waiting


async def test_changes_are_told_before_the_result() -> None:
    writer = HandWriter()
    queue = queue_with(writer)
    seen: list[object] = []
    queue.subscribe(lambda changes: seen.append((queue.head, tuple(changes))))
    (waiting,) = start(queue, 1)
    waiting.add_done_callback(lambda _: seen.append("result"))
    await turns()
    change = Change(7, "k", "x", "")

    def committed(group: Group) -> None:
        group.changes = [change]

    await finish(queue, writer.groups[0], committed)
    assert seen == [(7, (change,)), "result"]


async def test_a_group_that_ends_after_its_loop_is_harmless() -> None:
    queue = WriteQueue(lambda _: None, loop := asyncio.new_event_loop())
    loop.close()
    queue.settle_soon(Group([]))


async def test_without_a_hold_the_loop_goes_on_at_once() -> None:
    writer = HandWriter(executes=False)
    queue = WriteQueue(writer.submit, asyncio.get_running_loop(), hold=0)
    (waiting,) = start(queue, 1)
    await turns()
    assert len(writer.groups) == 1
    assert not writer.groups[0].executed.acquire(blocking=False)
    await finish(queue, writer.groups[0])
    await waiting


def changes(*numbers: int) -> list[Change]:
    return [Change(number, "k", str(number), "") for number in numbers]


async def test_changes_of_two_sources_are_told_once_and_in_order() -> None:
    queue = queue_with(HandWriter())
    told: list[int] = []
    queue.subscribe(lambda news: told.extend(change.seq for change in news))
    for news in (changes(1, 2), changes(1, 2, 3), changes(2), [], changes(3, 4, 5), changes(4, 5)):
        queue.take_in(news)
    assert told == [1, 2, 3, 4, 5]
    assert queue.head == 5


async def test_who_is_told_that_no_answer_will_come_is_told_no_more_and_what_had_not_begun_never_does() -> None:
    writer = HandWriter()
    queue = queue_with(writer)
    begun = start(queue, GROUP_LIMIT)
    await turns()
    waiting = start(queue, 3)
    await turns()
    queue.give_up(Unavailable("silent", code="store_unreachable"))
    outcomes = await asyncio.gather(*begun, *waiting, return_exceptions=True)
    assert {isinstance(each, Unavailable) and each.reason for each in outcomes} == {"store_unreachable"}
    assert len({id(each) for each in outcomes}) == len(outcomes)

    # The group ends after all: its changes are told, its callers are gone, the others run.
    await finish(queue, writer.groups[0], lambda group: setattr(group, "changes", changes(1)))
    assert queue.head == 1
    late = start(queue, 1)
    await turns()
    assert [len(group.acts) for group in writer.groups] == [GROUP_LIMIT, 1]
    await finish(queue, writer.groups[1])
    await asyncio.gather(*late)
    await queue.drained()


async def test_where_several_write_groups_begin_apart_and_take_in_who_comes_meanwhile() -> None:
    writer = HandWriter()
    queue = WriteQueue(writer.submit, asyncio.get_running_loop(), pace=0.5)
    first = start(queue, SEVERAL)
    await turns()
    began = queue._began
    await finish(queue, writer.groups[0])
    late = start(queue, 1)
    await turns()
    later = start(queue, 2)
    await turns()
    assert len(writer.groups) == 1
    async with asyncio.timeout(30):
        while len(writer.groups) < 2:
            await asyncio.sleep(0)
    assert queue._began - began >= 0.49
    assert [len(group.acts) for group in writer.groups] == [SEVERAL, 3]
    await finish(queue, writer.groups[1])
    await asyncio.gather(*first, *late, *later)
    await queue.drained()


async def test_a_full_group_does_not_wait() -> None:
    writer = HandWriter()
    queue = WriteQueue(writer.submit, asyncio.get_running_loop(), pace=1000)
    acts = start(queue, 2 * GROUP_LIMIT)
    await turns()
    await finish(queue, writer.groups[0])
    assert len(writer.groups) == 2
    await finish(queue, writer.groups[1])
    await asyncio.gather(*acts)


async def test_few_never_wait() -> None:
    writer = HandWriter()
    queue = WriteQueue(writer.submit, asyncio.get_running_loop(), pace=1000)
    for number in range(5):
        acts = start(queue, SEVERAL - 1)
        await turns()
        assert len(writer.groups) == number + 1
        await finish(queue, writer.groups[number])
        await asyncio.gather(*acts)


async def test_who_is_expected_no_more_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "SEVERAL_SECONDS", 0.01)
    writer = HandWriter()
    queue = WriteQueue(writer.submit, asyncio.get_running_loop(), pace=1000)
    acts = start(queue, SEVERAL)
    await turns()
    await finish(queue, writer.groups[0])
    loop = asyncio.get_running_loop()
    over = loop.time() + 0.02
    while loop.time() < over:
        await asyncio.sleep(0)
    acts += start(queue, 1)
    await turns()
    assert len(writer.groups) == 2
    await finish(queue, writer.groups[1])
    await asyncio.gather(*acts)
