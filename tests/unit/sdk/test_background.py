"""The end of a task in the background: whoever ends it can itself be cancelled meanwhile, and is."""

import asyncio

import grpc
import pytest

from broker._proto.broker.server.v1 import tasks_pb2
from broker.clock import SystemClock
from broker.sdk import background
from broker.sdk.feed import FeedState
from broker.sdk.keeping import Keeper
from broker.sdk.subscription import FeedSubscription
from broker.sdk.workload import Workload


async def for_ever() -> None:
    await asyncio.Event().wait()


async def leave_workload(channel: grpc.aio.Channel) -> None:
    one = Workload("unix:/nowhere")
    await one.__aenter__()
    await one.__aexit__(None, None, None)


async def leave_task(channel: grpc.aio.Channel) -> None:
    keeper = Keeper(channel, tasks_pb2.Task(supervision="lease", lease_ttl=60), "")
    await keeper.start()
    await keeper.stop()


async def leave_feed(channel: grpc.aio.Channel) -> None:
    subscription = FeedSubscription(channel, FeedState(), SystemClock(), lambda: None)
    starting = asyncio.create_task(subscription.start())
    await asyncio.sleep(0)
    await subscription.stop()
    starting.cancel()


@pytest.mark.parametrize("leave", [leave_workload, leave_task, leave_feed])
async def test_who_is_cancelled_while_it_leaves_is_cancelled(leave, monkeypatch) -> None:
    waiting = asyncio.Event()
    end = background.end

    async def noticed(task: asyncio.Task[None]) -> None:
        waiting.set()
        await end(task)

    monkeypatch.setattr(background, "end", noticed)
    async with grpc.aio.insecure_channel("unix:/nowhere") as channel:

        async def leave_and_stay() -> None:
            await leave(channel)
            await for_ever()

        leaving = asyncio.create_task(leave_and_stay())
        await waiting.wait()
        leaving.cancel()
        await asyncio.wait((leaving,), timeout=30)
        assert leaving.cancelled()


async def test_what_it_failed_with_is_raised() -> None:
    async def failing() -> None:
        raise ValueError("a defect")

    task = asyncio.create_task(failing())
    await asyncio.wait((task,))
    with pytest.raises(ValueError, match="a defect"):
        await background.end(task)
    ended = asyncio.create_task(for_ever())
    await background.end(ended)
    assert ended.cancelled()
