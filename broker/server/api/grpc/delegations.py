"""``broker.server.v1.Delegations`` and ``Stops``: operators look at what users left standing, and stop what must not go on."""

from datetime import UTC, datetime
from typing import Final

from broker._proto.broker.server.v1 import delegations_pb2
from broker._proto.service import Context, ServiceBinding
from broker.clock import Clock
from broker.errors import Invalid
from broker.server.api.access import Caller, name_of
from broker.server.tasks.delegations import Delegations as DelegationCases
from broker.server.tasks.delegations import Terms
from broker.server.tasks.stops import Stopped
from broker.server.tasks.users import Effect, Users
from broker.spiffe import SpiffeId, strictjson
from broker.tasks import Resource
from broker.tasks.standing import StandingDelegation

BINDING: Final = ServiceBinding.of(delegations_pb2.DESCRIPTOR, "Delegations")
STOPS: Final = ServiceBinding.of(delegations_pb2.DESCRIPTOR, "Stops")
DEFAULT_PAGE: Final = 100
MAX_PAGE: Final = 200
"""Delegations in one answer: the largest ones still fit into 4 MiB."""
MAX_TERMS: Final = 64 * 1024
"""Bytes of the terms of a new delegation."""


class Delegations:
    """Serves standing delegations."""

    def __init__(self, delegations: DelegationCases, clock: Clock) -> None:
        self._delegations = delegations
        self._clock = clock

    async def CreateDelegation(  # noqa: N802 - the RPC's name
        self, request: delegations_pb2.CreateDelegationRequest, context: Context, caller: Caller
    ) -> delegations_pb2.Delegation:
        """Make one on a user's fresh word."""
        terms = Terms.parse(strictjson.loads(request.terms.encode(errors="replace"), max_bytes=MAX_TERMS))
        key, by = request.idempotency_key, f"operator:{name_of(caller)}"
        return self._written(await self._delegations.create(request.user_token, terms, by=by, key=key))

    async def GetDelegation(  # noqa: N802 - the RPC's name
        self, request: delegations_pb2.GetDelegationRequest, context: Context, caller: Caller
    ) -> delegations_pb2.Delegation:
        """Give one."""
        return self._written(await self._delegations.get(request.id))

    async def ListDelegations(  # noqa: N802 - the RPC's name
        self, request: delegations_pb2.ListDelegationsRequest, context: Context, caller: Caller
    ) -> delegations_pb2.ListDelegationsResponse:
        """Give a page, oldest first."""
        size = min(request.page_size or DEFAULT_PAGE, MAX_PAGE)
        if size < 0:
            raise Invalid("the page size is negative", code="invalid_page_size")
        page = await self._delegations.list(request.user or None, after=request.page_token or None, limit=size)
        return delegations_pb2.ListDelegationsResponse(
            delegations=map(self._written, page.delegations), next_page_token=page.next or ""
        )

    async def RevokeDelegation(  # noqa: N802 - the RPC's name
        self, request: delegations_pb2.RevokeDelegationRequest, context: Context, caller: Caller
    ) -> delegations_pb2.Delegation:
        """End one, with every task that was started on it."""
        by = f"operator:{name_of(caller)}"
        return self._written(await self._delegations.revoke(request.id, by=by, reason=request.reason))

    def _written(self, one: StandingDelegation) -> delegations_pb2.Delegation:
        return delegations_pb2.Delegation(
            id=one.id,
            user=one.user,
            issuer=one.issuer,
            client=one.client,
            state=one.state(self._clock.now()),
            agents=[pattern.text for pattern in one.agents],
            authorization_details=one.authority.text(),
            purpose=one.purpose,
            max_task_ttl=one.max_task_ttl,
            max_hops=one.max_hops,
            created_at=_seconds(one.created_at),
            expires_at=_seconds(one.expires_at),
            ended_at=0 if one.ended_at is None else _seconds(one.ended_at),
            cause="" if one.cause is None else one.cause.value,
        )


class Stops:
    """Serves the operators' kill switches."""

    def __init__(self, users: Users) -> None:
        self._users = users

    async def StopTasks(  # noqa: N802 - the RPC's name
        self, request: delegations_pb2.StopTasksRequest, context: Context, caller: Caller
    ) -> delegations_pb2.StopTasksResponse:
        """End what a user gave, an agent does, or a service is used for."""
        by, reason = f"operator:{name_of(caller)}", request.reason
        match request.WhichOneof("target"):
            case "user":
                stopped = await self._users.stop_user(request.user, by=by, reason=reason)
            case "agent":
                stopped = await self._users.stop_agent(SpiffeId(request.agent), by=by, reason=reason)
            case "audience":
                stopped = await self._users.stop_audience(Resource(request.audience), by=by, reason=reason)
            case _:
                raise Invalid(
                    "nothing is named that is to stop",
                    code="target_missing",
                    hint="name a user, an agent or an audience",
                )
        return _answer(stopped)

    async def DisableUser(  # noqa: N802 - the RPC's name
        self, request: delegations_pb2.DisableUserRequest, context: Context, caller: Caller
    ) -> delegations_pb2.StopTasksResponse:
        """Refuse all that a user gives, and end what they gave."""
        by = f"operator:{name_of(caller)}"
        return _answer(await self._users.disable(request.user, by=by, reason=request.reason))

    async def EnableUser(  # noqa: N802 - the RPC's name
        self, request: delegations_pb2.EnableUserRequest, context: Context, caller: Caller
    ) -> delegations_pb2.EnableUserResponse:
        """Take back what an operator said of a user."""
        done = await self._users.enable(request.user, by=f"operator:{name_of(caller)}", reason=request.reason)
        return delegations_pb2.EnableUserResponse(changed=done.effect is Effect.DONE)


def _answer(stopped: Stopped) -> delegations_pb2.StopTasksResponse:
    return delegations_pb2.StopTasksResponse(tasks_ended=stopped.tasks_ended, ended_seq=stopped.frame_seq)


def _seconds(moment: datetime) -> int:
    return int(moment.astimezone(UTC).timestamp())
