"""The operations port: ``/metrics``, ``/live``, ``/ready`` over plain HTTP, for the machine's own tools.

A server of a few lines of its own: it answers three questions, takes no bodies, and must keep answering when everything
else is stuck. Loopback by default; what it says is no secret, but it is nobody's business either.
"""

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from typing import Final

from prometheus_client import CONTENT_TYPE_LATEST

from broker.errors import Misconfigured
from broker.telemetry.metrics import Metrics

HEAD_DEADLINE: Final = 5.0
"""Seconds for a request to arrive."""
MAX_HEAD: Final = 8192
"""Bytes of request line and headers."""
TEXT: Final = "text/plain; charset=utf-8"

Checks = Mapping[str, Callable[[], bool]]


class Operations:
    """Answers on the operations port."""

    def __init__(self, host: str, port: int, metrics: Metrics, checks: Checks) -> None:
        """Ready is who passes every check, each shown by its name with ``?verbose``."""
        self._address = (host, port)
        self._metrics = metrics
        self._checks = checks
        self._server: asyncio.Server | None = None

    @property
    def port(self) -> int:
        """The port that was bound; 0 before."""
        return 0 if self._server is None else int(self._server.sockets[0].getsockname()[1])

    async def start(self) -> None:
        """Bind and answer; raises Misconfigured (``address_unavailable``)."""
        host, port = self._address
        try:
            self._server = await asyncio.start_server(self._serve, host, port, limit=MAX_HEAD)
        except OSError as error:
            raise Misconfigured(
                f"cannot listen on {host}:{port}: {error.strerror}",
                code="address_unavailable",
                hint="set [server.operations] bind_port, or enabled = false",
            ) from error

    async def stop(self) -> None:
        """Stop answering; harmless when repeated."""
        if self._server is not None:
            self._server.close()
            await self._server.wait_closed()
            self._server = None

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(HEAD_DEADLINE):
                head = await reader.readuntil(b"\r\n\r\n")
                writer.write(self._answer(head.split(b"\r\n", 1)[0]))
                await writer.drain()
        except (TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, OSError):
            pass
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    def _answer(self, line: bytes) -> bytes:
        method, _, rest = line.decode("latin-1").partition(" ")
        path, _, query = rest.partition(" ")[0].partition("?")
        if method not in {"GET", "HEAD"}:
            return _response("405 Method Not Allowed", TEXT, b"")
        match path:
            case "/metrics":
                return _response("200 OK", CONTENT_TYPE_LATEST, self._metrics.exposition())
            case "/live" | "/livez":
                return _response("200 OK", TEXT, b"ok\n")
            case "/ready" | "/readyz":
                return self._readiness(is_verbose="verbose" in query)
        return _response("404 Not Found", TEXT, b"")

    def _readiness(self, *, is_verbose: bool) -> bytes:
        results = {name: check() for name, check in self._checks.items()}
        is_ready = all(results.values())
        lines = [f"{name}: {'ok' if result else 'not ready'}" for name, result in results.items()] if is_verbose else []
        lines.append("ok" if is_ready else "not ready")
        status = "200 OK" if is_ready else "503 Service Unavailable"
        return _response(status, TEXT, ("\n".join(lines) + "\n").encode())


def _response(status: str, kind: str, body: bytes) -> bytes:
    head = f"HTTP/1.1 {status}\r\ncontent-type: {kind}\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
    return head.encode("ascii") + body
