"""Tasks over the workload socket: the agent vouches for what it attested, and passes on what the server says."""

import asyncio
import hashlib
import os
import shutil
from pathlib import Path

import grpc
import pytest

from broker._proto.broker.agent.v1 import tasks_pb2
from broker._proto.service import Stub
from broker.agent.listener import TASKS
from broker.errors import Conflict, PolicyDenied
from broker.spiffe.jose import b64url_encode
from broker.spiffe.x509svid import split_der
from broker.transport.rpc_errors import from_rpc_error
from tests.fakes.fake_server import entry_message
from tests.fakes.processes import held_connection
from tests.fakes.running_agent import HEADER, ME, estate, until

SLEEP = str(Path(shutil.which("sleep")).resolve())
START = tasks_pb2.StartTaskRequest(
    user_token="user",
    purpose="p",
    authorization_details="[]",
    ttl=60,
    limits="{}",
    supervision="attached",
    idempotency_key="k",
)


async def test_each_call_carries_the_attested_session_and_the_callers_words() -> None:
    async with estate() as agent, agent.channel() as channel:
        stub = Stub(channel, TASKS)
        task = await stub.StartTask(START, metadata=HEADER)
        token = await stub.IssueToken(
            tasks_pb2.IssueTokenRequest(
                task_id="task_1", resource="https://r", scope="s", authorization_details="[1]", idempotency_key="l"
            ),
            metadata=HEADER,
        )
        done = await stub.CompleteTask(
            tasks_pb2.CompleteTaskRequest(task_id="task_1", expected_version=3, idempotency_key="m"), metadata=HEADER
        )
        assert (task.id, token.access_token, done.state) == ("task_1", "at", "completed")
        start, issue, complete = agent.server.task_requests
        assert start.workload == issue.workload == complete.workload
        assert (start.workload.spiffe_id, start.workload.entry_id) == ("spiffe://example.org/wl/me", "e1")
        assert start.workload.id.startswith("ws_")
        for name in (
            "user_token",
            "purpose",
            "authorization_details",
            "ttl",
            "limits",
            "supervision",
            "idempotency_key",
        ):
            assert getattr(start, name) == getattr(START, name)
        assert (issue.resource, issue.scope, issue.authorization_details, issue.idempotency_key) == (
            "https://r",
            "s",
            "[1]",
            "l",
        )
        assert (complete.expected_version, complete.idempotency_key) == (3, "m")
        await until(lambda: start.workload.id in agent.server.sessions)
        assert agent.server.sessions[start.workload.id] == start.workload


async def test_it_is_bound_to_the_leaf_that_the_process_holds() -> None:
    async with estate() as agent, agent.channel() as channel:
        held = next(iter((await agent.x509()).svids))
        await Stub(channel, TASKS).StartTask(START, metadata=HEADER)
        assert agent.server.task_requests[0].workload.x5t == b64url_encode(
            hashlib.sha256(split_der(held.x509_svid)[0]).digest()
        )


async def test_which_identity_acts() -> None:
    entries = [
        entry_message("e2", "/wl/two", [ME], created_at=2),
        entry_message("e1", "/wl/one", [ME], created_at=1),
        entry_message("e3", "/wl/three", ["unix:uid:4294967"]),
    ]
    async with estate(entries=entries) as agent, agent.channel() as channel:
        stub = Stub(channel, TASKS)
        await stub.StartTask(START, metadata=HEADER)
        await stub.StartTask(tasks_pb2.StartTaskRequest(spiffe_id="spiffe://example.org/wl/two"), metadata=HEADER)
        assert [one.workload.entry_id for one in agent.server.task_requests] == ["e1", "e2"]
        assert agent.server.task_requests[0].workload.id != agent.server.task_requests[1].workload.id
        for wanted, code in [
            ("spiffe://example.org/wl/three", grpc.StatusCode.PERMISSION_DENIED),
            ("nonsense", grpc.StatusCode.INVALID_ARGUMENT),
        ]:
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await stub.StartTask(tasks_pb2.StartTaskRequest(spiffe_id=wanted), metadata=HEADER)
            assert refused.value.code() == code


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (
            PolicyDenied("too much", code="invalid_authorization_details", hint="ask for less"),
            grpc.StatusCode.PERMISSION_DENIED,
        ),
        (Conflict("it moved on", code="stale_version"), grpc.StatusCode.ABORTED),
    ],
)
async def test_the_servers_refusal_is_passed_on_with_code_and_hint(error, status) -> None:
    async with estate() as agent, agent.channel() as channel:
        agent.server.task_error = error
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await Stub(channel, TASKS).StartTask(START, metadata=HEADER)
        seen = from_rpc_error(refused.value)
        assert (refused.value.code(), seen.message, seen.reason, seen.hint) == (
            status,
            error.message,
            error.reason,
            error.hint,
        )


@pytest.mark.bears("A05")
async def test_what_the_process_became_meanwhile_does_not_have_the_answer() -> None:
    async with (
        estate() as agent,
        held_connection(agent.socket, agent.directory / "r", "exec", SLEEP, "60") as held,
        grpc.aio.insecure_channel(f"unix:{held.relay}") as channel,
    ):
        decided = agent.server.token_gates[""] = asyncio.Event()
        asked = asyncio.ensure_future(Stub(channel, TASKS).StartTask(START, metadata=HEADER))
        await until(lambda: agent.server.task_requests)
        await held.act()
        await until(lambda: os.readlink(f"/proc/{held.pid}/exe") == SLEEP)
        decided.set()
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await asked
        # Unavailable: by then its connection may have been closed.
        assert refused.value.code() in {grpc.StatusCode.PERMISSION_DENIED, grpc.StatusCode.UNAVAILABLE}


@pytest.mark.bears("WE-03")
async def test_header_identity_and_size_are_required() -> None:
    async with estate(entries=[entry_message("e1", "/x", ["unix:uid:4294967"])]) as agent, agent.channel() as channel:
        stub = Stub(channel, TASKS)
        for request, metadata, code in [
            (START, (), grpc.StatusCode.INVALID_ARGUMENT),
            (START, HEADER, grpc.StatusCode.PERMISSION_DENIED),
            (tasks_pb2.StartTaskRequest(user_token="x" * 20_000), HEADER, grpc.StatusCode.INVALID_ARGUMENT),
        ]:
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await stub.StartTask(request, metadata=metadata)
            assert refused.value.code() == code
        assert agent.server.task_requests == []


async def test_a_shared_spare_starts_no_task() -> None:
    async with estate() as agent:
        await agent.x509()
        await until(lambda: "e1" in agent.agent.svids.spares._held)
        await agent.server.listener.stop()
        await until(lambda: not agent.agent.sync.is_online)
        async with (
            held_connection(agent.socket, agent.directory / "r", "stay") as held,
            grpc.aio.insecure_channel(f"unix:{held.relay}") as channel,
        ):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await Stub(channel, TASKS).StartTask(START, metadata=HEADER)
            assert from_rpc_error(refused.value).reason == "svid_shared"
