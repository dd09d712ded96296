"""The stream of an attached task over the workload socket, heartbeats, and what the server is told of both."""

import asyncio

import grpc
import pytest

from broker._proto.broker.agent.v1 import tasks_pb2
from broker._proto.service import Stub
from broker._proto.spiffe import workload_pb2
from broker.agent import attachments
from broker.agent.listener import TASKS
from broker.errors import Refused
from broker.transport.rpc_errors import from_rpc_error
from tests.fakes.running_agent import HEADER, estate, until

FIRST = tasks_pb2.AttachRequest(task_id="task_1")


async def drained(call) -> None:
    while await call.read() is not grpc.aio.EOF:
        pass


async def refusal(call) -> str:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await drained(call)
    return from_rpc_error(refused.value).reason


async def attached(stub):
    call = stub.Attach(metadata=HEADER)
    await call.write(FIRST)
    return call, await call.read()


async def test_a_process_that_answers_holds_its_task() -> None:
    async with estate() as agent, agent.channel() as channel:
        call, beat = await attached(Stub(channel, TASKS))
        assert (beat.beat, beat.ttl) == (1, 0.6)
        for number in range(2, 8):  # two leases long
            await call.write(tasks_pb2.AttachRequest(beat=beat.beat))
            beat = await asyncio.wait_for(call.read(), 30)
            assert beat.beat == number
        (request,) = agent.server.task_requests
        assert (request.task_id, request.workload.run) == ("task_1", agent.agent.reports.run_id)
        assert agent.server.detached == []


async def test_a_process_that_does_not_answer_lets_go() -> None:
    async with estate() as agent, agent.channel() as channel:
        call, _ = await attached(Stub(channel, TASKS))
        assert await refusal(call) == "task_suspended"
        await until(lambda: agent.server.detached)
        session = agent.server.task_requests[0].workload.id
        assert agent.server.detached == [("task_1", session)]


async def test_a_stream_that_is_closed_lets_go_when_nobody_comes_back(monkeypatch) -> None:
    monkeypatch.setattr(attachments, "COME_BACK_WITHIN", 0.1)
    async with estate() as agent, agent.channel() as channel:
        call, _ = await attached(Stub(channel, TASKS))
        call.cancel()
        await until(lambda: agent.server.detached)
        call, _ = await attached(Stub(channel, TASKS))
        await call.done_writing()
        assert await call.read() is grpc.aio.EOF
        await until(lambda: len(agent.server.detached) == 2)


async def test_a_task_that_is_completed_or_refused_is_not_let_go_of(monkeypatch) -> None:
    monkeypatch.setattr(attachments, "COME_BACK_WITHIN", 0.05)
    async with estate() as agent, agent.channel() as channel:
        stub = Stub(channel, TASKS)
        call, _ = await attached(stub)
        await stub.CompleteTask(tasks_pb2.CompleteTaskRequest(task_id="task_1"), metadata=HEADER)
        assert await refusal(call) == "task_ended"
        agent.server.task_error = Refused("it is over", code="task_ended")
        second = stub.Attach(metadata=HEADER)
        await second.write(FIRST)
        assert await refusal(second) == "task_ended"
        await asyncio.sleep(0.2)
        assert agent.server.detached == []
        assert len(agent.agent.attachments) == 0


async def test_a_heartbeat_is_passed_on_for_the_attested_process() -> None:
    async with estate() as agent, agent.channel() as channel:
        request = tasks_pb2.RenewLeaseRequest(task_id="task_1")
        lease = await Stub(channel, TASKS).RenewLease(request, metadata=HEADER)
        assert (lease.task_id, lease.ttl) == ("task_1", 0.6)
        assert agent.server.task_requests[0].workload.spiffe_id == "spiffe://example.org/wl/me"


async def test_an_agent_with_nothing_to_tell_reports_all_the_same_and_says_once_that_it_is_new() -> None:
    async with estate() as agent:
        agent.server.agent_lease = 0.9
        await agent.x509()
        await until(lambda: len(agent.server.runs) >= 5)
        run = agent.agent.reports.run_id
        assert agent.server.runs[0] == (run, True)
        assert set(agent.server.runs[1:]) == {(run, False)}


async def test_a_session_that_the_server_takes_for_ended_goes_on_as_another() -> None:
    async with estate() as agent, agent.workload() as workload, agent.channel() as channel:
        call = workload.FetchX509SVID(workload_pb2.X509SVIDRequest(), metadata=HEADER)
        before = await call.read()
        await until(lambda: agent.server.sessions)
        (old,) = agent.server.sessions
        agent.server.task_error = Refused("it has ended", code="session_ended")
        stub = Stub(channel, TASKS)
        with pytest.raises(grpc.aio.AioRpcError):
            await stub.StartTask(tasks_pb2.StartTaskRequest(), metadata=HEADER)
        after = await asyncio.wait_for(call.read(), 30)
        assert after.svids[0].x509_svid != before.svids[0].x509_svid
        agent.server.task_error = None
        await stub.StartTask(tasks_pb2.StartTaskRequest(), metadata=HEADER)
        assert agent.server.task_requests[-1].workload.id != old
        # And by the answer to a report: whoever is told again is another afterwards.
        new = agent.server.task_requests[-1].workload.id
        agent.server.over = {new}
        agent.agent._online()
        await asyncio.wait_for(call.read(), 30)
        await until(lambda: set(agent.server.sessions) - {old, new})
