"""An agent pod that does, line by line, what a test tells it: hold tasks, let go of them, hang. It uses the SDK as any pod does.

It shows its certificates and tokens, as a pod never would: the test plays whoever stole them.
"""

import asyncio
import base64
import http.client
import json
import ssl
import sys
import time
from collections.abc import Mapping
from contextlib import AsyncExitStack
from typing import Any

import grpc.aio

from broker._proto.broker.agent.v1 import tasks_pb2
from broker._proto.service import ServiceBinding, Stub
from broker.dev.lines import heard, say
from broker.errors import BrokerError
from broker.sdk import Task, Workload
from broker.sdk.endpoint import SECURITY_HEADER
from broker.sdk.tls import RotatingContext, client_context
from broker.transport.rpc_errors import from_rpc_error

TASKS = ServiceBinding.of(tasks_pb2.DESCRIPTOR, "Tasks")


class Pod:
    def __init__(self, me: Workload, stack: AsyncExitStack) -> None:
        self.me, self.stack = me, stack
        self.tasks: dict[str, Task] = {}
        self.contexts: list[ssl.SSLContext] = []

    async def identity(self) -> Mapping[str, Any]:
        mine = await self.me.identity()
        chain = [base64.b64encode(one).decode() for one in mine.tls.chain_der]
        return {"x5t": mine.x5t, "chain": chain}

    async def start(self, **request: Any) -> Mapping[str, Any]:
        task = await self.stack.enter_async_context(self.me.task(**request))
        self.tasks[task.id] = task
        return {"task": task.id}

    async def token(self, task: str, resource: str) -> Mapping[str, Any]:
        return {"token": await self.tasks[task].token(resource)}

    async def steal(self, task: str, resource: str) -> Mapping[str, Any]:
        """Ask for a token of another process's task."""
        request = tasks_pb2.IssueTokenRequest(task_id=task, resource=resource)
        try:
            issued = await Stub(self.me.channel, TASKS).IssueToken(request, metadata=SECURITY_HEADER, timeout=30)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from None
        return {"token": issued.access_token}

    async def lost(self, task: str) -> Mapping[str, Any]:
        error = self.tasks[task].keeper.lost
        return {"lost": None if error is None else error.reason}

    async def let_go(self, task: str) -> Mapping[str, Any]:
        """Close the stream, or stop the heartbeat, and live on."""
        await self.tasks[task].keeper.stop()
        return {}

    async def hang(self, seconds: float) -> Mapping[str, Any]:
        """Do nothing else."""
        time.sleep(seconds)
        return {}

    async def rotated(self, x5t: str) -> Mapping[str, Any]:
        """Wait for another certificate than this one."""
        async for mine in self.me.identity_changes():
            if mine.x5t != x5t:
                return {"x5t": mine.x5t}
        raise AssertionError("unreachable")

    async def keep_context(self) -> Mapping[str, Any]:
        """Keep this moment's certificate for calls that come later."""
        context = client_context(self.me)
        assert isinstance(context, RotatingContext)
        self.contexts.append(context._newest())
        return {"number": len(self.contexts) - 1}

    async def ask(self, url: str, method: str, path: str, context: int | None = None) -> Mapping[str, Any]:
        """Call the server's HTTPS door, by the present certificate or by one that was kept."""
        own = client_context(self.me) if context is None else self.contexts[context]
        host = url.removeprefix("https://")

        def call() -> Mapping[str, Any]:
            line = http.client.HTTPSConnection(host, context=own, timeout=30)
            line.request(method, path)
            answer = line.getresponse()
            return {"status": answer.status, "body": json.loads(answer.read())}

        return await asyncio.to_thread(call)


async def serve() -> None:
    async with Workload.connect() as me, AsyncExitStack() as stack:
        pod = Pod(me, stack)
        async for request in heard():
            try:
                answer = await getattr(pod, request["do"])(**request["with"])
            except BrokerError as error:
                answer = {"error": {"code": error.reason, "message": error.message, "hint": error.hint}}
            say(answer)


if __name__ == "__main__":
    sys.exit(asyncio.run(serve()))
