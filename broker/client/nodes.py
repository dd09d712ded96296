"""Node agents and the tokens by which they join (``spire.api.server.agent.v1.Agent``)."""

from collections.abc import Sequence

import grpc.aio

from broker._proto.service import ServiceBinding
from broker._proto.spire.api.server.agent.v1 import agent_pb2
from broker._proto.spire.api.types import agent_pb2 as types_agent_pb2
from broker._proto.spire.api.types import jointoken_pb2
from broker.client.calls import DEADLINE_SECONDS, PAGE_SIZE, Caller, spiffe_id_message
from broker.spiffe import SpiffeId

_AGENT = ServiceBinding.of(agent_pb2.DESCRIPTOR, "Agent")


class Nodes:
    """What an operator does with nodes."""

    def __init__(self, channel: grpc.aio.Channel, *, timeout: float = DEADLINE_SECONDS) -> None:
        """Call over ``channel``; ``timeout`` is in seconds, for each call."""
        self._agent = Caller(channel, _AGENT, timeout=timeout)

    async def create_join_token(self, *, ttl: int, agent_id: SpiffeId | None = None) -> jointoken_pb2.JoinToken:
        """Make a token for one node, good for ``ttl`` seconds; ``agent_id`` is an extra identity of that node."""
        request = agent_pb2.CreateJoinTokenRequest(ttl=ttl)
        if agent_id is not None:
            request.agent_id.CopyFrom(spiffe_id_message(agent_id))
        token: jointoken_pb2.JoinToken = await self._agent.call("CreateJoinToken", request)
        return token

    async def list(self, wanted: agent_pb2.ListAgentsRequest.Filter | None = None) -> Sequence[types_agent_pb2.Agent]:
        """Give the attested nodes, all or those that fit, page by page."""
        found: list[types_agent_pb2.Agent] = []
        token = ""
        while True:
            request = agent_pb2.ListAgentsRequest(filter=wanted, page_size=PAGE_SIZE, page_token=token)
            page: agent_pb2.ListAgentsResponse = await self._agent.call("ListAgents", request)
            found.extend(page.agents)
            token = page.next_page_token
            if not token:
                return found

    async def count(self, wanted: agent_pb2.CountAgentsRequest.Filter | None = None) -> int:
        """Count the attested nodes, all or those that fit."""
        answer: agent_pb2.CountAgentsResponse = await self._agent.call(
            "CountAgents", agent_pb2.CountAgentsRequest(filter=wanted)
        )
        return answer.count

    async def get(self, agent_id: SpiffeId) -> types_agent_pb2.Agent:
        """Give one node; raises NotFound."""
        request = agent_pb2.GetAgentRequest(id=spiffe_id_message(agent_id))
        agent: types_agent_pb2.Agent = await self._agent.call("GetAgent", request)
        return agent

    async def ban(self, agent_id: SpiffeId) -> None:
        """Refuse a node's agent from now on, also when it attests again; raises NotFound."""
        await self._agent.call("BanAgent", agent_pb2.BanAgentRequest(id=spiffe_id_message(agent_id)))

    async def evict(self, agent_id: SpiffeId) -> None:
        """Forget a node: its agent serves nobody until it attests again; raises NotFound."""
        await self._agent.call("DeleteAgent", agent_pb2.DeleteAgentRequest(id=spiffe_id_message(agent_id)))
