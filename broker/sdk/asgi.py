"""For ASGI services (uvicorn, Starlette, FastAPI and others): refuse requests without a valid task token.

The connection's certificate comes from the server's protocol class (``broker.transport.http``), never from a header.
"""

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from broker.errors import BrokerError, Invalid, Unavailable
from broker.sdk.verify import TokenVerifier
from broker.spiffe import strictjson

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class RequireToken:
    """Middleware: verifies the token of each HTTP request and puts the caller into ``scope["state"]["caller"]``.

    Answers 401 with ``invalid_token`` (RFC 6750, section 3) and our stable code, or 503 while the verifier does not know.
    """

    def __init__(self, app: App, verifier: TokenVerifier) -> None:
        """Wrap ``app``."""
        self._app = app
        self._verifier = verifier

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Judge one request."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            return  # WebSocket and others carry no Authorization per message: closed, until an adapter judges them
        try:
            caller = await self._verifier.verify(bearer_token(scope), scope)
        except BrokerError as error:
            await refuse(send, error)
            return
        scope.setdefault("state", {})["caller"] = caller
        await self._app(scope, receive, send)


def bearer_token(scope: Scope) -> str:
    """Take the one bearer token from the ``Authorization`` header (RFC 6750, section 2.1).

    Raises:
        Invalid: no such header, more than one, or another scheme.
    """
    values = [value for name, value in scope["headers"] if name == b"authorization"]
    scheme, _, token = values[0].partition(b" ") if len(values) == 1 else (b"", b"", b"")
    if scheme.lower() != b"bearer" or not token or not token.isascii():
        raise Invalid("one Authorization: Bearer header is required", code="token_missing")
    return token.decode("ascii")


async def refuse(send: Send, error: BrokerError) -> None:
    """Answer with the error: its stable code, never more than the caller may know."""
    status = 503 if isinstance(error, Unavailable) else 401
    body = strictjson.canonical(
        {
            "error": "invalid_token" if status == 401 else "temporarily_unavailable",
            "code": error.reason,
            "error_description": error.message,
        }
    )
    challenge = b"Bearer" if error.reason == "token_missing" else b'Bearer error="invalid_token"'
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"cache-control", b"no-store"),
    ]
    if status == 401:
        headers.append((b"www-authenticate", challenge))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
