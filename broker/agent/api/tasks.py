"""Tasks for local workloads: the same calls as on the server, with the caller's identity set from its attestation.

How the agent vouches for a caller is in :mod:`broker.agent.api.on_behalf`. What the server answers, errors included, is passed on.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing
from typing import Final

from broker._proto.broker.agent.v1 import tasks_pb2
from broker._proto.broker.server.v1 import tasks_pb2 as server_pb2
from broker._proto.service import Context
from broker.agent.api.on_behalf import OnBehalf, time_left
from broker.agent.attachments import Attachments, Held
from broker.agent.cache import Bell, EstateCache
from broker.agent.entitlement import Entitlement
from broker.agent.reports import SessionReports
from broker.agent.sessions import WorkloadSession
from broker.agent.svids import SvidKeeper
from broker.agent.token_stream import TokenStream
from broker.agent.upstream import Upstream
from broker.agent.workloads import Caller
from broker.errors import Invalid, Refused
from broker.tasks import State

MAX_TOKEN: Final = 16 * 1024  # a user's token; identity providers stay below 8 KiB


class TasksApi(OnBehalf):
    """The methods of ``broker.agent.v1.Tasks``."""

    def __init__(
        self,
        entitlement: Entitlement,
        svids: SvidKeeper,
        upstream: Upstream,
        tokens: TokenStream,
        *,
        cache: EstateCache,
        reports: SessionReports,
        attachments: Attachments,
        on_over: Callable[[frozenset[str]], None],
    ) -> None:
        """``on_over`` is told of a living session that the server takes for ended."""
        super().__init__(entitlement, svids, upstream, reports=reports, on_over=on_over)
        self._cache = cache
        self._attachments = attachments
        self._tokens = tokens

    async def StartTask(  # noqa: N802 - the RPC's name
        self, request: tasks_pb2.StartTaskRequest, context: Context, caller: Caller
    ) -> server_pb2.Task:
        """Start a task for a user, with the user's token."""
        _check_length(request.user_token)
        forwarded = server_pb2.StartTaskRequest(
            workload=await self._workload(caller, request.spiffe_id),
            user_token=request.user_token,
            purpose=request.purpose,
            authorization_details=request.authorization_details,
            ttl=request.ttl,
            limits=request.limits,
            supervision=request.supervision,
            idempotency_key=request.idempotency_key,
            delegation_id=request.delegation_id,
        )
        task: server_pb2.Task = await self._forward(self._upstream.tasks.StartTask, forwarded, context, caller)
        return task

    async def IssueToken(  # noqa: N802
        self, request: tasks_pb2.IssueTokenRequest, context: Context, caller: Caller
    ) -> server_pb2.IssuedToken:
        """Get a token of a task for one resource."""
        _check_length(request.user_token)
        session, workload = await self._named(caller, request.spiffe_id)
        forwarded = server_pb2.IssueTokenRequest(
            workload=workload,
            task_id=request.task_id,
            resource=request.resource,
            scope=request.scope,
            authorization_details=request.authorization_details,
            idempotency_key=request.idempotency_key,
            requested_token_type=request.requested_token_type,
            audience=request.audience,
            request_context=request.request_context,
            request_details=request.request_details,
            jkt=request.jkt,
            parameter_digest=request.parameter_digest,
            bearer=request.bearer,
            user_token=request.user_token,
        )
        # Its process is looked at by who sends it, before that and before the answer is handed on.
        try:
            return await self._tokens.issue(forwarded, session, time_left(context))
        except Refused as error:
            self._take_note(error, workload)
            raise

    async def CompleteTask(  # noqa: N802
        self, request: tasks_pb2.CompleteTaskRequest, context: Context, caller: Caller
    ) -> server_pb2.Task:
        """End a task: every token of it dies."""
        workload = await self._workload(caller, request.spiffe_id)
        # A process may end what it did not start, and then this is the first that the server would hear of it.
        await self._reports.settle(workload.id)
        forwarded = server_pb2.CompleteTaskRequest(
            workload=workload,
            task_id=request.task_id,
            expected_version=request.expected_version,
            idempotency_key=request.idempotency_key,
        )
        task: server_pb2.Task = await self._forward(self._upstream.tasks.CompleteTask, forwarded, context, caller)
        self._attachments.forget(request.task_id)
        return task

    async def RenewLease(  # noqa: N802
        self, request: tasks_pb2.RenewLeaseRequest, context: Context, caller: Caller
    ) -> server_pb2.Lease:
        """Pass a heartbeat on."""
        forwarded = server_pb2.RenewLeaseRequest(
            workload=await self._workload(caller, request.spiffe_id), task_id=request.task_id
        )
        lease: server_pb2.Lease = await self._forward(self._upstream.tasks.RenewLease, forwarded, context, caller)
        return lease

    async def Attach(  # noqa: N802
        self, requests: AsyncIterator[tasks_pb2.AttachRequest], context: Context, caller: Caller
    ) -> AsyncIterator[tasks_pb2.AttachResponse]:
        """Hold an attached task for as long as the caller answers: beats, until one side ends it."""
        first = await anext(requests, None)
        if first is None:
            raise Invalid("say first which task it is", code="task_missing")
        session = await self._entitlement.session(caller)
        workload = await self._workload(caller, first.spiffe_id)
        if self._reports.is_letting_go(first.task_id):
            raise _suspended()
        forwarded = server_pb2.AttachTaskRequest(workload=workload, task_id=first.task_id)
        lease: server_pb2.Lease = await self._forward(self._upstream.tasks.AttachTask, forwarded, context, caller)
        with (
            self._attachments.holding(first.task_id, workload.id, lease.ttl) as held,
            session.listening(self._cache) as bell,
        ):
            reader = asyncio.create_task(_answers(requests, held, bell), name="attached-answers")
            try:
                async with aclosing(self._beats(held, bell, reader, session)) as beats:
                    async for beat in beats:
                        yield tasks_pb2.AttachResponse(beat=beat, ttl=lease.ttl)
            finally:
                reader.cancel()
                await asyncio.gather(reader, return_exceptions=True)

    async def _beats(
        self, held: Held, bell: Bell, reader: "asyncio.Task[None]", session: WorkloadSession
    ) -> AsyncGenerator[int, None]:
        """Give the beats as they are due; ends when the caller has closed its half, raises when it does not answer."""
        loop = asyncio.get_running_loop()
        while not reader.done():
            if not self._attachments.is_held(held):
                raise Refused("the task is over, or this process has lost its identity", code="task_ended")
            yield held.beat()
            if held.is_silent:
                self._attachments.silent(held)
                raise _suspended()
            due = loop.time() + held.every
            while not reader.done() and (left := due - loop.time()) > 0:
                await bell.wait(left)
                self._entitlement.check(session)

    async def StartChildTask(  # noqa: N802
        self, request: tasks_pb2.StartChildTaskRequest, context: Context, caller: Caller
    ) -> server_pb2.Task:
        """Start a task below one of the caller's own, for another workload."""
        forwarded = server_pb2.StartChildTaskRequest(
            workload=await self._workload(caller, request.spiffe_id),
            parent=request.parent,
            agent=request.agent,
            purpose=request.purpose,
            authorization_details=request.authorization_details,
            ttl=request.ttl,
            supervision=request.supervision,
            idempotency_key=request.idempotency_key,
            limits=request.limits,
        )
        task: server_pb2.Task = await self._forward(self._upstream.tasks.StartChildTask, forwarded, context, caller)
        return task

    async def ChangeTask(  # noqa: N802
        self, request: tasks_pb2.ChangeTaskRequest, context: Context, caller: Caller
    ) -> server_pb2.ChangedTask:
        """Take up, suspend, resume, end or hand off a task of the caller's own."""
        workload = await self._workload(caller, request.spiffe_id)
        # As in CompleteTask: what a process takes up or stops it need not have started.
        await self._reports.settle(workload.id)
        forwarded = server_pb2.ChangeOwnTaskRequest(
            workload=workload,
            task_id=request.task_id,
            operation=request.operation,
            to=request.to,
            expected_version=request.expected_version,
            idempotency_key=request.idempotency_key,
        )
        changed: server_pb2.ChangedTask = await self._forward(
            self._upstream.tasks.ChangeOwnTask, forwarded, context, caller
        )
        if changed.task.state != State.ACTIVE:
            # Nobody need hold it: it is over, or waits for its resume.
            self._attachments.forget(request.task_id)
        return changed


async def _answers(requests: AsyncIterator[tasks_pb2.AttachRequest], held: Held, bell: Bell) -> None:
    try:
        async for request in requests:
            held.answer(request.beat)
    finally:
        bell.ring()


def _suspended() -> Refused:
    return Refused(
        "this process did not answer for the task in time", code="task_suspended", hint="resume it, or start a new one"
    )


def _check_length(user_token: str) -> None:
    if len(user_token) > MAX_TOKEN:
        raise Invalid(f"the user's token is longer than {MAX_TOKEN} characters", code="token_too_long")
