"""Token requests on one stream, by a real agent before a server that a test makes slow, refuse or go away."""

import asyncio

import grpc
import pytest

from broker._proto.broker.agent.v1 import tasks_pb2
from broker._proto.service import Stub
from broker.agent import token_stream
from broker.agent.listener import TASKS
from broker.errors import NoIdentity, PolicyDenied, Refused
from broker.transport.rpc_errors import NotServed, from_rpc_error
from tests.fakes.running_agent import HEADER, RunningAgent, estate, until


def ask(stub: Stub, task: str, timeout: float = 30, **fields: str) -> grpc.aio.Call:
    request = tasks_pb2.IssueTokenRequest(task_id=task, resource="https://r", **fields)
    return stub.IssueToken(request, metadata=HEADER, timeout=timeout)


async def failure(call: grpc.aio.Call) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


def arrived(agent: RunningAgent, task: str) -> bool:
    return any(request.task_id == task for request in agent.server.task_requests)


async def test_many_go_on_one_stream_and_each_gets_its_own_answer() -> None:
    async with estate() as agent, agent.channel() as channel:
        stub = Stub(channel, TASKS)
        names = [f"task_{number}" for number in range(100)]
        tokens = await asyncio.gather(*(ask(stub, name) for name in names))
        assert [token.task_id for token in tokens] == names
        assert sorted(request.task_id for request in agent.server.task_requests) == sorted(names)
        assert (agent.server.token_streams, agent.server.calls_alone) == (1, 0)


async def test_a_slow_one_and_a_refused_one_hold_up_nobody() -> None:
    async with estate() as agent, agent.channel() as channel:
        stub, server = Stub(channel, TASKS), agent.server
        server.token_gates["slow"] = asyncio.Event()
        server.token_errors["no"] = PolicyDenied("too much", code="invalid_authorization_details", hint="ask for less")
        server.token_errors["broken"] = ValueError("secret-token")
        slow = asyncio.ensure_future(ask(stub, "slow"))
        await until(lambda: arrived(agent, "slow"))
        refused, broken = await asyncio.gather(failure(ask(stub, "no")), failure(ask(stub, "broken")))
        seen = from_rpc_error(refused)
        assert (refused.code(), seen.message, seen.reason, seen.hint) == (
            grpc.StatusCode.PERMISSION_DENIED,
            "too much",
            "invalid_authorization_details",
            "ask for less",
        )
        assert broken.code() is grpc.StatusCode.INTERNAL
        assert "internal error; reference" in broken.details() and "secret" not in broken.details()
        assert (await ask(stub, "quick")).task_id == "quick"
        assert not slow.done()
        server.token_gates["slow"].set()
        assert (await slow).task_id == "slow"
        assert server.token_streams == 1


@pytest.mark.parametrize("how", ["cancel", "deadline"])
async def test_what_nobody_waits_for_is_given_up_at_the_server_too(how: str) -> None:
    async with estate() as agent, agent.channel() as channel:
        stub, server = Stub(channel, TASKS), agent.server
        await ask(stub, "first")  # from here on nothing has to be signed
        server.token_gates["slow"] = server.token_gates["stays"] = asyncio.Event()
        stays = asyncio.ensure_future(ask(stub, "stays"))
        slow = ask(stub, "slow", timeout=2 if how == "deadline" else 20)
        await until(lambda: arrived(agent, "slow") and arrived(agent, "stays"))
        if how == "cancel":
            slow.cancel()
        # Agent and caller have the same deadline: whoever is first says so.
        late = {grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.UNAVAILABLE}
        assert await slow.code() in (late if how == "deadline" else {grpc.StatusCode.CANCELLED})
        await until(lambda: server.tokens_given_up == ["slow"])
        server.token_gates["stays"].set()
        assert (await stays).task_id == "stays"
        assert server.token_streams == 1


async def test_one_that_was_not_sent_yet_is_never_sent_once_it_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_stream, "MAX_UNDER_WAY", 1)
    async with estate() as agent, agent.channel() as channel:
        stub, server = Stub(channel, TASKS), agent.server
        server.token_gates["first"] = asyncio.Event()
        first = asyncio.ensure_future(ask(stub, "first"))
        await until(lambda: arrived(agent, "first"))
        second, third = ask(stub, "second"), asyncio.ensure_future(ask(stub, "third"))
        await until(lambda: len(agent.agent._tokens._turns) == 2)
        second.cancel()
        await until(lambda: len(agent.agent._tokens._turns) == 1)
        server.token_gates["first"].set()
        assert [(await first).task_id, (await third).task_id] == ["first", "third"]
        assert not arrived(agent, "second")


async def test_a_server_that_goes_in_the_middle_fails_what_it_was_asked_and_nothing_after_it() -> None:
    async with estate() as agent, agent.channel() as channel:
        stub, server = Stub(channel, TASKS), agent.server
        server.token_gates["lost"] = asyncio.Event()
        lost = [asyncio.ensure_future(ask(stub, "lost")) for _ in range(5)]
        await until(lambda: sum(one.task_id == "lost" for one in server.task_requests) == 5)
        server.drop()
        for call in lost:
            assert (await failure(call)).code() is grpc.StatusCode.UNAVAILABLE
        # The server stops working for them, and the next one has a stream of its own.
        await until(lambda: server.tokens_given_up == ["lost"] * 5)
        await until(lambda: agent.agent.sync.is_online)
        assert (await ask(stub, "next")).task_id == "next"
        assert (server.token_streams, server.calls_alone) == (2, 0)


async def test_what_was_not_sent_yet_goes_on_with_the_next_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_stream, "MAX_UNDER_WAY", 1)
    async with estate() as agent, agent.channel() as channel:
        stub, server = Stub(channel, TASKS), agent.server
        await ask(stub, "before")
        server.token_gates["lost"] = asyncio.Event()
        lost = asyncio.ensure_future(ask(stub, "lost"))
        await until(lambda: arrived(agent, "lost"))
        waiting = [asyncio.ensure_future(ask(stub, f"task_{number}")) for number in range(3)]
        await until(lambda: len(agent.agent._tokens._turns) == 3)
        server.drop()
        assert (await failure(lost)).code() is grpc.StatusCode.UNAVAILABLE
        assert [(await one).task_id for one in waiting] == ["task_0", "task_1", "task_2"]
        assert [one.task_id for one in server.task_requests] == ["before", "lost", "task_0", "task_1", "task_2"]
        assert (server.token_streams, server.calls_alone) == (2, 0)


async def test_a_stream_that_is_refused_tells_everybody_why_and_the_next_request_tries_anew() -> None:
    async with estate() as agent, agent.channel() as channel:
        stub, server = Stub(channel, TASKS), agent.server
        server.stream_error = Refused("the agent is banned", code="agent_banned")
        for seen in await asyncio.gather(*(failure(ask(stub, f"task_{number}")) for number in range(8))):
            assert (seen.code(), from_rpc_error(seen).reason) == (grpc.StatusCode.PERMISSION_DENIED, "agent_banned")
        server.stream_error = None
        assert (await ask(stub, "task_9")).task_id == "task_9"
        assert server.calls_alone == 0


async def test_where_the_server_knows_no_such_stream_calls_go_alone_until_the_connection_is_another() -> None:
    async with estate() as agent, agent.channel() as channel:
        stub, server = Stub(channel, TASKS), agent.server
        server.stream_error = NotServed("Method not found!")
        tokens = await asyncio.gather(*(ask(stub, f"task_{number}") for number in range(8)))
        assert [token.task_id for token in tokens] == [f"task_{number}" for number in range(8)]
        assert (server.token_streams, server.calls_alone) == (1, 8)
        assert (await ask(stub, "task_9")).task_id == "task_9"
        assert (server.token_streams, server.calls_alone) == (1, 9)
        server.stream_error = None
        lost = agent.agent.upstream.lost()
        server.drop()
        await until(lambda: agent.agent.upstream.lost() > lost and agent.agent.sync.is_online)
        assert (await ask(stub, "task_10")).task_id == "task_10"
        assert (server.token_streams, server.calls_alone) == (2, 9)


async def test_a_large_request_goes_alone() -> None:
    async with estate() as agent, agent.channel() as channel:
        stub = Stub(channel, TASKS)
        large = "x" * (token_stream.ITEM_BYTES + 1)
        assert (await ask(stub, "large", authorization_details=large)).task_id == "large"
        assert (agent.server.token_streams, agent.server.calls_alone) == (0, 1)
        assert (await ask(stub, "small")).task_id == "small"
        assert (agent.server.token_streams, agent.server.calls_alone) == (1, 1)


async def test_a_session_that_the_server_has_ended_is_another_one_from_then_on() -> None:
    async with estate() as agent, agent.channel() as channel:
        stub, server = Stub(channel, TASKS), agent.server
        server.token_errors["over"] = Refused("the session has ended", code="session_ended")
        assert from_rpc_error(await failure(ask(stub, "over"))).reason == "session_ended"
        await ask(stub, "next")
        over, following = (request.workload.id for request in server.task_requests)
        assert over != following


async def test_an_agent_that_stops_leaves_nobody_waiting() -> None:
    async with estate() as agent, agent.channel() as channel:
        stub, server = Stub(channel, TASKS), agent.server
        server.token_gates["slow"] = asyncio.Event()
        slow = asyncio.ensure_future(ask(stub, "slow"))
        await until(lambda: arrived(agent, "slow"))
        await agent.agent._tokens.close()
        assert (await failure(slow)).code() is grpc.StatusCode.UNAVAILABLE
        await until(lambda: server.tokens_given_up == ["slow"])


@pytest.mark.parametrize("stands", [True, False])
async def test_the_process_is_looked_at_before_its_request_goes_and_before_it_gets_the_answer(
    stands: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is no longer what was attested when its turn comes asks for nothing; one that changes meanwhile gets nothing."""
    async with estate() as agent, agent.channel() as channel:
        stub, server = Stub(channel, TASKS), agent.server
        await ask(stub, "before")
        is_same = stands

        def look(session: object) -> None:
            if not is_same:
                raise NoIdentity("no identity issued")

        monkeypatch.setattr(agent.agent._tokens, "_look", look)
        server.token_gates["asked"] = asyncio.Event()
        asked = [asyncio.ensure_future(failure(ask(stub, "asked"))) for _ in range(3)]
        if stands:
            await until(lambda: sum(one.task_id == "asked" for one in server.task_requests) == 3)
            is_same = False
            server.token_gates["asked"].set()
        for seen in await asyncio.gather(*asked):
            assert (seen.code(), seen.details()) == (grpc.StatusCode.PERMISSION_DENIED, "no identity issued")
        assert arrived(agent, "asked") is stands
