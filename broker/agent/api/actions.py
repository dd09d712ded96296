"""Actions that a local service does once: claimed and settled at the server, for the service that its attestation says it is."""

from broker._proto.broker.agent.v1 import actions_pb2
from broker._proto.broker.server.v1 import actions_pb2 as server_pb2
from broker._proto.service import Context
from broker.agent.api.on_behalf import OnBehalf
from broker.agent.workloads import Caller
from broker.errors import Invalid
from broker.spiffe.jose import MAX_TOKEN


class ActionsApi(OnBehalf):
    """The methods of ``broker.agent.v1.Actions``. Whether a service may is the server's to say."""

    async def ClaimAction(  # noqa: N802 - the RPC's name
        self, request: actions_pb2.ClaimActionRequest, context: Context, caller: Caller
    ) -> server_pb2.ClaimedAction:
        """Ask whether something may be done now, or was done before."""
        if len(request.token) > MAX_TOKEN:
            raise Invalid(f"the token is longer than {MAX_TOKEN} characters", code="token_too_long")
        forwarded = server_pb2.ClaimActionRequest(
            workload=await self._workload(caller, request.spiffe_id),
            token=request.token,
            action=request.action,
            identifier=request.identifier,
            step=request.step,
            parameter_digest=request.parameter_digest,
            enforced=request.enforced,
            idempotency_key=request.idempotency_key,
        )
        claimed: server_pb2.ClaimedAction = await self._forward(
            self._upstream.actions.ClaimAction, forwarded, context, caller
        )
        return claimed

    async def SettleAction(  # noqa: N802 - the RPC's name
        self, request: actions_pb2.SettleActionRequest, context: Context, caller: Caller
    ) -> server_pb2.Action:
        """Say what became of it."""
        forwarded = server_pb2.SettleActionRequest(
            workload=await self._workload(caller, request.spiffe_id),
            id=request.id,
            state=request.state,
            outcome=request.outcome,
        )
        action: server_pb2.Action = await self._forward(self._upstream.actions.SettleAction, forwarded, context, caller)
        return action
