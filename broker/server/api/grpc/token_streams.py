"""The requests of many workloads on one stream of their agent: each runs by itself, and is answered when it is ready.

A slow one holds nobody up, and one that fails fails alone. Knows streams, numbers and bounds; whether a token is issued, and
what of it is recorded, is decided by whoever is called for each.
"""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from functools import partial
from typing import Final

from broker._proto.broker.server.v1 import tasks_pb2
from broker._proto.google.rpc import status_pb2
from broker.errors import BrokerError, Invalid, Refused, Unavailable
from broker.server.api.access import Caller, agent_of
from broker.spiffe import SpiffeId
from broker.telemetry.log import get_logger
from broker.transport.call_room import CallRoom
from broker.transport.grpc_server import log_defect
from broker.transport.grpc_status import defect_status, new_reference, status_of

MAX_ITEMS: Final = 256
"""In one message, and given up by one: what one turn of the loop may be busy with."""
MESSAGE_BYTES: Final = 512 * 1024
"""Of one message; what is under way keeps all of its own in memory."""
MAX_UNDER_WAY: Final = 4_096
"""Of all agents together: as many acts as the store lets wait."""
SHARE_OF_ONE_AGENT: Final = 0.125
"""Twice what an agent has under way at most: those of a connection that was lost may still be ending."""
MAX_UNREAD: Final = 512
"""Answers that wait to be sent, from which on nothing more is read: for an agent that asks and does not listen."""
ANSWER_BYTES: Final = 512 * 1024
"""After which a message of answers is full: with the largest token on top it stays far below gRPC's 4 MiB."""

PATH: Final = "/broker.server.v1.Tasks/IssueToken"
"""What each item is, to a log: a call of its own."""

log = get_logger("server")
Issue = Callable[[tasks_pb2.IssueTokenRequest, Caller], Awaitable[tasks_pb2.IssuedToken]]


class TokenStreams:
    """Serves all streams of all agents."""

    def __init__(self, issue: Issue) -> None:
        """``issue`` decides one request, and raises as the call alone would."""
        self._issue = issue
        self._room = CallRoom(MAX_UNDER_WAY, SHARE_OF_ONE_AGENT)

    async def serve(
        self, messages: AsyncIterator[tasks_pb2.IssueTokensRequest], caller: Caller
    ) -> AsyncGenerator[tasks_pb2.IssueTokensResponse, None]:
        """Answer what comes on one stream until it ends, and then what is still under way.

        Raises Invalid for a message that breaks a bound, and whatever reading raises; what is under way ends with that.
        """
        stream = _Stream(self._issue, self._room, caller)
        reading = asyncio.create_task(stream.read(messages), name="broker-token-requests")
        reading.add_done_callback(lambda _: stream.news.set())
        try:
            while True:
                await stream.news.wait()
                stream.news.clear()
                while (answer := stream.ready()) is not None:
                    yield answer
                if reading.done():
                    reading.result()
                    if stream.is_idle:
                        return
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
            await stream.end()


class _Stream:
    """What is under way on one stream, and what is ready."""

    def __init__(self, issue: Issue, room: CallRoom, caller: Caller) -> None:
        self._issue = issue
        self._room = room
        self._caller = caller
        self._agent: SpiffeId = agent_of(caller).id
        self._under_way: dict[int, asyncio.Task[None]] = {}
        self._answers: deque[tasks_pb2.IssueTokensResponse.Item] = deque()
        self._taken = asyncio.Event()
        self.news = asyncio.Event()

    @property
    def is_idle(self) -> bool:
        """Whether nothing is under way, and nothing waits to be sent."""
        return not self._under_way and not self._answers

    async def read(self, messages: AsyncIterator[tasks_pb2.IssueTokensRequest]) -> None:
        """Begin what each message asks for; does not go on while nobody takes the answers."""
        async for message in messages:
            if max(len(message.items), len(message.given_up)) > MAX_ITEMS:
                raise Invalid(f"a message has more than {MAX_ITEMS} items", code="too_many_items")
            if message.ByteSize() > MESSAGE_BYTES:
                raise Invalid(f"a message is longer than {MESSAGE_BYTES} bytes", code="message_too_long")
            for item in message.items:
                self._begin(item.id, item.request)
            for number in message.given_up:
                if (task := self._under_way.get(number)) is not None:
                    task.cancel()
            while len(self._answers) >= MAX_UNREAD:
                self._taken.clear()
                await self._taken.wait()

    def ready(self) -> tasks_pb2.IssueTokensResponse | None:
        """Take the answers that are ready, as many as a message holds; None where there is none."""
        items: list[tasks_pb2.IssueTokensResponse.Item] = []
        size = 0
        while self._answers and size < ANSWER_BYTES:
            items.append(self._answers.popleft())
            size += items[-1].ByteSize()
        self._taken.set()
        return tasks_pb2.IssueTokensResponse(items=items) if items else None

    async def end(self) -> None:
        """Cancel what is under way, and wait for it."""
        tasks = list(self._under_way.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _begin(self, number: int, request: tasks_pb2.IssueTokenRequest) -> None:
        if number in self._under_way:
            raise Invalid(f"item {number} is under way already", code="item_repeated")
        try:
            self._room.enter(self._agent)
        except Unavailable as error:
            self._answer(tasks_pb2.IssueTokensResponse.Item(id=number, failed=status_of(error)))
            return
        task = asyncio.create_task(self._one(number, request))
        self._under_way[number] = task
        # Not in the task itself: one that is cancelled before its first step runs nothing of its own.
        task.add_done_callback(partial(self._over, number))

    async def _one(self, number: int, request: tasks_pb2.IssueTokenRequest) -> None:
        try:
            issued = await self._issue(request, self._caller)
            answer = tasks_pb2.IssueTokensResponse.Item(id=number, issued=issued)
        except Exception as error:  # noqa: BLE001 - where each item's error becomes its answer, as the guard's does for a call
            answer = tasks_pb2.IssueTokensResponse.Item(id=number, failed=self._failed(error))
        self._answer(answer)

    def _over(self, number: int, task: "asyncio.Task[None]") -> None:
        del self._under_way[number]
        self._room.leave(self._agent)
        self.news.set()

    def _answer(self, answer: tasks_pb2.IssueTokensResponse.Item) -> None:
        self._answers.append(answer)
        self.news.set()

    def _failed(self, error: Exception) -> status_pb2.Status:
        if isinstance(error, BrokerError):
            if isinstance(error, Refused):
                log.info("call_refused", method=PATH, code=error.reason, peer=type(self._caller).__name__)
            return status_of(error)
        reference = new_reference()
        log_defect(reference, PATH, error)
        return defect_status(reference)
