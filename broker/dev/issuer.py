"""A small but real OpenID issuer, for development: discovery and keys over HTTPS on loopback, tokens over a private socket.

It asks nobody who they are: whoever can open its socket (0700 directory, same user or root) gets a token for any name. So it
never issues over HTTP, binds to loopback only, and its authority can vouch for nothing but loopback.
"""

import argparse
import asyncio
import contextlib
import json
import os
import re
import secrets
import signal
import socket
import struct
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import uvicorn
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

from broker.clock import Clock, SystemClock
from broker.dev.certificates import Files, load_or_make_key, prepare
from broker.errors import BrokerError, Invalid, Refused, Unavailable
from broker.spiffe import jose

LOOPBACK: Final = "127.0.0.1"
AUDIENCE: Final = "broker"
TOKEN_SECONDS: Final = 3600
ACR: Final = "urn:broker:dev"
"""What this issuer claims about how the user proved who they are: nothing that another issuer could mean."""
DISCOVERY_PATH: Final = "/.well-known/openid-configuration"
KEYS_PATH: Final = "/keys"
MAX_LINE: Final = 4096
"""Bytes of one request on the token socket: a name and little else."""
ANSWER_SECONDS: Final = 5.0

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@+-]{0,63}")


@dataclass(slots=True)
class Issuer:
    """Says who somebody is, in signed words. ``url`` is the issuer as it stands in the tokens."""

    url: str
    key: ec.EllipticCurvePrivateKey = field(repr=False)
    clock: Clock
    _sessions: dict[str, tuple[str, int]] = field(default_factory=dict)

    @property
    def kid(self) -> str:
        """The key's id: its thumbprint (RFC 7638)."""
        return jose.thumbprint(self.key.public_key())

    def discovery(self) -> Mapping[str, object]:
        """Give the discovery document (OpenID Connect Discovery, section 3)."""
        return {
            "issuer": self.url,
            "jwks_uri": self.url + KEYS_PATH,
            "authorization_endpoint": self.url + "/authorize",
            "response_types_supported": ["id_token"],
            "subject_types_supported": ["public"],
            "id_token_signing_alg_values_supported": ["ES256"],
            "claims_supported": ["iss", "sub", "aud", "exp", "iat", "auth_time", "acr", "sid", "jti"],
        }

    def keys(self) -> Mapping[str, object]:
        """Give the key set (RFC 7517)."""
        public = jose.jwk_from_public_key(self.key.public_key())
        return {"keys": [{**public, "kid": self.kid, "use": "sig", "alg": "ES256"}]}

    def id_token(self, name: str) -> str:
        """Sign an ID token for a name; the same name keeps its session (``sid``) while this issuer runs.

        Raises:
            Invalid: not a name.
        """
        if _NAME.fullmatch(name) is None:
            raise Invalid(
                "not a user name",
                code="invalid_name",
                hint="1 to 64 of letters, digits and . _ @ + -, beginning with a letter or digit",
            )
        now = int(self.clock.now().timestamp())
        session, since = self._sessions.setdefault(name, (secrets.token_urlsafe(12), now))
        payload: dict[str, Any] = {
            "iss": self.url,
            "sub": name,
            "aud": AUDIENCE,
            "iat": now,
            "exp": now + TOKEN_SECONDS,
            "auth_time": since,
            "acr": ACR,
            "sid": session,
            "jti": secrets.token_urlsafe(16),
        }
        return jose.sign_compact({"alg": "ES256", "kid": self.kid, "typ": "JWT"}, payload, self._sign)

    def _sign(self, data: bytes) -> bytes:
        r, s = decode_dss_signature(self.key.sign(data, ec.ECDSA(hashes.SHA256())))
        return r.to_bytes(32) + s.to_bytes(32)


class Pages:
    """The two documents over HTTP, as an ASGI app. Nothing else is there, and no token ever."""

    def __init__(self, issuer: Issuer) -> None:
        """Show this issuer's documents."""
        self._bodies = {
            DISCOVERY_PATH: json.dumps(issuer.discovery()).encode(),
            KEYS_PATH: json.dumps(issuer.keys()).encode(),
        }

    async def __call__(self, scope: Mapping[str, Any], receive: Any, send: Any) -> None:
        """Answer one request."""
        body = self._bodies.get(scope["path"]) if scope["method"] in {"GET", "HEAD"} else None
        status = 200 if body is not None else 404
        text = body if body is not None else b'{"error":"not_found","hint":"tokens: broker dev user-token NAME"}'
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(text)).encode())]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else text})


async def serve_tokens(issuer: Issuer, listening: socket.socket) -> asyncio.Server:
    """Answer requests for tokens on :func:`token_listener`'s socket: one JSON line in, one out."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(ConnectionError, TimeoutError, ValueError, asyncio.IncompleteReadError):
            async with asyncio.timeout(ANSWER_SECONDS):
                writer.write(json.dumps(_answer(issuer, writer, await reader.readuntil())).encode() + b"\n")
                await writer.drain()
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()

    return await asyncio.start_unix_server(answer, sock=listening, limit=MAX_LINE)


def token_listener(path: Path) -> socket.socket:
    """Bind the token socket: 0600 in a 0700 directory."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    path.parent.chmod(0o700)
    path.unlink(missing_ok=True)
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(path))
    path.chmod(0o600)
    return listening


def user_token(path: Path, name: str) -> str:
    """Ask a running issuer for a token.

    Raises:
        Unavailable: it does not answer.
        Invalid: it does not take the name.
    """
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(ANSWER_SECONDS)
            connection.connect(str(path))
            connection.sendall(json.dumps({"name": name}).encode() + b"\n")
            with connection.makefile("rb") as answer:
                document = json.loads(answer.readline(64 * 1024))
    except (OSError, ValueError):
        raise Unavailable(
            "the development issuer does not answer", code="no_issuer", hint="is the estate up? broker dev status"
        ) from None
    if "token" not in document:
        raise Invalid(document["message"], code=document["code"], hint=document["hint"])
    return str(document["token"])


def _answer(issuer: Issuer, writer: asyncio.StreamWriter, line: bytes) -> Mapping[str, object]:
    try:
        _require_own_user(writer.get_extra_info("socket"))
        request = json.loads(line)
        name = request.get("name") if isinstance(request, dict) else None
        return {"token": issuer.id_token(name if isinstance(name, str) else "")}
    except BrokerError as error:
        return {"code": error.reason, "message": error.message, "hint": error.hint}


def _require_own_user(connection: Any) -> None:
    # The directory keeps others out already; this holds when somebody has opened it.
    _, uid, _ = struct.unpack("3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    if uid not in {0, os.geteuid()}:
        raise Refused("another user", hint="run this as the user who runs the estate")


class _Server(uvicorn.Server):
    """Leaves signals to us: two listeners end together."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def run(directory: Path, port: int, token_socket: Path) -> None:
    """Serve until SIGTERM or SIGINT."""
    clock = SystemClock()
    files = Files(directory)
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    prepare(files, clock.now())
    with socket.socket() as pages, token_listener(token_socket) as tokens:
        pages.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        pages.bind((LOOPBACK, port))
        url = f"https://{LOOPBACK}:{pages.getsockname()[1]}"
        issuer = Issuer(url, load_or_make_key(files.signing_key), clock)
        print(f"development issuer at {url}: for this machine only, it asks nobody for a password", file=sys.stderr)  # noqa: T201
        try:
            asyncio.run(_serve(issuer, files, pages, tokens))
        finally:
            token_socket.unlink(missing_ok=True)


async def _serve(issuer: Issuer, files: Files, pages: socket.socket, tokens: socket.socket) -> None:
    config = uvicorn.Config(
        Pages(issuer),
        lifespan="off",
        ws="none",
        log_level="warning",
        access_log=False,
        ssl_certfile=files.leaf,
        ssl_keyfile=files.leaf_key,
    )
    server = _Server(config)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, setattr, server, "should_exit", True)
    async with await serve_tokens(issuer, tokens):
        await server.serve(sockets=[pages])


def main() -> None:
    """Run as a program of its own: ``python -m broker.dev.issuer``."""
    parser = argparse.ArgumentParser(prog="broker.dev.issuer", description=__doc__)
    parser.add_argument("--directory", type=Path, required=True, help="keys and certificates, 0700")
    parser.add_argument("--port", type=int, default=0, help="HTTPS on 127.0.0.1; 0: the kernel chooses")
    parser.add_argument("--token-socket", type=Path, required=True, help="where tokens are asked for")
    given = parser.parse_args()
    run(given.directory, given.port, given.token_socket)


if __name__ == "__main__":
    main()
