"""Blocks of code with a task: entering starts it, or takes it up; leaving ends it, however it is left."""

import asyncio
import contextlib
import secrets
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING

from typing_extensions import override

from broker._proto.broker.agent.v1 import tasks_pb2
from broker._proto.broker.server.v1 import tasks_pb2 as server_pb2
from broker._proto.service import Stub
from broker.clock import Clock, SystemClock
from broker.errors import BrokerError, Unavailable
from broker.sdk.task import Task
from broker.sdk.task_calls import asked, canonical, chosen, tasks_api
from broker.tasks import State

if TYPE_CHECKING:
    from broker.sdk.workload import Workload

COMPLETE_SECONDS = 10.0
"""How long leaving the block tries to end the task before it gives up and says so."""


class _Block(ABC):
    """A task that lives as long as a block of code; how it begins is the subclass's."""

    def __init__(self, workload: "Workload", clock: Clock | None) -> None:
        self._workload = workload
        self._clock = clock or SystemClock()
        self._task: Task | None = None

    @abstractmethod
    async def _begin(self, api: Stub) -> server_pb2.Task: ...

    async def __aenter__(self) -> Task:
        """Begin."""
        api = tasks_api(self._workload)
        self._task = Task(self._workload, await self._begin(api), clock=self._clock)
        await self._task.keeper.start()
        return self._task

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the task, also when the block was left by an error or by cancellation; one that was given away has ended."""
        assert self._task is not None
        ending = asyncio.ensure_future(_end(self._task))
        try:
            await asyncio.shield(ending)
        except asyncio.CancelledError:
            with contextlib.suppress(BrokerError):
                await ending
            raise
        except BrokerError:
            if error is None:
                raise
        finally:
            self._task.let_go()
            await self._task.keeper.stop()


class TaskBlock(_Block):
    """What :meth:`broker.sdk.Workload.task` gives: nothing is started before ``async with``."""

    def __init__(
        self,
        workload: "Workload",
        *,
        user_token: str,
        delegation: str = "",
        purpose: str,
        authorization_details: Sequence[Mapping[str, object]],
        ttl: int,
        limits: Mapping[str, object],
        supervision: str,
        idempotency_key: str,
        clock: Clock | None = None,
    ) -> None:
        """Hold the request."""
        super().__init__(workload, clock)
        self._request = tasks_pb2.StartTaskRequest(
            spiffe_id=chosen(workload),
            user_token=user_token,
            delegation_id=delegation,
            purpose=purpose,
            authorization_details=canonical(authorization_details),
            ttl=ttl,
            limits=canonical(limits) if limits else "",
            supervision=supervision,
            idempotency_key=idempotency_key or secrets.token_urlsafe(16),
        )

    @override
    async def _begin(self, api: Stub) -> server_pb2.Task:
        task: server_pb2.Task = await asked(api, "StartTask", self._request)
        return task


class AttachedBlock(_Block):
    """What :meth:`broker.sdk.Workload.attach` gives: nothing is taken up before ``async with``."""

    def __init__(self, workload: "Workload", task_id: str, *, is_resumed: bool, clock: Clock | None = None) -> None:
        """Hold the request."""
        super().__init__(workload, clock)
        self._request = tasks_pb2.ChangeTaskRequest(
            spiffe_id=chosen(workload),
            task_id=task_id,
            operation="resume" if is_resumed else "attach",
            idempotency_key=secrets.token_urlsafe(16),
        )

    @override
    async def _begin(self, api: Stub) -> server_pb2.Task:
        changed: server_pb2.ChangedTask = await asked(api, "ChangeTask", self._request)
        return changed.task


async def _end(task: Task) -> None:
    if State(task.state).is_terminal:
        return
    try:
        async with asyncio.timeout(COMPLETE_SECONDS):
            await task.complete()
    except TimeoutError:
        raise Unavailable(
            "the end of the task was not confirmed in time",
            code="end_unconfirmed",
            hint="it ends with this process, or when it expires",
        ) from None
