"""The policy, as an operator sees, replaces and questions it (``broker.server.v1.Policies``)."""

import grpc.aio

from broker._proto.broker.server.v1 import policies_pb2
from broker._proto.service import ServiceBinding
from broker.client.calls import DEADLINE_SECONDS, Caller

_POLICIES = ServiceBinding.of(policies_pb2.DESCRIPTOR, "Policies")


class Policies:
    """What an operator does with the policy."""

    def __init__(self, channel: grpc.aio.Channel, *, timeout: float = DEADLINE_SECONDS) -> None:
        """Call over ``channel``; ``timeout`` is in seconds, for each call."""
        self._policies = Caller(channel, _POLICIES, timeout=timeout)

    async def get(self, hash_: str = "") -> policies_pb2.Policy:
        """Give the policy in force, or an older one by its hash; raises NotFound."""
        found: policies_pb2.Policy = await self._policies.call("GetPolicy", policies_pb2.GetPolicyRequest(hash=hash_))
        return found

    async def push(self, text: str, *, expected_hash: str = "", check_only: bool = False) -> policies_pb2.Policy:
        """Put a policy in force, or only have the server read it; raises Invalid when it is refused, Conflict."""
        request = policies_pb2.PushPolicyRequest(text=text, expected_hash=expected_hash, check_only=check_only)
        put: policies_pb2.Policy = await self._policies.call("PushPolicy", request)
        return put

    async def explain(self, request: policies_pb2.ExplainDecisionRequest) -> policies_pb2.ExplainDecisionResponse:
        """Ask what the policy in force decides and why; raises NotFound, Invalid, InvalidToken."""
        told: policies_pb2.ExplainDecisionResponse = await self._policies.call("ExplainDecision", request)
        return told
