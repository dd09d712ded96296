"""The agent pod of the demo: a process with no secret that does, line by line, what it is told.

Everything goes through the SDK and the workload socket, as in a pod of one's own. The one thing that a pod would never do is
hand its token out: the demo asks for it, to play the thief.
"""

import asyncio
import json
import sys
import time
from collections.abc import Mapping
from contextlib import AsyncExitStack
from typing import Any, Self
from urllib.parse import urlsplit

from broker.dev.lines import heard, say
from broker.errors import BrokerError, NotFound
from broker.sdk import Task, Workload
from broker.sdk.tls import client_context

WARM_CALLS = 20
"""Accepted calls before the end, so that the connection and both caches are warm."""

WATCH_SECONDS = 10.0
"""How long the pod goes on asking after the end: longer than this is no revocation."""


class Line:
    """One open HTTPS connection with this process's SVID, for calls one after the other."""

    def __init__(self, workload: Workload, url: str) -> None:
        """Prepare; ``url`` is the service's."""
        parts = urlsplit(url)
        self._host, self._port = parts.hostname or "", parts.port or 443
        self._context = client_context(workload)

    async def __aenter__(self) -> Self:
        """Connect: the service must show a certificate of its trust domain with its DNS name."""
        self._reader, self._writer = await asyncio.open_connection(self._host, self._port, ssl=self._context)
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close."""
        self._writer.close()

    async def call(self, method: str, path: str, token: str) -> tuple[int, Mapping[str, Any]]:
        """Make one call; give status and body."""
        head = f"{method} {path} HTTP/1.1\r\nHost: {self._host}:{self._port}\r\nAuthorization: Bearer {token}\r\n\r\n"
        self._writer.write(head.encode())
        lines = (await self._reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        length = next(int(line.split(":")[1]) for line in lines if line.lower().startswith("content-length:"))
        body = await self._reader.readexactly(length)
        return int(lines[0].split(" ")[1]), json.loads(body) if body else {}


class Pod:
    """What it is told to do; each method is one command."""

    def __init__(self, workload: Workload, stack: AsyncExitStack) -> None:
        """Hold the connection to the node agent; ``stack`` ends what is still running at exit."""
        self._me = workload
        self._stack = stack
        self._running: Task | None = None

    @property
    def _task(self) -> Task:
        if self._running is None:
            raise NotFound("no task was started")
        return self._running

    async def identity(self) -> Mapping[str, Any]:
        """Fetch the X.509-SVID."""
        began = time.monotonic()
        mine = await self._me.identity()
        took = _milliseconds(began)
        chain = len(mine.tls.chain_der)
        return {"spiffe_id": str(mine.id), "x5t": mine.x5t, "hint": mine.hint, "chain": chain, "milliseconds": took}

    async def jwt(self, audience: str) -> Mapping[str, Any]:
        """Fetch a JWT-SVID."""
        began = time.monotonic()
        svid = await self._me.jwt_svid(audience)
        return {"spiffe_id": str(svid.id), "token": svid.token, "milliseconds": _milliseconds(began)}

    async def start(
        self, user_token: str, purpose: str, authorization_details: list[Mapping[str, object]], ttl: int
    ) -> Mapping[str, Any]:
        """Start a task for the user; it runs until :meth:`watch` or :meth:`complete` ends it, or this process ends."""
        began = time.monotonic()
        block = self._me.task(
            user_token=user_token, purpose=purpose, authorization_details=authorization_details, ttl=ttl
        )
        self._running = task = await self._stack.enter_async_context(block)
        return {
            "task": task.id,
            "user": task.user,
            "state": task.state,
            "expires_at": task.expires_at,
            "authorization_details": task.authority.to_json(),
            "milliseconds": _milliseconds(began),
        }

    async def token(
        self, resource: str, scope: str = "", authorization_details: list[Mapping[str, object]] | None = None
    ) -> Mapping[str, Any]:
        """Get a task token for a resource."""
        began = time.monotonic()
        token = await self._task.token(resource, scope=scope, authorization_details=authorization_details)
        return {"token": token, "milliseconds": _milliseconds(began)}

    async def get(self, url: str) -> Mapping[str, Any]:
        """Call the service as a program would: the SDK's client brings certificate and token."""
        async with self._task.http() as http:
            began = time.monotonic()
            answer = await http.get(url)
            took = _milliseconds(began)
        return {"status": answer.status_code, "body": answer.json(), "milliseconds": took}

    async def present(self, url: str, method: str, path: str, token: str) -> Mapping[str, Any]:
        """Present any token, on a connection with this process's own certificate."""
        async with Line(self._me, url) as line:
            began = time.monotonic()
            status, body = await line.call(method, path, token)
        return {"status": status, "body": body, "milliseconds": _milliseconds(began)}

    async def watch(self, url: str, path: str, token: str) -> Mapping[str, Any]:
        """Call without pause on one open connection, end the task meanwhile, and measure when the first refusal came."""
        accepted, seen, warm = 0, 0.0, asyncio.Event()
        body: Mapping[str, Any] = {}

        async def ask() -> None:
            nonlocal accepted, seen, body
            async with Line(self._me, url) as line, asyncio.timeout(WATCH_SECONDS):
                while True:
                    status, body = await line.call("GET", path, token)
                    if status != 200:
                        seen = time.monotonic()
                        body = {**body, "status": status}
                        warm.set()
                        return
                    accepted += 1
                    if accepted == WARM_CALLS:
                        warm.set()

        asking = asyncio.create_task(ask())
        await warm.wait()
        began = time.monotonic()
        await self._task.complete()
        acknowledged = time.monotonic()
        before = accepted
        await asking
        return {
            "accepted": before,
            "accepted_after_acknowledgement": accepted - before,
            "acknowledged_ms": round((acknowledged - began) * 1000, 3),
            "refused_after_ms": round((seen - acknowledged) * 1000, 3),
            "state": self._task.state,
            "refusal": body,
        }

    async def complete(self) -> Mapping[str, Any]:
        """End the task, again: that is fine."""
        await self._task.complete()
        return {"state": self._task.state}


async def serve() -> None:
    """Do what standard input says until it ends."""
    async with Workload.connect() as me, AsyncExitStack() as stack:
        pod = Pod(me, stack)
        commands = {
            "identity": pod.identity,
            "jwt": pod.jwt,
            "start": pod.start,
            "token": pod.token,
            "get": pod.get,
            "present": pod.present,
            "watch": pod.watch,
            "complete": pod.complete,
        }
        async for request in heard():
            try:
                answer = await commands[request["do"]](**request["with"])  # type: ignore[operator]
            except BrokerError as error:
                answer = {"error": {"code": error.reason, "message": error.message, "hint": error.hint}}
            except (OSError, TimeoutError) as error:
                answer = {"error": {"code": "no_connection", "message": str(error), "hint": ""}}
            say(answer)


def _milliseconds(since: float) -> float:
    return round((time.monotonic() - since) * 1000, 2)


if __name__ == "__main__":
    sys.exit(asyncio.run(serve()))
