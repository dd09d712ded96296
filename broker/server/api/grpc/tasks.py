"""``broker.server.v1.Tasks``: node agents start tasks and fetch tokens for the workloads they attested; operators look and revoke.

An agent vouches: which process asks is its word, taken only for entries that it may serve. Nothing here decides.
"""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from datetime import datetime
from typing import Final

from broker._proto.broker.server.v1 import sessions_pb2, tasks_pb2
from broker._proto.service import Context, ServiceBinding
from broker.audit.events import Event
from broker.clock import Clock
from broker.errors import Invalid
from broker.server.api.access import Caller, name_of
from broker.server.api.grpc.task_formats import read_assertion, written_assertion
from broker.server.api.grpc.token_streams import TokenStreams
from broker.server.api.grpc.vouched import vouched
from broker.server.store.ports import Reader, Store
from broker.server.store.rows import TaskFilter
from broker.server.tasks.assertions import Assertions
from broker.server.tasks.changes import Changes
from broker.server.tasks.decision import task_unknown
from broker.server.tasks.deliveries import Delivery
from broker.server.tasks.exchange import Exchange
from broker.server.tasks.feed import Feed
from broker.server.tasks.kept import Changed
from broker.server.tasks.lifecycle import Lifecycle
from broker.server.tasks.refusals import Refusals
from broker.server.tasks.requests import (
    Actor,
    ChangeRequest,
    ChildRequest,
    IssueRequest,
    Operation,
    StartRequest,
)
from broker.server.tasks.supervisor import Lease, Supervisor
from broker.spiffe import SpiffeId
from broker.tasks import Authority, Resource, State, Supervision, Task, act_chain, effective_state, lineage_state
from broker.tasks.texts import ID

BINDING: Final = ServiceBinding.of(tasks_pb2.DESCRIPTOR, "Tasks")
MAX_PAGE: Final = 500
"""Tasks in one answer: the largest ones still fit into 4 MiB."""
DEFAULT_PAGE: Final = 100


class Tasks:
    """Serves tasks. The access table says which callers come through to which method."""

    def __init__(
        self,
        *,
        store: Store,
        clock: Clock,
        exchange: Exchange,
        assertions: Assertions,
        lifecycle: Lifecycle,
        changes: Changes,
        feed: Feed,
        refusals: Refusals,
        supervisor: Supervisor,
    ) -> None:
        self._store = store
        self._clock = clock
        self._exchange = exchange
        self._assertions = assertions
        self._lifecycle = lifecycle
        self._changes = changes
        self._feed = feed
        self._refusals = refusals
        self._supervisor = supervisor
        self._streams = TokenStreams(self._issue)

    # ---- for node agents

    async def StartTask(  # noqa: N802 - the RPC's name
        self, request: tasks_pb2.StartTaskRequest, context: Context, caller: Caller
    ) -> tasks_pb2.Task:
        """Start a task for an attested workload."""
        actor = vouched(request.workload, caller)
        async with self._refusals.recorded(Event.TASK_REFUSED, actor, ""):
            start = StartRequest(
                user_token=request.user_token,
                purpose=request.purpose,
                authority=Authority.parse(request.authorization_details),
                ttl=request.ttl,
                supervision=_supervision(request.supervision),
                limits=request.limits,
                idempotency_key=request.idempotency_key,
                delegation_id=request.delegation_id,
            )
        return self._written(await self._exchange.start(actor, start), 0)

    async def IssueToken(  # noqa: N802 - the RPC's name
        self, request: tasks_pb2.IssueTokenRequest, context: Context, caller: Caller
    ) -> tasks_pb2.IssuedToken:
        """Issue a token of a task of that very workload."""
        return await self._issue(request, caller)

    async def IssueTokens(  # noqa: N802 - the RPC's name
        self, requests: AsyncIterator[tasks_pb2.IssueTokensRequest], context: Context, caller: Caller
    ) -> AsyncIterator[tasks_pb2.IssueTokensResponse]:
        """Issue tokens for many workloads of one agent, each as if it were asked for alone."""
        async with aclosing(self._streams.serve(requests, caller)) as answers:
            async for answer in answers:
                yield answer

    async def _issue(self, request: tasks_pb2.IssueTokenRequest, caller: Caller) -> tasks_pb2.IssuedToken:
        actor = vouched(request.workload, caller)
        async with self._refusals.recorded(Event.TOKEN_REFUSED, actor, ""):
            if not request.task_id:
                raise task_unknown()
            other = read_assertion(request)
            details = request.authorization_details
            issue = (
                IssueRequest(
                    resource=Resource(request.resource),
                    task_id=request.task_id,
                    scope=request.scope,
                    authority=Authority.parse(details) if details else None,
                    idempotency_key=request.idempotency_key,
                    jkt=request.jkt,
                    parameter_digest=request.parameter_digest,
                    bearer=request.bearer,
                    user_token=request.user_token,
                )
                if other is None
                else None
            )
        if other is not None:
            return written_assertion(await self._assertions.issue(actor, other))
        assert issue is not None
        issued = await self._exchange.issue(actor, issue)
        return tasks_pb2.IssuedToken(
            access_token=issued.access_token,
            token_type=issued.token_type,
            expires_at=_seconds(issued.expires_at),
            scope=issued.scope,
            authorization_details=issued.authority.text(),
            task_id=issued.task_id,
        )

    async def CompleteTask(  # noqa: N802 - the RPC's name
        self, request: tasks_pb2.CompleteTaskRequest, context: Context, caller: Caller
    ) -> tasks_pb2.Task:
        """End a task of that very workload."""
        actor = vouched(request.workload, caller)
        async with self._refusals.recorded(Event.TASK_REFUSED, actor, request.task_id):
            over = await self._lifecycle.complete(
                actor,
                _task_id(request.task_id),
                expected_version=_version(request.expected_version),
                idempotency_key=request.idempotency_key,
            )
        return self._written(over.task, 0, over.frame_seq)

    async def RenewLease(  # noqa: N802 - the RPC's name
        self, request: tasks_pb2.RenewLeaseRequest, context: Context, caller: Caller
    ) -> tasks_pb2.Lease:
        """Take in a heartbeat of a task of that very workload."""
        return await self._kept(request.workload, request.task_id, caller, self._supervisor.renew)

    async def AttachTask(  # noqa: N802 - the RPC's name
        self, request: tasks_pb2.AttachTaskRequest, context: Context, caller: Caller
    ) -> tasks_pb2.Lease:
        """Say whether that very workload may hold on to its task, and for how long it may be silent."""
        return await self._kept(request.workload, request.task_id, caller, self._supervisor.attach)

    async def _kept(
        self,
        workload: sessions_pb2.WorkloadSession,
        task_id: str,
        caller: Caller,
        keep: Callable[[Actor, str], Awaitable[Lease]],
    ) -> tasks_pb2.Lease:
        actor = vouched(workload, caller)
        async with self._refusals.recorded(Event.TASK_REFUSED, actor, task_id if ID.fullmatch(task_id) else ""):
            lease = await keep(actor, _task_id(task_id))
        return tasks_pb2.Lease(task_id=task_id, ttl=lease.ttl, left=lease.left)

    async def StartChildTask(  # noqa: N802 - the RPC's name
        self, request: tasks_pb2.StartChildTaskRequest, context: Context, caller: Caller
    ) -> tasks_pb2.Task:
        """Start a task below one of that very workload's, for another workload."""
        actor = vouched(request.workload, caller)
        async with self._refusals.recorded(Event.TASK_REFUSED, actor, request.parent):
            asked = ChildRequest(
                parent=_task_id(request.parent),
                agent=SpiffeId(request.agent),
                purpose=request.purpose,
                authority=Authority.parse(request.authorization_details),
                ttl=request.ttl,
                supervision=_supervision(request.supervision),
                limits=request.limits,
                idempotency_key=request.idempotency_key,
            )
        return self._written(await self._changes.start_child(actor, asked), 0)

    async def ChangeOwnTask(  # noqa: N802 - the RPC's name
        self, request: tasks_pb2.ChangeOwnTaskRequest, context: Context, caller: Caller
    ) -> tasks_pb2.ChangedTask:
        """Change a task of that very workload, or one below it."""
        actor = vouched(request.workload, caller)
        async with self._refusals.recorded(Event.TASK_REFUSED, actor, request.task_id):
            asked = _change(request)
        return self._changed(await self._changes.change(actor, asked))

    # ---- for operators

    async def GetTask(  # noqa: N802 - the RPC's name
        self, request: tasks_pb2.GetTaskRequest, context: Context, caller: Caller
    ) -> tasks_pb2.Task:
        """Give one task."""
        task_id = _task_id(request.id)

        def query(reader: Reader) -> tuple[tuple[Task, ...], tuple[int, int, int]]:
            counts = reader.tokens_issued(task_id), reader.children_of(task_id), reader.resumes_of(task_id)
            return reader.lineage(task_id), counts

        lineage, (tokens, children, resumes) = await self._store.read(query)
        if not lineage:
            raise task_unknown()
        task, ancestors = lineage[-1], lineage[-2::-1]
        written = self._written(task, tokens)
        written.state = lineage_state(task, ancestors, self._clock.now()).value
        written.act.extend(map(str, act_chain(task, ancestors)))
        written.children, written.resumes = children, resumes
        return written

    async def ListTasks(  # noqa: N802 - the RPC's name
        self, request: tasks_pb2.ListTasksRequest, context: Context, caller: Caller
    ) -> tasks_pb2.ListTasksResponse:
        """Give a page of tasks, oldest first. ``state``: empty for all, ``live``, or the name of a state."""
        wanted = _filter(request)
        size = min(request.page_size or DEFAULT_PAGE, MAX_PAGE)
        if size < 0:
            raise Invalid("the page size is negative", code="invalid_page_size")

        def query(reader: Reader) -> tuple[list[tuple[Task, int]], str]:
            page = reader.list_tasks(wanted, after=request.page_token or None, limit=size)
            return [(task, reader.tokens_issued(task.id)) for task in page.tasks], page.next or ""

        tasks, following = await self._store.read(query)
        return tasks_pb2.ListTasksResponse(
            tasks=[self._written(task, tokens) for task, tokens in tasks], next_page_token=following
        )

    async def RevokeTask(  # noqa: N802 - the RPC's name
        self, request: tasks_pb2.RevokeTaskRequest, context: Context, caller: Caller
    ) -> tasks_pb2.Task:
        """End a task because an operator says so."""
        asked = ChangeRequest(
            _task_id(request.task_id),
            Operation.REVOKE,
            expected_version=_version(request.expected_version),
            idempotency_key=request.idempotency_key,
            reason=request.reason,
        )
        over = await self._changes.change_as_operator(f"operator:{name_of(caller)}", asked)
        return self._written(over.task, 0, over.frame_seq)

    async def ChangeTask(  # noqa: N802 - the RPC's name
        self, request: tasks_pb2.ChangeTaskRequest, context: Context, caller: Caller
    ) -> tasks_pb2.ChangedTask:
        """Suspend, resume, end or hand off a task because an operator says so."""
        asked = _change(request, request.reason)
        return self._changed(await self._changes.change_as_operator(f"operator:{name_of(caller)}", asked))

    def _changed(self, changed: Changed) -> tasks_pb2.ChangedTask:
        answer = tasks_pb2.ChangedTask(task=self._written(changed.task, 0, changed.frame_seq))
        if changed.successor is not None:
            answer.successor.CopyFrom(self._written(changed.successor, 0))
        return answer

    def _written(self, task: Task, tokens: int, frame_seq: int = 0) -> tasks_pb2.Task:
        lease = self._supervisor.lease_of(task)
        seq = frame_seq or (0 if task.state is State.ACTIVE else self._feed.frame_of(task.id))
        return tasks_pb2.Task(
            id=task.id,
            root=task.root,
            parent=task.parent or "",
            depth=task.depth,
            user=task.user,
            agent=str(task.agent),
            purpose=task.purpose,
            authorization_details=task.authority.text(),
            state=effective_state(task, self._clock.now()).value,
            version=task.version,
            cause="" if task.cause is None else task.cause.value,
            supervision=task.supervision.value,
            created_at=_seconds(task.created_at),
            expires_at=_seconds(task.expires_at),
            ended_at=0 if task.ended_at is None else _seconds(task.ended_at),
            tokens_issued=tokens,
            ended_seq=seq,
            supersedes=task.supersedes or "",
            revocation=_revocation(self._feed.delivery(seq)) if seq else None,
            lease_ttl=0.0 if lease is None else lease.ttl,
            lease_left=0.0 if lease is None else lease.left,
        )


def _change(request: tasks_pb2.ChangeOwnTaskRequest | tasks_pb2.ChangeTaskRequest, reason: str = "") -> ChangeRequest:
    try:
        operation = Operation(request.operation)
    except ValueError:
        raise Invalid("there is no such operation on a task", code="invalid_operation") from None
    return ChangeRequest(
        _task_id(request.task_id),
        operation,
        to=SpiffeId(request.to) if request.to else None,
        expected_version=_version(request.expected_version),
        idempotency_key=request.idempotency_key,
        reason=reason,
    )


def _revocation(delivery: Delivery) -> tasks_pb2.Revocation:
    return tasks_pb2.Revocation(
        state=delivery.outcome.value,
        expected=delivery.expected,
        acked=delivery.acked,
        max_ms=round(delivery.max_seconds * 1000, 3),
    )


def _filter(request: tasks_pb2.ListTasksRequest) -> TaskFilter:
    state: State | None = None
    if request.state not in ("", "live"):
        try:
            state = State(request.state)
        except ValueError:
            raise Invalid("there is no such state", code="invalid_state", hint="live, or the name of a state") from None
    return TaskFilter(
        live=request.state == "live",
        state=state,
        user=request.user or None,
        agent=SpiffeId(request.agent) if request.agent else None,
        root=request.root or None,
        parent=request.parent or None,
    )


def _supervision(text: str) -> Supervision | None:
    if not text:
        return None
    try:
        return Supervision(text)
    except ValueError:
        raise Invalid(
            "there is no such supervision", code="invalid_supervision", hint="attached, lease or none"
        ) from None


def _task_id(text: str) -> str:
    if ID.fullmatch(text) is None:
        raise task_unknown()
    return text


def _version(number: int) -> int | None:
    if number < 0:
        raise Invalid("the expected version is negative", code="invalid_version")
    return number or None


def _seconds(moment: datetime) -> int:
    return int(moment.timestamp())
