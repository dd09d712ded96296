"""``broker.server.v1.Actions``: node agents claim and settle, for the services they attested, what is to be done once.

Whether a service may is not decided here.
"""

from typing import Final

from broker._proto.broker.server.v1 import actions_pb2
from broker._proto.service import Context, ServiceBinding
from broker.audit.events import Event
from broker.clock import Clock
from broker.server.api.access import Caller
from broker.server.api.grpc.vouched import vouched
from broker.server.tasks.actions import Actions as ActionCases
from broker.server.tasks.actions import ClaimRequest, SettleRequest
from broker.server.tasks.refusals import Refusals
from broker.tasks.action import ActionRecord, effective_action_state

BINDING: Final = ServiceBinding.of(actions_pb2.DESCRIPTOR, "Actions")


class Actions:
    """Serves actions. The access table says which callers come through to which method."""

    def __init__(self, actions: ActionCases, clock: Clock, refusals: Refusals) -> None:
        self._actions = actions
        self._clock = clock
        self._refusals = refusals

    async def ClaimAction(  # noqa: N802 - the RPC's name
        self, request: actions_pb2.ClaimActionRequest, context: Context, caller: Caller
    ) -> actions_pb2.ClaimedAction:
        """Let an attested service do something once, or tell it that it was done."""
        actor = vouched(request.workload, caller)
        async with self._refusals.recorded(Event.ACTION_REFUSED, actor, ""):
            asked = ClaimRequest(
                token=request.token,
                action=request.action,
                step=request.step,
                identifier=request.identifier or None,
                parameter_digest=request.parameter_digest or None,
                enforced=frozenset(request.enforced),
                idempotency_key=request.idempotency_key,
            )
        answer = await self._actions.claim(actor, asked)
        return actions_pb2.ClaimedAction(result=answer.result.value, action=self._written(answer.record))

    async def SettleAction(  # noqa: N802 - the RPC's name
        self, request: actions_pb2.SettleActionRequest, context: Context, caller: Caller
    ) -> actions_pb2.Action:
        """Take down what became of an action of that very service."""
        actor = vouched(request.workload, caller)
        async with self._refusals.recorded(Event.ACTION_REFUSED, actor, ""):
            asked = SettleRequest.parse(request.id, request.state, request.outcome)
        return self._written(await self._actions.settle(actor, asked))

    def _written(self, record: ActionRecord) -> actions_pb2.Action:
        return actions_pb2.Action(
            id=record.id,
            task_id=record.task,
            state=effective_action_state(record, self._clock.now()).value,
            outcome=record.outcome or "",
            claimed_at=int(record.claimed_at.timestamp()),
            settle_by=int(record.settle_by.timestamp()),
            settled_at=0 if record.settled_at is None else int(record.settled_at.timestamp()),
        )
