"""Standing delegations and kill switches, as an operator uses them (``broker.server.v1.Delegations``, ``Stops``)."""

from collections.abc import Sequence

import grpc.aio

from broker._proto.broker.server.v1 import delegations_pb2
from broker._proto.service import ServiceBinding
from broker.client.calls import DEADLINE_SECONDS, PAGE_SIZE, Caller

_DELEGATIONS = ServiceBinding.of(delegations_pb2.DESCRIPTOR, "Delegations")
_STOPS = ServiceBinding.of(delegations_pb2.DESCRIPTOR, "Stops")


class Delegations:
    """What users left standing."""

    def __init__(self, channel: grpc.aio.Channel, *, timeout: float = DEADLINE_SECONDS) -> None:
        """Call over ``channel``; ``timeout`` is in seconds, for each call."""
        self._api = Caller(channel, _DELEGATIONS, timeout=timeout)

    async def create(self, user_token: str, terms: str, *, idempotency_key: str = "") -> delegations_pb2.Delegation:
        """Make one on a user's fresh token; ``terms`` as ``POST /delegations`` takes them."""
        request = delegations_pb2.CreateDelegationRequest(
            user_token=user_token, terms=terms, idempotency_key=idempotency_key
        )
        made: delegations_pb2.Delegation = await self._api.call("CreateDelegation", request)
        return made

    async def get(self, delegation_id: str) -> delegations_pb2.Delegation:
        """Give one; raises NotFound."""
        request = delegations_pb2.GetDelegationRequest(id=delegation_id)
        found: delegations_pb2.Delegation = await self._api.call("GetDelegation", request)
        return found

    async def list(self, *, user: str = "") -> Sequence[delegations_pb2.Delegation]:
        """Give those of a user, or all, page by page."""
        found: list[delegations_pb2.Delegation] = []
        token = ""
        while True:
            request = delegations_pb2.ListDelegationsRequest(user=user, page_size=PAGE_SIZE, page_token=token)
            page: delegations_pb2.ListDelegationsResponse = await self._api.call("ListDelegations", request)
            found.extend(page.delegations)
            token = page.next_page_token
            if not token:
                return found

    async def revoke(self, delegation_id: str, *, reason: str = "") -> delegations_pb2.Delegation:
        """End one, with every task that was started on it; raises NotFound."""
        request = delegations_pb2.RevokeDelegationRequest(id=delegation_id, reason=reason)
        ended: delegations_pb2.Delegation = await self._api.call("RevokeDelegation", request)
        return ended


class Stops:
    """The kill switches. One that ends many tasks answers when all are written down."""

    def __init__(self, channel: grpc.aio.Channel, *, timeout: float = DEADLINE_SECONDS) -> None:
        """Call over ``channel``; ``timeout`` is in seconds, for each call."""
        self._api = Caller(channel, _STOPS, timeout=timeout)

    async def stop(
        self, *, user: str = "", agent: str = "", audience: str = "", reason: str = ""
    ) -> delegations_pb2.StopTasksResponse:
        """End what one user gave, one agent does, or one service is used for; raises Invalid unless one is named."""
        request = delegations_pb2.StopTasksRequest(reason=reason)
        for name, value in (("user", user), ("agent", agent), ("audience", audience)):
            if value:
                setattr(request, name, value)
        answer: delegations_pb2.StopTasksResponse = await self._api.call("StopTasks", request)
        return answer

    async def disable(self, user: str, *, reason: str = "") -> delegations_pb2.StopTasksResponse:
        """Refuse all that a user gives, and end what they gave."""
        request = delegations_pb2.DisableUserRequest(user=user, reason=reason)
        answer: delegations_pb2.StopTasksResponse = await self._api.call("DisableUser", request)
        return answer

    async def enable(self, user: str, *, reason: str = "") -> bool:
        """Take back that an operator disabled them; give whether one had."""
        request = delegations_pb2.EnableUserRequest(user=user, reason=reason)
        answer: delegations_pb2.EnableUserResponse = await self._api.call("EnableUser", request)
        return answer.changed
