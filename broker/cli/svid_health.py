"""A port that probes ask whether files are kept: ``/ready`` when all can be used, ``/live`` while the command itself works.

The little of HTTP/1.1 that a probe speaks: one request, one answer, the connection closed. Bounded in everything.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Final

from broker.errors import Invalid, Misconfigured

MAX_REQUEST: Final = 4096
"""Bytes up to the blank line: what probes send has some hundred."""
REQUEST_SECONDS: Final = 5.0
AT_ONCE: Final = 16
"""Connections; more are closed at once."""

Lacking = Callable[[], Mapping[str, str]]


def health_address(text: str) -> tuple[str, int]:
    """Read ``HOST:PORT`` or ``PORT``, which is of loopback; raises Invalid."""
    host, _, port = text.rpartition(":")
    if not port.isascii() or not port.isdigit() or not 0 <= int(port) <= 65535:
        raise Invalid(f"not an address: {text!r}", code="health_address", hint="write 127.0.0.1:8081, or 8081")
    return host.strip("[]") or "127.0.0.1", int(port)


@asynccontextmanager
async def health_port(address: tuple[str, int] | None, lacking: Lacking) -> AsyncIterator[int]:
    """Serve it for the block; gives the port, 0 where none is wanted. Raises Misconfigured."""
    if address is None:
        yield 0
        return
    room = asyncio.Semaphore(AT_ONCE)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            if not room.locked():
                async with room, asyncio.timeout(REQUEST_SECONDS):
                    writer.write(_answer(await reader.readuntil(b"\r\n\r\n"), lacking()))
                    await writer.drain()
        writer.close()

    try:
        server = await asyncio.start_server(serve, *address, limit=MAX_REQUEST)
    except OSError as error:
        raise Misconfigured(
            f"{address[0]}:{address[1]} cannot be listened on: {error.strerror}", code="health_port",
            hint="name a free port with --health",
        ) from None  # fmt: skip
    async with server:
        yield int(server.sockets[0].getsockname()[1])


def _answer(request: bytes, lacking: Mapping[str, str]) -> bytes:
    method, _, rest = request.partition(b" ")
    path = rest.partition(b" ")[0].partition(b"?")[0]
    if method not in {b"GET", b"HEAD"} or path not in {b"/live", b"/ready"}:
        return _response("404 Not Found" if method in {b"GET", b"HEAD"} else "405 Method Not Allowed", {}, method)
    if path == b"/ready" and lacking:
        return _response("503 Service Unavailable", {"status": "not_ready", "lacking": dict(lacking)}, method)
    return _response("200 OK", {"status": "ok"}, method)


def _response(status: str, body: Mapping[str, object], method: bytes) -> bytes:
    text = json.dumps(body).encode()
    head = (
        f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {len(text)}\r\n"
        "cache-control: no-store\r\nconnection: close\r\n\r\n"
    )
    return head.encode() + (b"" if method == b"HEAD" else text)
