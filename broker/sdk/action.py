"""For services: something that must be done once, as a block of code. Made by :meth:`broker.sdk.caller.Caller.action`.

Entering the block claims the action, leaving it settles it. A block that is left by an error settles nothing: how much was done is
not known here, so that the action stays claimed, becomes indeterminate, and is done by nobody until its service has settled it.
"""

import asyncio
import secrets
from collections.abc import Iterable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final

from broker._proto.broker.agent.v1 import actions_pb2
from broker._proto.broker.server.v1 import actions_pb2 as server_pb2
from broker._proto.service import ServiceBinding, Stub
from broker.errors import Conflict, Unavailable
from broker.sdk.task_calls import asked, canonical, chosen
from broker.spiffe import strictjson
from broker.tasks.action import ActionState, Claimed, digest_of_parameters

if TYPE_CHECKING:
    from broker.sdk.workload import Workload

RETRY_AFTER: Final = (0.1, 0.5, 1.0)
"""Seconds before a call is made again that had no answer: both may be repeated, and the node agent dials anew within a second."""


class ActionCalls:
    """How a service claims and settles: through its node agent, which says who it is."""

    def __init__(self, workload: "Workload") -> None:
        """Ask through this workload's channel; nothing is asked yet."""
        self._workload = workload
        self._api = Stub(workload.channel, ServiceBinding.of(actions_pb2.DESCRIPTOR, "Actions"))

    async def claim(self, request: actions_pb2.ClaimActionRequest) -> server_pb2.ClaimedAction:
        """Claim; the same request again is the same claim. Raises Refused, Conflict, Invalid, Unavailable."""
        request.spiffe_id = chosen(self._workload)
        claimed: server_pb2.ClaimedAction = await self._answered("ClaimAction", request)
        return claimed

    async def settle(self, action_id: str, state: ActionState, outcome: object) -> None:
        """Say what became of it; raises Conflict when it was settled otherwise, NotFound, Refused, Invalid, Unavailable."""
        request = actions_pb2.SettleActionRequest(
            spiffe_id=chosen(self._workload),
            id=action_id,
            state=state.value,
            outcome="" if outcome is None else canonical(outcome),
        )
        await self._answered("SettleAction", request)

    async def _answered(self, method: str, request: object) -> Any:
        for pause in RETRY_AFTER:
            try:
                return await asked(self._api, method, request)
            except Unavailable:
                await asyncio.sleep(pause)
        return await asked(self._api, method, request)


class Doing:
    """A claimed action, or one that was done before. Made by entering an :class:`ActionBlock`."""

    def __init__(self, calls: ActionCalls, answer: server_pb2.ClaimedAction) -> None:
        """Hold what the claim came to."""
        self._calls = calls
        self._told = answer
        self._is_settled = self.is_duplicate

    @property
    def id(self) -> str:
        """The action's id: kept beside what is done, it tells afterwards what an action in doubt has come to."""
        return self._told.action.id

    @property
    def is_duplicate(self) -> bool:
        """Whether it was done before, and is not to be done again."""
        return self._told.result == Claimed.DUPLICATE

    @property
    def outcome(self) -> strictjson.JsonValue:
        """What it came to when it was done; None where nothing was kept, and while it is being done."""
        told = self._told.action.outcome
        return strictjson.loads(told.encode()) if told else None

    @property
    def is_settled(self) -> bool:
        """Whether there is nothing more to say of it."""
        return self._is_settled

    async def complete(self, outcome: object = None) -> None:
        """Say that it was done. ``outcome``: JSON of at most 1 KiB that whoever retries is told; whole numbers only.

        Raises:
            Conflict: it was settled otherwise, or was done before.
            Unavailable: nobody could be told. It may be said again.
        """
        await self._settle(ActionState.COMPLETED, outcome)

    async def release(self) -> None:
        """Say that it was not done, and may be claimed again; raises as :meth:`complete`."""
        await self._settle(ActionState.RELEASED, None)

    async def _settle(self, state: ActionState, outcome: object) -> None:
        if self.is_duplicate:
            raise Conflict(
                "this was done before, and is not done now",
                code="action_settled",
                hint="look at is_duplicate before anything is done",
            )
        await self._calls.settle(self.id, state, outcome)
        self._is_settled = True


class ActionBlock:
    """What :meth:`broker.sdk.caller.Caller.action` gives: nothing is claimed before ``async with``."""

    def __init__(
        self,
        calls: ActionCalls,
        *,
        token: str,
        action: str,
        resource: str | None,
        step: str,
        parameters: object,
        enforced: Iterable[str],
    ) -> None:
        """Hold the request; raises InvalidJson for parameters that have no canonical form."""
        self._calls = calls
        self._doing: Doing | None = None
        self._request = actions_pb2.ClaimActionRequest(
            token=token,
            action=action,
            identifier=resource or "",
            step=step,
            parameter_digest="" if parameters is None else digest_of_parameters(parameters),
            enforced=enforced,
            idempotency_key=secrets.token_urlsafe(16),
        )

    async def __aenter__(self) -> Doing:
        """Claim it, or hear that it was done; raises as :meth:`broker.sdk.caller.Caller.action` says."""
        self._doing = Doing(self._calls, await self._calls.claim(self._request))
        return self._doing

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Settle it as done, if nothing was said yet and nothing went wrong."""
        assert self._doing is not None
        if error is None and not self._doing.is_settled:
            await self._doing.complete()
