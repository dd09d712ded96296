"""A task that a command holds: started over the workload socket, ended when the command ends.

Follows the revocation feed beside it, so that an end that comes from elsewhere is told at once. Knows nothing of options.
"""

import asyncio
import contextlib
import secrets
import signal
from collections.abc import AsyncIterator
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any

import grpc.aio

from broker._proto.broker.agent.v1 import tasks_pb2
from broker._proto.broker.server.v1 import tasks_pb2 as server_pb2
from broker._proto.service import ServiceBinding
from broker.cli.connections import agent_channel, ask_agent
from broker.cli.options import Settings
from broker.cli.output import EXIT_INTERRUPTED, EXIT_OK, Format
from broker.cli.task_rows import SHAPE, row
from broker.clock import SystemClock
from broker.errors import Refused
from broker.sdk.feed import FeedState
from broker.sdk.keeping import Keeper
from broker.sdk.subscription import FeedSubscription

_TASKS = ServiceBinding.of(tasks_pb2.DESCRIPTOR, "Tasks")
LOOK_EVERY = 0.1
"""Seconds between two looks at what the feed has told: a look is a dictionary, and a person waits."""


@dataclass(frozen=True, slots=True)
class StartRequest:
    """What a task is to be. ``repr`` shows no token."""

    user_token: str = field(repr=False)
    purpose: str
    authorization_details: str
    ttl: int
    supervision: str
    spiffe_id: str
    delegation: str = ""


def hold(settings: Settings, request: StartRequest) -> int:
    """Start the task, print it, stay while it is attached; give the exit code.

    Raises:
        Refused: the task may not be started, or somebody else ended it.
    """
    return asyncio.run(_hold(settings, request))


async def complete(
    channel: grpc.aio.Channel,
    task_id: str,
    *,
    spiffe_id: str,
    timeout: float,  # noqa: ASYNC109
) -> server_pb2.Task:
    """End the task as its own agent; ending twice is fine."""
    request = tasks_pb2.CompleteTaskRequest(task_id=task_id, spiffe_id=spiffe_id, idempotency_key=f"complete-{task_id}")
    ended: server_pb2.Task = await ask_agent(channel, _TASKS, "CompleteTask", request, timeout=timeout)
    return ended


async def _hold(settings: Settings, request: StartRequest) -> int:
    async with agent_channel(settings) as channel:
        task: server_pb2.Task = await ask_agent(
            channel,
            _TASKS,
            "StartTask",
            tasks_pb2.StartTaskRequest(
                spiffe_id=request.spiffe_id,
                user_token=request.user_token,
                delegation_id=request.delegation,
                purpose=request.purpose,
                authorization_details=request.authorization_details,
                ttl=request.ttl,
                supervision=request.supervision,
                idempotency_key=secrets.token_urlsafe(16),
            ),
            timeout=settings.timeout,
        )
        async with contextlib.AsyncExitStack() as stack:
            stopped = stack.enter_context(_stop_signals())
            _show(settings, task)
            if task.supervision == "none":
                settings.shown.next(f"broker task show {task.id}")
                return EXIT_OK
            settings.shown.talk("the task lives as long as this command; Ctrl-C ends it")
            settings.shown.next(f"broker task show {task.id}   (elsewhere)")
            keeper = Keeper(channel, task, request.spiffe_id)
            await keeper.start()
            stack.push_async_callback(keeper.stop)
            names = {task.id, task.root or task.id, task.user, task.agent}
            async with following(channel, names) as feed:
                return await _stay(settings, channel, task, request.spiffe_id, feed=feed, stopped=stopped)


async def _stay(
    settings: Settings,
    channel: grpc.aio.Channel,
    task: server_pb2.Task,
    spiffe_id: str,
    *,
    feed: FeedState,
    stopped: asyncio.Event,
) -> int:
    clock = SystemClock()
    while not stopped.is_set():
        # Epoch 0 is below any that a kill of the tree announces: whatever kills this tree is seen.
        feed.require_alive(root=task.root or task.id, epoch=0, task=task.id, session=None, jti="")
        feed.require_going(user=task.user, user_session=None, agent=task.agent, audience="", issued_at=task.created_at)
        if clock.now().timestamp() >= task.expires_at:
            raise Refused("the task has expired", code="task_expired", hint="start a new one, with a longer --ttl")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LOOK_EVERY):
                await stopped.wait()
    ended = await complete(channel, task.id, spiffe_id=spiffe_id, timeout=settings.timeout)
    settings.shown.talk(f"the task {task.id} is {ended.state}: every token of it is dead")
    return EXIT_INTERRUPTED


def _show(settings: Settings, task: Any) -> None:
    if settings.shown.format in {None, Format.NAME}:
        settings.shown.raw(task.id if settings.shown.format is None else f"task/{task.id}")
    else:
        settings.shown.one(SHAPE, row(task))


@contextlib.asynccontextmanager
async def following(channel: grpc.aio.Channel, names: AbstractSet[str]) -> AsyncIterator[FeedState]:
    """Follow what the revocation feed tells of these names for as long as the block lasts; it is in the state."""
    feed = FeedState()
    subscription = FeedSubscription(channel, feed, SystemClock(), lambda: None, about=names)
    subscription.begin()
    try:
        yield feed
    finally:
        await subscription.stop()


@contextlib.contextmanager
def _stop_signals() -> Any:
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, stopped.set)
    try:
        yield stopped
    finally:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.remove_signal_handler(number)
