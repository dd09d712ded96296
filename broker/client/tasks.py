"""Tasks, as an operator sees and ends them (``broker.server.v1.Tasks``)."""

from collections.abc import Callable, Sequence

import grpc.aio

from broker._proto.broker.server.v1 import tasks_pb2
from broker._proto.service import ServiceBinding
from broker.client.calls import DEADLINE_SECONDS, PAGE_SIZE, Caller

_TASKS = ServiceBinding.of(tasks_pb2.DESCRIPTOR, "Tasks")


class Tasks:
    """What an operator does with tasks."""

    def __init__(self, channel: grpc.aio.Channel, *, timeout: float = DEADLINE_SECONDS) -> None:
        """Call over ``channel``; ``timeout`` is in seconds, for each call."""
        self._tasks = Caller(channel, _TASKS, timeout=timeout)

    async def get(self, task_id: str) -> tasks_pb2.Task:
        """Give one task; raises NotFound."""
        task: tasks_pb2.Task = await self._tasks.call("GetTask", tasks_pb2.GetTaskRequest(id=task_id))
        return task

    async def list(
        self,
        *,
        state: str = "",
        user: str = "",
        agent: str = "",
        root: str = "",
        parent: str = "",
        told: Callable[[int], None] | None = None,
    ) -> Sequence[tasks_pb2.Task]:
        """Give the tasks of this state, user, agent, tree and parent (empty: any), page by page.

        ``told`` is told after each page but the last how many there are so far.
        """
        found: list[tasks_pb2.Task] = []
        token = ""
        while True:
            request = tasks_pb2.ListTasksRequest(
                state=state, user=user, agent=agent, page_size=PAGE_SIZE, page_token=token, root=root, parent=parent
            )
            page: tasks_pb2.ListTasksResponse = await self._tasks.call("ListTasks", request)
            found.extend(page.tasks)
            token = page.next_page_token
            if not token:
                return found
            if told is not None:
                told(len(found))

    async def revoke(self, task_id: str, *, reason: str = "", expected_version: int = 0) -> tasks_pb2.Task:
        """End a task and all below it, at once; raises NotFound, Conflict when it ended otherwise or moved on."""
        request = tasks_pb2.RevokeTaskRequest(task_id=task_id, reason=reason, expected_version=expected_version)
        task: tasks_pb2.Task = await self._tasks.call("RevokeTask", request)
        return task

    async def change(
        self,
        task_id: str,
        operation: str,
        *,
        to: str = "",
        reason: str = "",
        expected_version: int = 0,
        idempotency_key: str = "",
    ) -> tasks_pb2.ChangedTask:
        """Do ``suspend``, ``resume``, ``revoke`` or ``handoff`` (``to`` another agent); raises NotFound, Conflict, Refused."""
        request = tasks_pb2.ChangeTaskRequest(
            task_id=task_id,
            operation=operation,
            to=to,
            reason=reason,
            expected_version=expected_version,
            idempotency_key=idempotency_key,
        )
        changed: tasks_pb2.ChangedTask = await self._tasks.call("ChangeTask", request)
        return changed
