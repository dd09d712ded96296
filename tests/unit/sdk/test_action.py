"""Blocks that do something once: what is claimed, what is settled, and by what way of leaving."""

import asyncio
from typing import Any

import pytest

from broker._proto.broker.agent.v1 import actions_pb2
from broker._proto.broker.server.v1 import actions_pb2 as server_pb2
from broker.errors import Conflict, InvalidJson, Refused, Unavailable
from broker.sdk import action as module
from broker.sdk.action import ActionBlock, ActionCalls
from broker.spiffe import SpiffeId
from broker.tasks.action import digest_of_parameters
from tests.unit.sdk.world import World, snapshot


class Agent:
    """What stands for the agent's service: answers in turn, and what it was asked."""

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)
        self.asked: list[Any] = []

    async def _answer(self, request: Any, **_: Any) -> Any:
        copy = type(request)()
        copy.CopyFrom(request)
        self.asked.append(copy)
        answer = self.answers.pop(0) if self.answers else server_pb2.Action()
        if isinstance(answer, Exception):
            raise answer
        return answer

    ClaimAction = SettleAction = _answer


def claimed(result: str = "claimed", outcome: str = "") -> server_pb2.ClaimedAction:
    return server_pb2.ClaimedAction(result=result, action=server_pb2.Action(id="act_1", outcome=outcome))


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setattr(module, "RETRY_AFTER", (0.0, 0.0))
    made = World()
    made.hear(snapshot(made.key))
    return made


def calls(world: World, agent: Agent) -> ActionCalls:
    made = ActionCalls(world.workload)
    made._api = agent  # type: ignore[assignment]
    return made


def block(world: World, agent: Agent, **changes: Any) -> ActionBlock:
    good = {"token": "t", "action": "a.b", "resource": None, "step": "s", "parameters": None, "enforced": ()}
    return ActionBlock(calls(world, agent), **good | changes)


async def test_what_is_asked(world: World) -> None:
    world.workload.chosen = SpiffeId("spiffe://example.org/tickets")
    agent = Agent(claimed())
    asked = {"resource": "4711", "parameters": {"b": 1, "a": [2]}, "enforced": ["max_amount"]}
    async with block(world, agent, **asked) as doing:
        assert (doing.id, doing.is_duplicate, doing.outcome) == ("act_1", False, None)
        await doing.complete({"n": 7})
    claim, settle = agent.asked
    assert (claim.token, claim.action, claim.identifier, claim.step) == ("t", "a.b", "4711", "s")
    assert claim.parameter_digest == digest_of_parameters({"a": [2], "b": 1})
    assert (list(claim.enforced), claim.spiffe_id) == (["max_amount"], "spiffe://example.org/tickets")
    assert settle == actions_pb2.SettleActionRequest(
        spiffe_id="spiffe://example.org/tickets", id="act_1", state="completed", outcome='{"n":7}'
    )


async def test_how_it_is_left(world: World) -> None:
    agent = Agent(claimed())
    async with block(world, agent):
        pass
    assert (agent.asked[-1].state, agent.asked[-1].outcome) == ("completed", "")

    agent = Agent(claimed())
    async with block(world, agent) as doing:
        await doing.release()
    assert [one.state for one in agent.asked[1:]] == ["released"]

    for left_by in (ValueError, asyncio.CancelledError):
        agent = Agent(claimed())
        with pytest.raises(left_by):
            async with block(world, agent):
                raise left_by
        assert len(agent.asked) == 1, "nobody knows how far it came"


async def test_what_was_done_is_not_settled_again(world: World) -> None:
    agent = Agent(claimed("duplicate_suppressed", '{"n":7}'))
    async with block(world, agent) as doing:
        assert (doing.is_duplicate, doing.is_settled, doing.outcome) == (True, True, {"n": 7})
        for say in (doing.complete, doing.release):
            with pytest.raises(Conflict):
                await say()
    assert len(agent.asked) == 1


async def test_an_answer_that_is_lost_is_asked_for_again_as_the_same_claim(world: World) -> None:
    lost = Unavailable("lost")
    agent = Agent(lost, lost, claimed(), lost)
    async with block(world, agent):
        pass
    first, second, third, *settlements = agent.asked
    assert first == second == third and len(first.idempotency_key) > 16
    assert len(settlements) == 2 and settlements[0] == settlements[1]

    agent = Agent(lost, lost, lost)
    with pytest.raises(Unavailable):
        async with block(world, agent):
            pytest.fail("nothing was claimed")
    assert len(agent.asked) == 3


async def test_a_refusal_is_final(world: World) -> None:
    agent = Agent(Refused("nobody knows", code="action_indeterminate"))
    with pytest.raises(Refused) as caught:
        async with block(world, agent):
            pytest.fail("it was refused")
    assert (caught.value.reason, len(agent.asked)) == ("action_indeterminate", 1)


def test_parameters_without_a_canonical_form(world: World) -> None:
    for unfit in ({"price": 1.5}, {1: 2}, b"raw", {"n": 2**60}):
        with pytest.raises(InvalidJson):
            block(world, Agent(), parameters=unfit)


async def test_who_is_asked_and_by_which_token(world: World) -> None:
    agent, token = Agent(claimed()), world.token()
    world.verifier._calls = calls(world, agent)
    caller = world.verifier.verify_now(token, world.identity.chain_der)
    assert token not in repr(caller)
    assert caller is world.verifier.verify_now(token, world.identity.chain_der)
    async with caller.action("ticket.read", step="s"):
        pass
    assert agent.asked[0].token == token
    await world.verifier.settle_action("act_2", is_done=False)
    await world.verifier.settle_action("act_2", is_done=True, outcome=[1])
    assert [(one.id, one.state, one.outcome) for one in agent.asked[2:]] == [
        ("act_2", "released", ""),
        ("act_2", "completed", "[1]"),
    ]


async def test_a_token_for_one_use_is_not_looked_at_alone(world: World) -> None:
    caller = world.verifier.verify_now(world.token(use="once"), world.identity.chain_der)
    with pytest.raises(Refused) as caught:
        await caller.check("ticket.read")
    assert (caught.value.reason, "caller.action" in caught.value.hint) == ("single_use", True)


def test_a_caller_that_no_verifier_made(world: World) -> None:
    known = world.verifier.verify_now(world.token(), world.identity.chain_der)
    by_hand = type(known)(known.user, known.agent, known.task, known.token, known.binding, known.authority)
    assert by_hand == known
    with pytest.raises(Unavailable):
        by_hand.action("ticket.read", step="s")
