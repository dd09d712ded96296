"""HTTP/1.1 on a transport that somebody else accepted, by uvicorn's protocol class, with the TLS peer in the scope.

Bounds what uvicorn leaves open: the size of a head and of a body, and the time a request may take to arrive. Knows
nothing of what the app does.
"""

import asyncio
import logging
import re
import sys
import traceback
from collections.abc import Callable, Mapping
from email.utils import format_datetime
from typing import Any, Final

from httptools import HttpParserInvalidMethodError
from typing_extensions import override
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from broker.clock import Clock
from broker.transport.joining import JoinedWrites
from broker.transport.tls import TlsPeer

PEER_EXTENSION = "broker.peer"

MAX_HEAD_BYTES = 32 * 1024  # request line and headers: room for a token and a proxy's additions
MAX_HEADERS = 100
MAX_BODY_BYTES = 1024 * 1024  # forms and JSON of our endpoints are a few KiB
REQUEST_DEADLINE = 20.0  # seconds from a request's first byte (or the connection) to its last
KEEP_ALIVE = 15  # seconds an idle connection waits for its next request

# RFC 9112 section 3.2: uri-host and port of RFC 3986, and nothing else.
_HOST = re.compile(rb"(?:[A-Za-z0-9._~%!$&'()*+,;=-]*|\[[0-9A-Fa-f:.]+\])(?::[0-9]*)?")

# The beginning of a request whose method is one that the parser has never heard of, and not just noise (RFC 9110 section 9.1).
_METHOD = re.compile(rb"[A-Z][A-Z-]{0,31} [/*]")

# What is refused before the app sees it says why like everything else: JSON, a code, nothing of what was sent.
_REFUSALS: Final[Mapping[int, bytes]] = {
    400: b'{"error":"invalid_request","error_description":"this is not one well-formed HTTP request"}',
    413: b'{"error":"body_too_large","error_description":"the body is too large"}',
    431: b'{"error":"head_too_large","error_description":"the request line or the headers are too large or too many"}',
    501: b'{"error":"method_unknown","error_description":"no resource knows this method"}',
    505: b'{"error":"http_version","error_description":"HTTP/1.1 or HTTP/2 is spoken here"}',
}

_REFUSED = ((b"content-type", b"application/json"), (b"cache-control", b"no-store"), (b"connection", b"close"))

_LOG = logging.getLogger("broker.transport.http")


def _quiet(record: logging.LogRecord) -> bool:
    """Keep what strangers send and what exceptions say out of the log."""
    if record.exc_info and record.exc_info[1]:
        error = record.exc_info[1]
        where = "; ".join(f"{step.name}:{step.lineno}" for step in traceback.extract_tb(error.__traceback__)[-4:])
        record.msg, record.args = "defect in an HTTP handler: %s at %s", (type(error).__name__, where)
        record.exc_info = record.exc_text = None
    return record.levelno > logging.WARNING


_LOG.addFilter(_quiet)


class _Excess(Exception):
    """A limit was passed, or the head has more than one meaning."""


class _PeerProtocol(HttpToolsProtocol):
    """One connection."""

    def __init__(self, door: "HttpDoor", peer: TlsPeer, on_closed: Callable[[], None] | None) -> None:
        super().__init__(config=door.config, server_state=door.state, app_state={})
        self.logger = _LOG
        self.access_log = False
        self._door = door
        self._peer = peer
        self._on_closed = on_closed
        self._in_head = True
        self._head_bytes = self._header_bytes = self._body_bytes = 0
        self._status = 400
        self._received = b""
        self._deadline: asyncio.TimerHandle | None = None

    @override
    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._joined = JoinedWrites(transport, self.loop)
        super().connection_made(self._joined)
        self._arm()

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        super().connection_lost(exc)
        self._unset_keepalive_if_required()
        self._door.gone()
        if self._on_closed:
            self._on_closed()

    @override
    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        if self._in_head:
            self._head_bytes += len(data)
        self._received = data
        super().data_received(data)
        # The parser tells of a header only when it is whole: one without an end is seen here.
        if self._in_head and self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            self._status = 431
            self.send_400_response("")

    @override
    def on_message_begin(self) -> None:
        super().on_message_begin()
        extensions: dict[str, Any] = self.scope.setdefault("extensions", {})
        extensions[PEER_EXTENSION] = self._peer
        self._header_bytes = self._body_bytes = 0
        self._door.date()
        self._arm()

    @override
    def on_url(self, url: bytes) -> None:
        self._head(len(url))
        super().on_url(url)

    @override
    def on_header(self, name: bytes, value: bytes) -> None:
        self._head(len(name) + len(value))
        if not self._in_head:
            # NOTE(security): a trailer is no header (RFC 9110 section 6.5.1): a proxy that sets or drops a header passes it by.
            return
        if len(self.headers) >= MAX_HEADERS:
            self._exceed(431)
        super().on_header(name, value)

    @override
    def on_headers_complete(self) -> None:
        self._require_one_meaning()
        self._in_head, self._head_bytes = False, 0
        super().on_headers_complete()

    @override
    def on_body(self, body: bytes) -> None:
        self._body_bytes += len(body)
        if self._body_bytes > MAX_BODY_BYTES:
            self._exceed(413)
        super().on_body(body)

    @override
    def on_message_complete(self) -> None:
        self._in_head, self._head_bytes = True, 0
        self._disarm()
        super().on_message_complete()

    @override
    def on_response_complete(self) -> None:
        self._joined.flush()
        super().on_response_complete()

    @override
    def send_400_response(self, msg: str) -> None:
        cycle: RequestResponseCycle | None = self.cycle  # None before the first request, whatever uvicorn declares
        if cycle is not None and not cycle.response_complete:
            cycle.disconnected = True
            cycle.message_event.set()
            if cycle.response_started:
                self.transport.abort()
                return
        if isinstance(sys.exception(), HttpParserInvalidMethodError) and _METHOD.match(self._received):
            self._status = 501
        self._door.date()
        head = [
            *self.server_state.default_headers,
            *_REFUSED,
            (b"content-length", b"%d" % len(_REFUSALS[self._status])),
        ]
        body = b"" if self.parser.get_method() == b"HEAD" else _REFUSALS[self._status]
        lines = b"".join(b"%s: %s\r\n" % each for each in head)
        self.transport.write(STATUS_LINE[self._status] + lines + b"\r\n" + body)
        self.transport.close()

    def _require_one_meaning(self) -> None:
        """Refuse what another HTTP program may read otherwise: host, version, coding (RFC 9112 sections 2.3, 3.2, 6.1)."""
        version = self.parser.get_http_version()
        if version not in ("1.0", "1.1"):
            self._exceed(505)
        hosts = [value for name, value in self.headers if name == b"host"]
        if len(hosts) > 1 or (version == "1.1" and not hosts) or not all(_HOST.fullmatch(host) for host in hosts):
            self._exceed(400)
        codings = [value.lower() for name, value in self.headers if name == b"transfer-encoding"]
        if codings and (codings != [b"chunked"] or version == "1.0"):
            self._exceed(400)

    def _head(self, size: int) -> None:
        self._header_bytes += size
        if self._header_bytes > MAX_HEAD_BYTES:
            self._exceed(431)

    def _exceed(self, status: int) -> None:
        self._status = status
        raise _Excess

    def _arm(self) -> None:
        if self._deadline is None:
            self._deadline = self.loop.call_later(REQUEST_DEADLINE, self.abort)

    def _disarm(self) -> None:
        if self._deadline:
            self._deadline.cancel()
            self._deadline = None

    def abort(self) -> None:
        """End the connection now."""
        self.transport.abort()


class HttpDoor:
    """Serves one ASGI app on transports that a listener accepted."""

    def __init__(self, app: Any, clock: Clock) -> None:
        """``app`` finds the peer in ``scope["extensions"]["broker.peer"]``; no lifespan events are sent to it."""
        self.config = Config(
            app,
            http=HttpToolsProtocol,
            ws="none",
            lifespan="off",
            interface="asgi3",
            log_config=None,
            access_log=False,
            proxy_headers=False,  # nobody may say for another who it is: the peer is the TLS peer
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE,
            reset_contextvars=True,
        )
        self.config.load()
        self.state = ServerState()
        self._clock = clock
        self._idle = asyncio.Event()
        self._second = -1

    def protocol(self, peer: TlsPeer, on_closed: Callable[[], None] | None = None) -> asyncio.Protocol:
        """Make the protocol of one connection: ``transport.set_protocol(p); p.connection_made(transport)``."""
        return _PeerProtocol(self, peer, on_closed)

    async def stop(self, grace: float) -> None:
        """Close idle connections, let requests in progress end for ``grace`` seconds, abort the rest."""
        connections = list(self.state.connections)
        for connection in connections:
            connection.shutdown()
        try:
            async with asyncio.timeout(grace):
                while self.state.connections:
                    self._idle.clear()
                    await self._idle.wait()
        except TimeoutError:
            for connection in list(self.state.connections):
                connection.transport.abort()
        tasks = list(self.state.tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def gone(self) -> None:
        """One connection was lost."""
        self._idle.set()

    def date(self) -> None:
        """Keep the Date header of responses at the current second (RFC 9110 section 6.6.1)."""
        now = self._clock.now()
        second = int(now.timestamp())
        if second != self._second:
            self._second = second
            self.state.default_headers[:] = [(b"date", format_datetime(now, usegmt=True).encode("ascii"))]
