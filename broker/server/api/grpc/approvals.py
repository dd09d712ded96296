"""``broker.server.v1.Approvals``: operators look at what waits for people, and stop it. A yes is a person's own, by their token."""

from datetime import UTC, datetime
from typing import Final

from broker._proto.broker.server.v1 import approvals_pb2
from broker._proto.service import Context, ServiceBinding
from broker.clock import Clock
from broker.errors import Invalid
from broker.server.api.access import Caller, name_of
from broker.server.tasks.approvals import Approvals as ApprovalCases
from broker.server.tasks.approvals import Saying
from broker.tasks.approval import Approval, ApprovalState

BINDING: Final = ServiceBinding.of(approvals_pb2.DESCRIPTOR, "Approvals")
MAX_PAGE: Final = 100
"""Approvals in one answer: the largest ones, of some 20 KiB each, still fit into 4 MiB."""
_STATES: Final = ", ".join(one.value for one in ApprovalState)


class Approvals:
    """Serves approvals."""

    def __init__(self, approvals: ApprovalCases, clock: Clock) -> None:
        self._approvals = approvals
        self._clock = clock

    async def ListApprovals(  # noqa: N802 - the RPC's name
        self, request: approvals_pb2.ListApprovalsRequest, context: Context, caller: Caller
    ) -> approvals_pb2.ListApprovalsResponse:
        """Give a page, oldest first."""
        size = min(request.page_size or MAX_PAGE, MAX_PAGE)
        if size < 0:
            raise Invalid("the page size is negative", code="invalid_page_size")
        page = await self._approvals.list(
            state=_state(request.state),
            user=request.user,
            task=request.task,
            after=request.page_token or None,
            limit=size,
        )
        return approvals_pb2.ListApprovalsResponse(
            approvals=map(self._written, page.approvals), next_page_token=page.next or ""
        )

    async def GetApproval(  # noqa: N802 - the RPC's name
        self, request: approvals_pb2.GetApprovalRequest, context: Context, caller: Caller
    ) -> approvals_pb2.Approval:
        """Give one."""
        return self._written(await self._approvals.get(request.id))

    async def ApproveApproval(  # noqa: N802 - the RPC's name
        self, request: approvals_pb2.ApproveApprovalRequest, context: Context, caller: Caller
    ) -> approvals_pb2.Approval:
        """Say yes for the person whose token it is."""
        by = _operator(caller)
        if not request.user_token:
            error = Invalid(
                "a yes needs the token of the person who says it",
                code="user_token_missing",
                hint="operators do not say yes: a person does, by a token of their own that their application was given",
            )
            await self._approvals.refused(error, by=by)
            raise error
        saying = Saying(request.id, request.reason, request.use_within)
        return self._written(await self._approvals.approve(request.user_token, saying, by=by))

    async def DenyApproval(  # noqa: N802 - the RPC's name
        self, request: approvals_pb2.DenyApprovalRequest, context: Context, caller: Caller
    ) -> approvals_pb2.Approval:
        """Say no: the person whose token it is, or the operator."""
        by, saying = _operator(caller), Saying(request.id, request.reason)
        if request.user_token:
            return self._written(await self._approvals.deny(request.user_token, saying, by=by))
        return self._written(await self._approvals.stop(saying, by=by))

    async def WithdrawApproval(  # noqa: N802 - the RPC's name
        self, request: approvals_pb2.WithdrawApprovalRequest, context: Context, caller: Caller
    ) -> approvals_pb2.Approval:
        """Take back a yes: the person whose token it is, or the operator."""
        by, saying = _operator(caller), Saying(request.id, request.reason)
        if request.user_token:
            return self._written(await self._approvals.withdraw(request.user_token, saying, by=by))
        return self._written(await self._approvals.stop(saying, by=by))

    def _written(self, one: Approval) -> approvals_pb2.Approval:
        wanted = one.wanted
        return approvals_pb2.Approval(
            id=one.id,
            state=one.state_at(self._clock.now()).value,
            task=wanted.task,
            agent=str(wanted.agent),
            user=wanted.user,
            issuer=wanted.issuer,
            audience=wanted.resource.text,
            authorization_details=wanted.authority.text(),
            scope=wanted.authority.scope(),
            purpose=one.purpose,
            parameter_digest=wanted.parameter_digest or "",
            rules=one.rules,
            created_at=_seconds(one.created_at),
            expires_at=_seconds(one.expires_at),
            decided_at=_seconds(one.decided_at),
            decided_by=one.decided_by,
            reason=one.reason,
            approved_until=_seconds(one.approved_until),
            used_at=_seconds(one.used_at),
        )


def _state(text: str) -> ApprovalState | None:
    try:
        return ApprovalState(text) if text else None
    except ValueError:
        raise Invalid("no approval is ever in this state", code="invalid_state", hint=f"one of {_STATES}") from None


def _operator(caller: Caller) -> str:
    return f"operator:{name_of(caller)}"


def _seconds(moment: datetime | None) -> int:
    """Write a time; the wire's 0 is none."""
    return 0 if moment is None else int(moment.astimezone(UTC).timestamp())
