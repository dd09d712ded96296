"""Actions over the workload socket: the agent vouches for the service, and passes on what it asks and what the server says."""

import grpc
import pytest

from broker._proto.broker.agent.v1 import actions_pb2
from broker._proto.service import Stub
from broker.agent.listener import ACTIONS
from broker.errors import Conflict, Refused
from broker.spiffe.jose import MAX_TOKEN
from broker.transport.rpc_errors import from_rpc_error
from tests.fakes.fake_server import entry_message
from tests.fakes.running_agent import HEADER, ME, estate

CLAIM = actions_pb2.ClaimActionRequest(
    token="at",
    action="ticket.close",
    identifier="4711",
    step="s",
    parameter_digest="sha-256:x",
    enforced=["max_amount", "recipient_domain"],
    idempotency_key="k",
)
SETTLE = actions_pb2.SettleActionRequest(id="act_1", state="completed", outcome="{}")


async def test_each_call_carries_the_attested_session_and_the_services_words() -> None:
    async with estate() as agent, agent.channel() as channel:
        stub = Stub(channel, ACTIONS)
        claimed = await stub.ClaimAction(CLAIM, metadata=HEADER)
        settled = await stub.SettleAction(SETTLE, metadata=HEADER)
        assert (claimed.result, claimed.action.id, settled.state) == ("claimed", "act_1", "completed")
        claim, settle = agent.server.task_requests
        assert claim.workload == settle.workload
        assert (claim.workload.spiffe_id, claim.workload.entry_id) == ("spiffe://example.org/wl/me", "e1")
        for sent, received in ((CLAIM, claim), (SETTLE, settle)):
            for field, value in sent.ListFields():
                assert getattr(received, field.name) == value


async def test_who_is_no_service_here_asks_nothing() -> None:
    async with estate(entries=[entry_message("e3", "/wl/three", ["unix:uid:4294967"])]) as agent:
        async with agent.channel() as channel:
            for method, request in (("ClaimAction", CLAIM), ("SettleAction", SETTLE)):
                with pytest.raises(grpc.aio.AioRpcError) as refused:
                    await getattr(Stub(channel, ACTIONS), method)(request, metadata=HEADER)
                assert refused.value.code() == grpc.StatusCode.PERMISSION_DENIED
        assert agent.server.task_requests == []


async def test_which_identity_it_is() -> None:
    entries = [entry_message(f"e{n}", f"/wl/{n}", [ME], created_at=n) for n in (1, 2)]
    async with estate(entries=entries) as agent, agent.channel() as channel:
        stub = Stub(channel, ACTIONS)
        await stub.SettleAction(SETTLE, metadata=HEADER)
        other = actions_pb2.SettleActionRequest(spiffe_id="spiffe://example.org/wl/2", id="act_1", state="released")
        await stub.SettleAction(other, metadata=HEADER)
        assert [one.workload.entry_id for one in agent.server.task_requests] == ["e1", "e2"]


@pytest.mark.parametrize(
    "error",
    [
        Conflict("at this moment", code="action_in_progress", hint="wait"),
        Refused("nobody knows", code="action_indeterminate", hint="settle it"),
    ],
)
async def test_the_servers_refusal_is_passed_on_with_code_and_hint(error: Conflict | Refused) -> None:
    async with estate() as agent, agent.channel() as channel:
        agent.server.task_error = error
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await Stub(channel, ACTIONS).ClaimAction(CLAIM, metadata=HEADER)
        seen = from_rpc_error(refused.value)
        assert (type(seen), seen.message, seen.reason, seen.hint) == (
            type(error),
            error.message,
            error.reason,
            error.hint,
        )


async def test_what_is_too_long_for_a_token_goes_no_further() -> None:
    async with estate() as agent, agent.channel() as channel:
        request = actions_pb2.ClaimActionRequest(token="x" * (MAX_TOKEN + 1))
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await Stub(channel, ACTIONS).ClaimAction(request, metadata=HEADER)
        assert from_rpc_error(refused.value).reason == "token_too_long"
        assert agent.server.task_requests == []
