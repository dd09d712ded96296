"""The load: one process that calls as fast as it is answered, product and bare server alike. A program of its own.

Requests are bytes, and answers are not parsed: what is measured is who answers.
"""

import asyncio
import base64
import ssl
import time
from collections.abc import Mapping
from contextlib import AsyncExitStack
from typing import Any
from urllib.parse import urlencode

import grpc.aio

from broker._proto.broker.agent.v1 import tasks_pb2
from broker.dev.lines import heard, say
from broker.errors import BrokerError
from broker.sdk import Workload
from broker.sdk.endpoint import SECURITY_HEADER
from broker.sdk.tls import client_context
from tests.bench.frames import FrameCaller
from tests.bench.measure import percentile

WARM_SECONDS = 0.3
PURPOSE = "to be measured"
EXCHANGE = "urn:ietf:params:oauth:grant-type:token-exchange"
ID_TOKEN = "urn:ietf:params:oauth:token-type:id_token"


async def load_grpc(socket: str, path: str, request: bytes, callers: int, seconds: float) -> Mapping[str, Any]:
    """Call one unary method by so many callers over one connection."""
    took: list[float] = []
    size = calls = 0

    async def go(call: Any, until: float) -> None:
        nonlocal size
        while (began := time.perf_counter()) < until:
            answer = await call(request, metadata=SECURITY_HEADER, timeout=10)
            took.append(time.perf_counter() - began)
            size = len(answer)

    options = (("grpc.use_local_subchannel_pool", 1),)
    async with grpc.aio.insecure_channel(f"unix:{socket}", options=options) as channel:
        call = channel.unary_unary(path)
        for length in (WARM_SECONDS, seconds):
            took.clear()
            began = time.perf_counter()
            await asyncio.gather(*(go(call, began + length) for _ in range(callers)))
            elapsed = time.perf_counter() - began
            calls += len(took)
    return {**_told(took, elapsed, size), "calls": calls}


async def load_frames(socket: str, path: str, request: bytes, callers: int, seconds: float) -> Mapping[str, Any]:
    """The same calls without gRPC's library on their side."""
    _, caller = await asyncio.get_running_loop().create_unix_connection(lambda: FrameCaller(path, request), socket)
    elapsed, calls = 0.0, 0
    try:
        for length in (WARM_SECONDS, seconds):
            began = time.perf_counter()
            await caller.call(callers, began + length)
            elapsed = time.perf_counter() - began
            calls += len(caller.took)
    finally:
        caller.close()
    return {**_told(caller.took, elapsed, caller.size), "calls": calls}


class Poster(asyncio.Protocol):
    """One keep-alive connection that sends the next request when the answer to the last one is whole."""

    def __init__(self, request: bytes) -> None:
        self._request = request
        self._heard = b""
        self._until = 0.0
        self.size = 0
        self.took: list[float] = []

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    async def post(self, until: float) -> None:
        self.took.clear()
        self._until, self._done = until, asyncio.get_running_loop().create_future()
        self._send()
        await self._done

    def data_received(self, data: bytes) -> None:
        self._heard += data
        head, blank, body = self._heard.partition(b"\r\n\r\n")
        if not blank or len(body) < _length(head):
            return
        self._heard = b""
        if not head.startswith(b"HTTP/1.1 200 "):
            self._done.set_exception(RuntimeError(f"{head[:40]!r} {body[:200]!r}"))
            return
        now = time.perf_counter()
        self.took.append(now - self._sent)
        self.size = len(body)
        if now < self._until:
            self._send()
        else:
            self._done.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._done.done():
            self._done.set_exception(RuntimeError("the connection was lost"))

    def close(self) -> None:
        self._transport.close()

    def _send(self) -> None:
        self._sent = time.perf_counter()
        self._transport.write(self._request)


async def load_form(
    host: str, port: int, form: Mapping[str, str], context: ssl.SSLContext, callers: int, seconds: float
) -> Mapping[str, Any]:
    """Post a form by so many callers, each on its own connection."""
    body = urlencode(form).encode()
    head = (
        f"POST /token HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/x-www-form-urlencoded\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    loop, posters = asyncio.get_running_loop(), []
    for _ in range(callers):
        _, poster = await loop.create_connection(lambda: Poster(head.encode() + body), host, port, ssl=context)
        posters.append(poster)
    elapsed, calls = 0.0, 0
    try:
        for length in (WARM_SECONDS, seconds):
            began = time.perf_counter()
            await asyncio.gather(*(poster.post(began + length) for poster in posters))
            elapsed = time.perf_counter() - began
            calls += sum(len(poster.took) for poster in posters)
    finally:
        for poster in posters:
            poster.close()
    return {**_told([one for poster in posters for one in poster.took], elapsed, posters[0].size), "calls": calls}


class Load:
    """What it is told to do; each method is one command."""

    def __init__(self, stack: AsyncExitStack) -> None:
        self._stack = stack
        self._form: dict[str, str] = {}

    async def grpc(self, socket: str, path: str, request: str, callers: int, seconds: float) -> Mapping[str, Any]:
        """Call a method with a request given in base64."""
        return await load_grpc(socket, path, base64.b64decode(request), callers, seconds)

    async def frames(self, socket: str, path: str, request: str, callers: int, seconds: float) -> Mapping[str, Any]:
        """The same, without gRPC's library on this side."""
        return await load_frames(socket, path, base64.b64decode(request), callers, seconds)

    async def start(self, user_token: str, resource: str) -> Mapping[str, Any]:
        """Start a task that lasts as long as this process; give the request for one more token of it."""
        self._me = await self._stack.enter_async_context(Workload.connect())
        wanted = [{"type": "api", "locations": [resource], "actions": ["ticket.read"]}]
        block = self._me.task(user_token=user_token, purpose=PURPOSE, authorization_details=wanted, ttl=600)
        task = await self._stack.enter_async_context(block)
        self._form = {
            "grant_type": EXCHANGE,
            "subject_token": user_token,
            "subject_token_type": ID_TOKEN,
            "resource": resource,
            "task": task.id,
        }
        await self._me.identity()
        request = tasks_pb2.IssueTokenRequest(task_id=task.id, resource=resource)
        return {"request": base64.b64encode(request.SerializeToString()).decode()}

    async def form(self, host: str, port: int, ca: str, callers: int, seconds: float) -> Mapping[str, Any]:
        """Post the exchange of the started task; ``ca`` empty: to a service of the trust domain, with our SVID."""
        context = ssl.create_default_context(cafile=ca) if ca else client_context(self._me)
        return await load_form(host, port, self._form, context, callers, seconds)


def _told(took: list[float], elapsed: float, size: int) -> Mapping[str, Any]:
    return {"rate": len(took) / elapsed, "p99": percentile(took, 99) * 1000, "size": size}


def _length(head: bytes) -> int:
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            return int(line[15:])
    return 0


async def serve() -> None:
    async with AsyncExitStack() as stack:
        load = Load(stack)
        commands = {"grpc": load.grpc, "frames": load.frames, "start": load.start, "form": load.form}
        async for request in heard():
            try:
                answer = await commands[request["do"]](**request["with"])
            except grpc.aio.AioRpcError as error:
                answer = {"error": {"code": error.code().name, "message": error.details()}}
            except BrokerError as error:
                answer = {"error": {"code": error.reason, "message": error.message}}
            except (OSError, RuntimeError) as error:
                answer = {"error": {"code": "failed", "message": str(error)}}
            say(answer)


if __name__ == "__main__":
    asyncio.run(serve())
