"""Many token requests on one stream: each by itself, bounds on all of them, and nothing left behind."""

import asyncio
import logging
from collections.abc import AsyncIterator, Iterable
from contextlib import aclosing
from typing import Any

import pytest

from broker._proto.broker.server.v1 import tasks_pb2
from broker.agent import token_stream as agents
from broker.errors import Invalid, NotFound, PolicyDenied
from broker.server.api.grpc import token_streams
from broker.server.api.grpc.token_streams import TokenStreams
from broker.server.store.writing import QUEUE_LIMIT
from broker.transport.grpc_server import MAX_MESSAGE_BYTES
from broker.transport.rpc_errors import from_status
from tests.fakes.running_agent import until
from tests.unit.server.tasks.test_grpc_tasks import agent

Request = tasks_pb2.IssueTokensRequest
CALLER = agent()


class Issuing:
    """Issues tokens; those of tasks that have a gate wait for it."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self.given_up: list[str] = []
        self.gates: dict[str, asyncio.Event] = {}
        self.errors: dict[str, Exception] = {}

    async def __call__(self, request: tasks_pb2.IssueTokenRequest, caller: Any) -> tasks_pb2.IssuedToken:
        assert caller is CALLER
        self.begun.append(request.task_id)
        try:
            if (gate := self.gates.get(request.task_id)) is not None:
                await gate.wait()
        except asyncio.CancelledError:
            self.given_up.append(request.task_id)
            raise
        if (error := self.errors.get(request.task_id)) is not None:
            raise error
        return tasks_pb2.IssuedToken(task_id=request.task_id, access_token=request.scope)


class Asking:
    """An agent's side of a stream."""

    def __init__(self) -> None:
        self._messages: asyncio.Queue[Request | None] = asyncio.Queue()
        self.read = 0

    def ask(self, *tasks: tuple[int, str], given_up: Iterable[int] = (), scope: str = "") -> None:
        message = Request(given_up=given_up)
        for number, task in tasks:
            message.items.add(id=number).request.task_id = task
            message.items[-1].request.scope = scope
        self._messages.put_nowait(message)

    def end(self) -> None:
        self._messages.put_nowait(None)

    async def __aiter__(self) -> AsyncIterator[Request]:
        while (message := await self._messages.get()) is not None:
            for _ in range(3):
                await asyncio.sleep(0)  # what comes off a wire never comes without a turn of the loop
            self.read += 1
            yield message


async def items(answers: AsyncIterator[tasks_pb2.IssueTokensResponse], count: int) -> dict[int, Any]:
    found: dict[int, Any] = {}
    async with asyncio.timeout(30):
        while len(found) < count:
            found |= {item.id: item for item in (await anext(answers)).items}
    return found


async def test_each_is_answered_when_it_is_ready_and_the_rest_after_the_end_of_asking() -> None:
    issuing, asking = Issuing(), Asking()
    issuing.gates["slow"] = asyncio.Event()
    issuing.errors["none"] = NotFound("there is no such task", code="task_unknown", hint="look")
    async with aclosing(TokenStreams(issuing).serve(asking, CALLER)) as answers:
        asking.ask((1, "slow"), (2, "quick"), (3, "none"))
        first = await items(answers, 2)
        assert first[2].issued.task_id == "quick"
        error = from_status(first[3].failed)
        assert (type(error), error.message, error.reason, error.hint) == (
            NotFound,
            "there is no such task",
            "task_unknown",
            "look",
        )
        asking.end()
        issuing.gates["slow"].set()
        assert (await items(answers, 1))[1].issued.task_id == "slow"
        with pytest.raises(StopAsyncIteration):
            await anext(answers)


async def test_a_refusal_and_a_defect_leave_their_line_and_a_defect_no_text(caplog: pytest.LogCaptureFixture) -> None:
    issuing, asking = Issuing(), Asking()
    issuing.errors |= {"no": PolicyDenied("no", code="task_ended"), "broken": ValueError("secret-token")}
    with caplog.at_level(logging.INFO):
        async with aclosing(TokenStreams(issuing).serve(asking, CALLER)) as answers:
            asking.ask((1, "no"), (2, "broken"))
            found = await items(answers, 2)
    assert from_status(found[1].failed).reason == "task_ended"
    reference = found[2].failed.message.rpartition(" ")[2]
    assert reference in caplog.text and "ValueError at" in caplog.text
    assert "secret-token" not in caplog.text + found[2].failed.message


async def test_what_is_given_up_is_cancelled_and_leaves_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_streams, "MAX_UNDER_WAY", 8)
    issuing, asking = Issuing(), Asking()
    issuing.gates["slow"] = asyncio.Event()
    # One of eight places is one agent's.
    async with aclosing(TokenStreams(issuing).serve(asking, CALLER)) as answers:
        asking.ask((1, "slow"), (2, "quick"))
        assert from_status((await items(answers, 1))[2].failed).reason == "too_many_calls"
        asking.ask(given_up=[1, 7])
        await until(lambda: issuing.given_up == ["slow"])
        asking.ask((3, "quick"))
        assert (await items(answers, 1))[3].issued.task_id == "quick"


@pytest.mark.parametrize(
    ("numbers", "given_up", "scope", "code"),
    [
        ([1, 1], (), "", "item_repeated"),
        (range(1, token_streams.MAX_ITEMS + 2), (), "", "too_many_items"),
        ([1], range(token_streams.MAX_ITEMS + 1), "", "too_many_items"),
        ([1], (), "x" * token_streams.MESSAGE_BYTES, "message_too_long"),
    ],
)
async def test_a_message_beyond_the_bounds_ends_the_stream_and_what_is_under_way(
    numbers: Iterable[int], given_up: Iterable[int], scope: str, code: str
) -> None:
    issuing, asking = Issuing(), Asking()
    issuing.gates["slow"] = asyncio.Event()
    streams = TokenStreams(issuing)
    async with aclosing(streams.serve(asking, CALLER)) as answers:
        asking.ask((1000, "slow"))
        asking.ask(*((number, "slow") for number in numbers), given_up=given_up, scope=scope)
        with pytest.raises(Invalid) as refused:
            await anext(answers)
    assert refused.value.reason == code
    assert issuing.given_up == issuing.begun
    assert len(streams._room) == 0


async def test_who_asks_and_does_not_listen_is_not_read_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_streams, "MAX_UNREAD", 4)
    issuing, asking = Issuing(), Asking()
    async with aclosing(TokenStreams(issuing).serve(asking, CALLER)) as answers:
        asking.ask((0, "first"))
        assert 0 in await items(answers, 1)
        for number in range(1, 21):
            asking.ask((number, "task"))
        await until(lambda: asking.read >= 5)
        for _ in range(100):
            await asyncio.sleep(0)
        assert asking.read < 10
        assert sorted(await items(answers, 20)) == list(range(1, 21))


async def test_a_message_of_answers_has_a_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_streams, "ANSWER_BYTES", 3000)
    issuing, asking = Issuing(), Asking()
    issuing.gates["together"] = asyncio.Event()
    async with aclosing(TokenStreams(issuing).serve(asking, CALLER)) as answers:
        asking.ask(*((number, "together") for number in range(6)), scope="x" * 1000)
        first = asyncio.ensure_future(anext(answers))
        await until(lambda: len(issuing.begun) == 6)
        issuing.gates["together"].set()
        sizes = [len((await first).items), len((await anext(answers)).items)]
        assert sizes == [3, 3]


async def test_a_stream_that_is_cut_leaves_nothing_under_way() -> None:
    issuing, asking = Issuing(), Asking()
    issuing.gates["slow"] = asyncio.Event()
    streams = TokenStreams(issuing)

    async def listen() -> None:
        async with aclosing(streams.serve(asking, CALLER)) as answers:
            await anext(answers)

    listening = asyncio.create_task(listen())
    asking.ask(*((number, "slow") for number in range(5)))
    await until(lambda: len(issuing.begun) == 5)
    listening.cancel()
    await asyncio.gather(listening, return_exceptions=True)
    assert issuing.given_up == ["slow"] * 5
    assert len(streams._room) == 0


def test_what_an_honest_agent_sends_is_within_the_bounds() -> None:
    sent = agents.MESSAGE_BYTES + agents.ITEM_BYTES
    assert sent < token_streams.MESSAGE_BYTES < MAX_MESSAGE_BYTES
    assert agents.MAX_ITEMS <= token_streams.MAX_ITEMS
    assert agents.MAX_UNDER_WAY <= token_streams.MAX_ITEMS  # all of it given up at once
    assert 2 * agents.MAX_UNDER_WAY <= token_streams.MAX_UNDER_WAY * token_streams.SHARE_OF_ONE_AGENT
    assert token_streams.MAX_UNDER_WAY <= QUEUE_LIMIT
