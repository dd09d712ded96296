"""Tasks for local workloads: the same calls as on the server, with the caller's identity set from its attestation.

No request carries an identity. The agent vouches for the attested session by naming its id and the leaf it holds; a
session that shares a spare SVID is not vouched for. What the server answers, errors included, is passed on.
"""

from collections.abc import Callable
from typing import Any, Final

from broker._proto.broker.agent.v1 import tasks_pb2
from broker._proto.broker.server.v1 import sessions_pb2
from broker._proto.broker.server.v1 import tasks_pb2 as server_pb2
from broker._proto.service import Context
from broker.agent.entitlement import Entitlement
from broker.agent.reports import session_message
from broker.agent.svids import SvidKeeper
from broker.agent.upstream import RPC_TIMEOUT, Upstream, answered
from broker.agent.workloads import NO_IDENTITY, Caller
from broker.errors import Invalid, InvalidSpiffeId, NoIdentity, Unavailable
from broker.spiffe import SpiffeId

MAX_TOKEN: Final = 16 * 1024  # a user's token; identity providers stay below 8 KiB


class TasksApi:
    """The methods of ``broker.agent.v1.Tasks``."""

    def __init__(self, entitlement: Entitlement, svids: SvidKeeper, upstream: Upstream) -> None:
        self._entitlement = entitlement
        self._svids = svids
        self._upstream = upstream

    async def StartTask(  # noqa: N802 - the RPC's name
        self, request: tasks_pb2.StartTaskRequest, context: Context, caller: Caller
    ) -> server_pb2.Task:
        """Start a task for a user, with the user's token."""
        if len(request.user_token) > MAX_TOKEN:
            raise Invalid(f"the user's token is longer than {MAX_TOKEN} characters", code="token_too_long")
        forwarded = server_pb2.StartTaskRequest(
            workload=await self._workload(caller, request.spiffe_id),
            user_token=request.user_token,
            purpose=request.purpose,
            authorization_details=request.authorization_details,
            ttl=request.ttl,
            limits=request.limits,
            supervision=request.supervision,
            idempotency_key=request.idempotency_key,
        )
        task: server_pb2.Task = await self._forward(self._upstream.tasks.StartTask, forwarded, context, caller)
        return task

    async def IssueToken(  # noqa: N802
        self, request: tasks_pb2.IssueTokenRequest, context: Context, caller: Caller
    ) -> server_pb2.IssuedToken:
        """Get a token of a task for one resource."""
        forwarded = server_pb2.IssueTokenRequest(
            workload=await self._workload(caller, request.spiffe_id),
            task_id=request.task_id,
            resource=request.resource,
            scope=request.scope,
            authorization_details=request.authorization_details,
            idempotency_key=request.idempotency_key,
            jkt=request.jkt,
            bearer=request.bearer,
        )
        issued: server_pb2.IssuedToken = await self._forward(
            self._upstream.tasks.IssueToken, forwarded, context, caller
        )
        return issued

    async def CompleteTask(  # noqa: N802
        self, request: tasks_pb2.CompleteTaskRequest, context: Context, caller: Caller
    ) -> server_pb2.Task:
        """End a task: every token of it dies."""
        forwarded = server_pb2.CompleteTaskRequest(
            workload=await self._workload(caller, request.spiffe_id),
            task_id=request.task_id,
            expected_version=request.expected_version,
            idempotency_key=request.idempotency_key,
        )
        task: server_pb2.Task = await self._forward(self._upstream.tasks.CompleteTask, forwarded, context, caller)
        return task

    async def _workload(self, caller: Caller, wanted: str) -> sessions_pb2.WorkloadSession:
        session, entries = await self._entitlement.of(caller)
        try:
            spiffe_id = SpiffeId(wanted) if wanted else entries[0].spiffe_id
        except InvalidSpiffeId as error:
            raise Invalid(f"invalid requested SPIFFE ID: {error.message}", code=error.reason) from None
        chosen = [entry for entry in entries if entry.spiffe_id == spiffe_id][:1]
        if not chosen:
            raise NoIdentity(NO_IDENTITY)
        (identity,) = await self._svids.x509(session, chosen)
        self._entitlement.check(session)
        if identity.x509 is None or identity.x509.shared:
            raise Unavailable("this process has no SVID of its own while the server is away", code="svid_shared")
        return session_message(identity)

    async def _forward(self, call: Callable[..., Any], request: Any, context: Context, caller: Caller) -> Any:
        left = context.time_remaining()  # None: no deadline, whatever grpcio's stubs say
        answer = await answered(call(request, timeout=min(left or RPC_TIMEOUT, RPC_TIMEOUT)))
        # The answer may hold a token: only the process that asked may have it.
        self._entitlement.check(await self._entitlement.session(caller))
        return answer
