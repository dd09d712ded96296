"""A small HTTPS service of the demo: mutual TLS by its own SVID, and a task token on every request.

It is what a downstream team writes: an ASGI app behind ``RequireToken``. It holds no key and no password; its certificate comes
from the node agent, and what has ended it hears from the feed.
"""

import argparse
import asyncio
import json
import sys
from collections.abc import MutableMapping
from typing import Any

from broker.clock import SystemClock
from broker.dev.lines import say, stdin_closed
from broker.errors import BrokerError, NotFound, PolicyDenied
from broker.sdk import Workload
from broker.sdk.asgi import RequireToken
from broker.sdk.tls import server_context
from broker.sdk.verify import Caller, TokenVerifier
from broker.transport.callers import CallerIndex
from broker.transport.tls import TlsPeer
from broker.transport.tls_listener import TlsListener

LOOPBACK = "127.0.0.1"
ACTIONS = {"GET": "ticket.read", "DELETE": "ticket.delete"}


class Tickets:
    """``GET`` and ``DELETE /tickets/<number>``: each asks the task's authority for its own action."""

    async def __call__(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        """Answer one request whose token has been verified."""
        caller: Caller = scope["state"]["caller"]
        try:
            status, body = 200, await self._do(caller, scope["method"], scope["path"])
        except PolicyDenied as error:
            status, body = 403, {"error": "insufficient_scope", "code": error.reason}
        except NotFound as error:
            status, body = 404, {"error": "not_found", "code": error.reason}
        text = json.dumps(body).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(text)).encode())]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": text})

    async def _do(self, caller: Caller, method: str, path: str) -> dict[str, object]:
        _, kind, *rest = path.split("/")
        if kind != "tickets" or len(rest) != 1 or method not in ACTIONS:
            raise NotFound("no such thing here")
        await caller.check(ACTIONS[method], resource=rest[0])
        return {"ticket": rest[0], "user": caller.user, "agent": str(caller.agent), "task": caller.task}


async def serve(issuer: str, audience: str, port: int) -> None:
    """Serve until standard input ends."""
    clock = SystemClock()
    async with Workload.connect() as me:
        identity = await me.identity()
        async with await TokenVerifier.discover(issuer, audience=audience, workload=me) as verifier:
            context = server_context(me)
            index: CallerIndex[TlsPeer] = CallerIndex()
            listener = TlsListener(
                host=LOOPBACK,
                port=port,
                context=lambda: context,
                bundles=lambda: me.bundles,
                clock=clock,
                index=index,
                grpc_backend=None,
                http_app=RequireToken(Tickets(), verifier),
            )
            await listener.start()
            try:
                say({"ready": True, "spiffe_id": str(identity.id), "x5t": identity.x5t, "port": listener.port})
                await stdin_closed()
            finally:
                await listener.stop(grace=0.5)


def main() -> int:
    """Run as a program of its own: ``python -m broker.dev.service``."""
    parser = argparse.ArgumentParser(prog="broker.dev.service", description=__doc__)
    parser.add_argument("--issuer", required=True, help="the broker whose tokens are accepted")
    parser.add_argument("--audience", required=True, help="this service's own https URI")
    parser.add_argument("--port", type=int, required=True, help="on 127.0.0.1")
    given = parser.parse_args()
    try:
        asyncio.run(serve(given.issuer, given.audience, given.port))
    except BrokerError as error:
        say({"error": {"code": error.reason, "message": error.message}})
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
