"""Approvals, as an operator uses them, and a person by a token of their own (``broker.server.v1.Approvals``)."""

from collections.abc import Sequence

import grpc.aio

from broker._proto.broker.server.v1 import approvals_pb2
from broker._proto.service import ServiceBinding
from broker.client.calls import DEADLINE_SECONDS, PAGE_SIZE, Caller

_APPROVALS = ServiceBinding.of(approvals_pb2.DESCRIPTOR, "Approvals")


class Approvals:
    """What waits for a person's yes, and what became of it."""

    def __init__(self, channel: grpc.aio.Channel, *, timeout: float = DEADLINE_SECONDS) -> None:
        """Call over ``channel``; ``timeout`` is in seconds, for each call."""
        self._api = Caller(channel, _APPROVALS, timeout=timeout)

    async def list(self, *, state: str = "", user: str = "", task: str = "") -> Sequence[approvals_pb2.Approval]:
        """Give those in a state, of a user, of a task, or all, page by page."""
        found: list[approvals_pb2.Approval] = []
        token = ""
        while True:
            request = approvals_pb2.ListApprovalsRequest(
                state=state, user=user, task=task, page_size=PAGE_SIZE, page_token=token
            )
            page: approvals_pb2.ListApprovalsResponse = await self._api.call("ListApprovals", request)
            found.extend(page.approvals)
            token = page.next_page_token
            if not token:
                return found

    async def get(self, approval_id: str) -> approvals_pb2.Approval:
        """Give one; raises NotFound."""
        request = approvals_pb2.GetApprovalRequest(id=approval_id)
        found: approvals_pb2.Approval = await self._api.call("GetApproval", request)
        return found

    async def approve(
        self, approval_id: str, user_token: str, *, reason: str = "", use_within: int = 0
    ) -> approvals_pb2.Approval:
        """Say yes for the person whose token it is; ``use_within`` are seconds, 0 the usual.

        Raises NotFound, Refused, Conflict (decided otherwise), InvalidToken.
        """
        request = approvals_pb2.ApproveApprovalRequest(
            id=approval_id, user_token=user_token, reason=reason, use_within=use_within
        )
        approved: approvals_pb2.Approval = await self._api.call("ApproveApproval", request)
        return approved

    async def deny(self, approval_id: str, *, user_token: str = "", reason: str = "") -> approvals_pb2.Approval:
        """Say no, as the person whose token it is, or as an operator without one; raises as :meth:`approve`."""
        request = approvals_pb2.DenyApprovalRequest(id=approval_id, user_token=user_token, reason=reason)
        denied: approvals_pb2.Approval = await self._api.call("DenyApproval", request)
        return denied

    async def withdraw(self, approval_id: str, *, user_token: str = "", reason: str = "") -> approvals_pb2.Approval:
        """Take back a yes, as the person whose token it is, or as an operator without one; raises as :meth:`approve`."""
        request = approvals_pb2.WithdrawApprovalRequest(id=approval_id, user_token=user_token, reason=reason)
        over: approvals_pb2.Approval = await self._api.call("WithdrawApproval", request)
        return over
