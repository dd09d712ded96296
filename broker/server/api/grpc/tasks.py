"""``broker.server.v1.Tasks``: node agents start tasks and fetch tokens for the workloads they attested; operators look and revoke.

An agent vouches: which process asks is its word, taken only for entries that it may serve. Nothing here decides.
"""

from datetime import UTC, datetime
from typing import Final

from broker._proto.broker.server.v1 import sessions_pb2, tasks_pb2
from broker._proto.service import Context, ServiceBinding
from broker.audit.events import Event
from broker.clock import Clock
from broker.errors import Invalid
from broker.server.api.access import Caller, agent_of, name_of
from broker.server.store.ports import Reader, Store
from broker.server.store.rows import TaskFilter
from broker.server.tasks.decision import task_unknown
from broker.server.tasks.exchange import Exchange
from broker.server.tasks.feed import Feed
from broker.server.tasks.lifecycle import Lifecycle
from broker.server.tasks.refusals import Refusals
from broker.server.tasks.requests import Actor, Door, IssueRequest, StartRequest
from broker.spiffe import SpiffeId
from broker.spiffe.jose import MAX_DATE
from broker.tasks import Authority, Resource, State, Supervision, Task, effective_state
from broker.tasks.texts import ID, SERIAL_NUMBER, THUMBPRINT

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
        lifecycle: Lifecycle,
        feed: Feed,
        refusals: Refusals,
    ) -> None:
        self._store = store
        self._clock = clock
        self._exchange = exchange
        self._lifecycle = lifecycle
        self._feed = feed
        self._refusals = refusals

    # ---- for node agents

    async def StartTask(  # noqa: N802 - the RPC's name
        self, request: tasks_pb2.StartTaskRequest, context: Context, caller: Caller
    ) -> tasks_pb2.Task:
        """Start a task for an attested workload."""
        actor = _vouched(request.workload, caller)
        async with self._refusals.recorded(Event.TASK_REFUSED, actor, ""):
            start = StartRequest(
                user_token=request.user_token,
                purpose=request.purpose,
                authority=Authority.parse(request.authorization_details),
                ttl=request.ttl,
                supervision=_supervision(request.supervision),
                limits=request.limits,
                idempotency_key=request.idempotency_key,
            )
        return self._written(await self._exchange.start(actor, start), 0)

    async def IssueToken(  # noqa: N802 - the RPC's name
        self, request: tasks_pb2.IssueTokenRequest, context: Context, caller: Caller
    ) -> tasks_pb2.IssuedToken:
        """Issue a token of a task of that very workload."""
        actor = _vouched(request.workload, caller)
        async with self._refusals.recorded(Event.TOKEN_REFUSED, actor, ""):
            if not request.task_id:
                raise task_unknown()
            details = request.authorization_details
            issue = IssueRequest(
                resource=Resource(request.resource),
                task_id=request.task_id,
                scope=request.scope,
                authority=Authority.parse(details) if details else None,
                idempotency_key=request.idempotency_key,
                jkt=request.jkt,
                bearer=request.bearer,
            )
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
        over = await self._lifecycle.complete(
            _vouched(request.workload, caller),
            _task_id(request.task_id),
            expected_version=_version(request.expected_version),
            idempotency_key=request.idempotency_key,
        )
        return self._written(over.task, 0, over.frame_seq)

    # ---- for operators

    async def GetTask(  # noqa: N802 - the RPC's name
        self, request: tasks_pb2.GetTaskRequest, context: Context, caller: Caller
    ) -> tasks_pb2.Task:
        """Give one task."""
        task_id = _task_id(request.id)

        def query(reader: Reader) -> tuple[Task | None, int]:
            return reader.task(task_id), reader.tokens_issued(task_id)

        task, tokens = await self._store.read(query)
        if task is None:
            raise task_unknown()
        return self._written(task, tokens)

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
        over = await self._lifecycle.revoke(
            _task_id(request.task_id),
            by=f"operator:{name_of(caller)}",
            expected_version=_version(request.expected_version),
            reason=request.reason,
        )
        return self._written(over.task, 0, over.frame_seq)

    def _written(self, task: Task, tokens: int, frame_seq: int = 0) -> tasks_pb2.Task:
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
            ended_seq=frame_seq or self._feed.frame_of(task.id),
        )


def _vouched(workload: sessions_pb2.WorkloadSession, caller: Caller) -> Actor:
    """Read whom a node agent speaks for; raises Refused for another caller, Invalid for half a workload."""
    agent = agent_of(caller)
    if ID.fullmatch(workload.id) is None or THUMBPRINT.fullmatch(workload.x5t) is None or not workload.entry_id:
        raise Invalid("the workload's session, entry or certificate is missing or malformed", code="workload_missing")
    if SERIAL_NUMBER.fullmatch(workload.serial_number) is None:
        raise Invalid("the certificate's serial number is malformed", code="invalid_serial")
    if not 0 < workload.not_after <= MAX_DATE:
        raise Invalid("the end of the workload's certificate is missing", code="workload_missing")
    return Actor(
        spiffe_id=SpiffeId(workload.spiffe_id),
        x5t=workload.x5t,
        not_after=datetime.fromtimestamp(workload.not_after, UTC),
        door=Door.AGENT,
        session=workload.id,
        entry_id=workload.entry_id,
        agent=agent.id,
        serial=workload.serial_number,
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
    )


def _supervision(text: str) -> Supervision | None:
    if not text:
        return None
    try:
        return Supervision(text)
    except ValueError:
        raise Invalid("there is no such supervision", code="invalid_supervision", hint="attached or none") from None


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
