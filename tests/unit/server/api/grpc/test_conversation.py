import asyncio

import pytest

from broker._proto.spire.api.server.agent.v1 import agent_pb2
from broker.errors import Invalid, Refused
from broker.server.api.grpc.conversation import Conversation


async def answers(*items):
    for item in items:
        yield item


def response(text):
    return agent_pb2.AttestAgentRequest(challenge_response=text)


async def steps(conversation, work):
    return [step async for step in conversation.run(work)]


async def test_what_is_asked_comes_out_and_the_result_last():
    talk = Conversation(answers(response(b"1"), response(b"2")))

    async def work():
        return [await talk.challenge_with(b"a"), await talk.challenge_with(b"b")]

    assert await steps(talk, work()) == [b"a", b"b", [b"1", b"2"]]


@pytest.mark.parametrize("answer", [[], [agent_pb2.AttestAgentRequest()], [agent_pb2.AttestAgentRequest(params={})]])
async def test_anything_but_a_response_ends_it(answer):
    talk = Conversation(answers(*answer))
    with pytest.raises(Invalid):
        await steps(talk, talk.challenge_with(b"a"))


async def test_what_the_work_raises_comes_out():
    talk = Conversation(answers())

    async def work():
        raise Refused("no")

    with pytest.raises(Refused):
        await steps(talk, work())


async def test_the_work_ends_with_the_stream():
    talk, ended = Conversation(answers()), asyncio.Event()

    async def work():
        try:
            talk._challenges.put_nowait(b"a")
            await asyncio.Event().wait()
        finally:
            ended.set()

    run = talk.run(work())
    assert await anext(run) == b"a"
    await run.aclose()
    async with asyncio.timeout(30):
        await ended.wait()
