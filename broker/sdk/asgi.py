"""For ASGI services (uvicorn, Starlette, FastAPI and others): refuse requests without a valid task token.

The connection's certificate comes from the server's protocol class (``broker.transport.http``), never from a header.
"""

from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from typing import Any, Final
from urllib.parse import urlsplit

from broker.errors import BrokerError, Invalid, Unavailable
from broker.sdk.proofs import DpopRequest
from broker.sdk.protected_resource import well_known_path
from broker.sdk.verify import TokenVerifier
from broker.spiffe import strictjson
from broker.tasks import NonceWanted
from broker.tasks.dpop import ALGORITHM

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
_OAUTH: Final = {
    "use_dpop_nonce": "use_dpop_nonce",
    "invalid_dpop_proof": "invalid_dpop_proof",
    "proof_replayed": "invalid_dpop_proof",
}
_DPOP: Final = frozenset(_OAUTH) | {"dpop_required"}
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class RequireToken:
    """Middleware: verifies the token of each HTTP request and puts the caller into ``scope["state"]["caller"]``.

    Answers 401 with ``invalid_token`` (RFC 6750, section 3) and our stable code, or 503 while the verifier does not know.
    """

    def __init__(self, app: App, verifier: TokenVerifier, *, metadata: Mapping[str, Any] | None = None) -> None:
        """Wrap ``app``.

        ``metadata``: what ``broker.sdk.protected_resource`` gives. It is served to everybody, and each refusal names where (RFC 9728).
        """
        self._app = app
        self._verifier = verifier
        self._metadata = b"" if metadata is None else strictjson.canonical(dict(metadata))
        self._path = self._address = ""
        if metadata is not None:
            self._path = well_known_path(str(metadata["resource"]))
            self._address = f"https://{urlsplit(str(metadata['resource'])).netloc}{self._path}"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Judge one request."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            return  # WebSocket and others carry no Authorization per message: closed, until an adapter judges them
        if self._metadata and scope["path"] == self._path and scope["method"] in ("GET", "HEAD"):
            await _answer(send, 200, self._metadata, [])
            return
        try:
            token, dpop = presented(scope)
            caller = await self._verifier.verify(token, scope, dpop=dpop)
        except BrokerError as error:
            await refuse(send, error, metadata=self._address)
            return
        scope.setdefault("state", {})["caller"] = caller
        await self._app(scope, receive, send if dpop is None else self._with_nonce(send))

    def _with_nonce(self, send: Send) -> Send:
        """Say with each answer which nonce the next proof needs (RFC 9449, section 8.2)."""

        async def sending(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                nonce = (b"dpop-nonce", self._verifier.proofs.nonce.encode())
                message = {**message, "headers": [*message.get("headers", ()), nonce]}
            await send(message)

        return sending


def presented(scope: Scope) -> tuple[str, DpopRequest | None]:
    """Take the one token from the ``Authorization`` header (RFC 6750, section 2.1; RFC 9449, section 7.1).

    Gives it with what its proof must be for, or with None for a bearer's.

    Raises:
        Invalid: no such header, more than one, or another scheme.
    """
    values = [value for name, value in scope["headers"] if name == b"authorization"]
    scheme, _, token = values[0].partition(b" ") if len(values) == 1 else (b"", b"", b"")
    if scheme.lower() not in (b"bearer", b"dpop") or not token or not token.isascii():
        raise Invalid("one Authorization header, Bearer or DPoP, is required", code="token_missing")
    if scheme.lower() == b"bearer":
        return token.decode("ascii"), None
    proofs = tuple(value.decode("latin-1") for name, value in scope["headers"] if name == b"dpop")
    path = scope.get("raw_path") or scope["path"].encode()
    return token.decode("ascii"), DpopRequest(proofs, scope["method"], path.decode("latin-1").split("?", 1)[0])


async def refuse(send: Send, error: BrokerError, *, metadata: str = "") -> None:
    """Answer with the error: its stable code, never more than the caller may know; ``metadata`` is the address of ours, if there is one."""
    status = 503 if isinstance(error, Unavailable) else 401
    body = strictjson.canonical(
        {
            "error": _OAUTH.get(error.reason, "invalid_token") if status == 401 else "temporarily_unavailable",
            "code": error.reason,
            "error_description": error.message,
        }
    )
    headers = [(b"cache-control", b"no-store")]
    if status == 401:
        headers.append((b"www-authenticate", _challenge(error, metadata)))
    if isinstance(error, NonceWanted):
        headers.append((b"dpop-nonce", error.nonce.encode()))
    await _answer(send, status, body, headers)


async def _answer(send: Send, status: int, body: bytes, headers: Sequence[tuple[bytes, bytes]]) -> None:
    length = (b"content-length", str(len(body)).encode())
    all_ = [(b"content-type", b"application/json"), length, *headers]
    await send({"type": "http.response.start", "status": status, "headers": all_})
    await send({"type": "http.response.body", "body": body})


def _challenge(error: BrokerError, metadata: str) -> bytes:
    scheme, parameters = "Bearer", ['error="invalid_token"']
    if error.reason == "token_missing":
        parameters = []
    elif error.reason in _DPOP:
        oauth = _OAUTH.get(error.reason, "invalid_token")
        scheme, parameters = "DPoP", [f'error="{oauth}"', f'algs="{ALGORITHM}"']
    if metadata:
        parameters.append(f'resource_metadata="{metadata}"')
    return f"{scheme} {', '.join(parameters)}".strip().encode()
