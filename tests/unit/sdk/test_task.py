"""A task's tokens where something happens while they are asked for: an end on the way, a broker that cannot be asked."""

import json
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from broker._proto.broker.server.v1 import tasks_pb2
from broker.errors import BrokerError, PolicyDenied, Refused, Unavailable
from broker.sdk import task as sdk_task
from broker.sdk.kept import HEARD_WITHIN, TRUSTED_FOR, KeptToken
from broker.sdk.task import ASK_AGAIN, CONFIRM_SECONDS, Task
from tests.unit.sdk.test_kept import Holding
from tests.unit.sdk.world import frame, snapshot
from tests.unit.tasks.world import AGENT, TICKETS, X5T, detail

ENDED = Refused("the task is revoked (operator)", code="task_ended")
AWAY = Unavailable("the server is away")


class Broker:
    """Answers what a test tells it, one answer after the other; the last one stays."""

    def __init__(self, holding: Holding) -> None:
        self.holding = holding
        self.answers: list[Any] = []
        self.asked: list[float | None] = []

    async def __call__(self, api: object, method: str, request: Any, *, seconds: float | None = None) -> Any:
        assert method == "IssueToken"
        self.asked.append(seconds)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if callable(answer):
            answer = answer()
        if isinstance(answer, BrokerError):
            raise answer
        token: KeptToken = answer
        return tasks_pb2.IssuedToken(access_token=token.text, expires_at=token.expires_at)


class Watch:
    """The feed of a holding."""

    def __init__(self, holding: Holding) -> None:
        self.silence, self.is_dead = holding.silence, holding.is_dead
        self.followed: list[object] = []

    def follow(self, holder: object) -> None:
        self.followed.append(holder)

    def leave(self, holder: object) -> None:
        self.followed.remove(holder)


@pytest.fixture
def here() -> Holding:
    return Holding()


@pytest.fixture
def broker(here: Holding, monkeypatch: pytest.MonkeyPatch) -> Iterator[Broker]:
    made = Broker(here)
    monkeypatch.setattr(sdk_task, "asked", made)
    return made


@pytest.fixture
def task(here: Holding, broker: Broker) -> Task:
    channel = SimpleNamespace(**{one: lambda *_, **__: None for one in _CALLS})
    workload: Any = SimpleNamespace(
        channel=channel, chosen=None, current=SimpleNamespace(x5t=X5T), watch=Watch(here), wait_for_x5t=None
    )
    state = tasks_pb2.Task(
        id="tsk_1", user="usr_1", agent=str(AGENT), authorization_details=json.dumps([detail()]), supervision="none"
    )
    return Task(workload, state, clock=here.clock)


_CALLS = ("unary_unary", "unary_stream", "stream_unary", "stream_stream")


async def test_what_is_kept_is_given_and_nobody_asked(here: Holding, broker: Broker, task: Task) -> None:
    first = here.made()
    broker.answers = [first, AWAY]
    for _ in range(3):
        assert await task.token(TICKETS.text) == first.text
    assert (len(broker.asked), task.is_kept(first.text)) == (1, True)
    assert task.names >= {"tsk_1", "usr_1", "ws_1"}
    task.let_go()
    assert not task.is_kept(first.text)


async def test_a_token_whose_task_ended_on_the_way_is_not_given(here: Holding, broker: Broker, task: Task) -> None:
    def late() -> KeptToken:
        token = here.made()
        here.hear(frame(2, kind="task", task="tsk_1", state="revoked"))
        return token

    broker.answers = [late, ENDED]
    with pytest.raises(Refused) as caught:
        await task.token(TICKETS.text)
    assert (caught.value.reason, len(broker.asked)) == ("task_ended", 2)


async def test_what_ended_while_it_was_asked_about_is_not_gone_on_with(
    here: Holding, broker: Broker, task: Task
) -> None:
    def told() -> BrokerError:
        here.hear(frame(2, kind="task", task="tsk_1", state="revoked"))
        task._kept.drop_ended()
        return AWAY

    broker.answers = [here.made(), told]
    await task.token(TICKETS.text)
    here.clock.step(HEARD_WITHIN + 0.1)
    with pytest.raises(Unavailable):
        await task.token(TICKETS.text)


async def test_in_an_outage_it_is_asked_about_and_given_for_so_long(here: Holding, broker: Broker, task: Task) -> None:
    first = here.made()
    broker.answers = [first, AWAY]
    assert await task.token(TICKETS.text) == first.text
    here.clock.step(HEARD_WITHIN + 0.1)
    asked = len(broker.asked)
    for _ in range(20):
        assert await task.token(TICKETS.text) == first.text
    assert broker.asked[asked:] == [CONFIRM_SECONDS]
    here.clock.step(ASK_AGAIN)
    assert await task.token(TICKETS.text) == first.text
    assert broker.asked[asked:] == [CONFIRM_SECONDS] * 2
    here.clock.step(TRUSTED_FOR)
    with pytest.raises(Unavailable):
        await task.token(TICKETS.text)
    # It is back: the next token, and at once.
    second = here.made(jti="jti_2")
    broker.answers = [second]
    assert await task.token(TICKETS.text) == second.text


async def test_what_was_denied_is_not_gone_on_with_in_the_next_outage(
    here: Holding, broker: Broker, task: Task
) -> None:
    broker.answers = [here.made(), here.made(jti="jti_2"), PolicyDenied("not any more"), AWAY]
    for scope in ("", "ticket.read"):
        await task.token(TICKETS.text, scope=scope)
    here.clock.step(HEARD_WITHIN + 0.1)
    with pytest.raises(PolicyDenied):
        await task.token(TICKETS.text)
    with pytest.raises(Unavailable):
        await task.token(TICKETS.text)
    # The other one was not denied; once the task is over, it is.
    assert await task.token(TICKETS.text, scope="ticket.read")
    broker.answers = [ENDED, AWAY]
    here.clock.step(ASK_AGAIN)
    with pytest.raises(Refused):
        await task.token(TICKETS.text)
    with pytest.raises(Unavailable):
        await task.token(TICKETS.text, scope="ticket.read")


async def test_a_token_of_a_key_that_is_not_known_yet_is_given(here: Holding, broker: Broker, task: Task) -> None:
    here.hear(snapshot(here.key))
    here.kids = frozenset({"older"})
    broker.answers = [here.made()]
    assert await task.token(TICKETS.text)
    assert len(broker.asked) == 2
