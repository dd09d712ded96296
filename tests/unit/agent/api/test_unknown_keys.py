"""Tokens of unknown keys at the node agent: its bundle is pushed to it, so nobody can make it ask for one."""

import grpc
import pytest

from broker._proto.spiffe import workload_pb2
from broker.spiffe import SpiffeId
from tests.fakes.fake_server import FakeCa, FakeServer
from tests.fakes.running_agent import HEADER, estate, until

STRANGERS = 1000


@pytest.mark.bears("K08")
async def test_a_thousand_unknown_keys_do_not_reach_the_server(monkeypatch) -> None:
    asked = []
    admit = FakeServer._agents_only

    def counting(self, peer):
        asked.append(peer)
        return admit(self, peer)

    monkeypatch.setattr(FakeServer, "_agents_only", counting)
    async with estate() as agent, agent.workload() as stub:
        assert (await agent.x509()).svids
        await until(lambda: agent.agent.reports.is_settled)
        name = SpiffeId("spiffe://example.org/x")
        agent.server.heartbeat = 600  # each is looked at, too
        before = len(asked)
        assert before, "a control: whoever asks the server is seen"
        stranger = FakeCa()
        for number in range(STRANGERS):
            stranger.kid = f"stranger-{number}"
            request = workload_pb2.ValidateJWTSVIDRequest(audience="aud", svid=stranger.token(name, ["aud"]))
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await stub.ValidateJWTSVID(request, metadata=HEADER, timeout=30)
            assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        # Beats that were under way, and a stream that begins anew: not one for each key, or for each hundred.
        assert len(asked) - before < STRANGERS / 100
        good = workload_pb2.ValidateJWTSVIDRequest(audience="aud", svid=agent.server.ca.token(name, ["aud"]))
        assert (await stub.ValidateJWTSVID(good, metadata=HEADER, timeout=30)).spiffe_id == str(name)
