"""The one TLS port: accept, judge the client certificate, hand on to gRPC (``h2``) or to the ASGI app (``http/1.1``).

The verdict is made once, when the handshake ends and before the first byte of application data: Anonymous, a verified
SVID, or refused. A connection does not outlive its SVID. What a peer may do is not known here.
"""

import asyncio
import json
import logging
import socket
import ssl
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, cast

from cryptography.hazmat.primitives.serialization import Encoding
from typing_extensions import override

from broker.clock import Clock
from broker.errors import BrokerError, InvalidSvid, Misconfigured, Refused
from broker.spiffe import BundleSet, verify_x509_svid
from broker.transport.acceptor import BACKLOG, Acceptor, connection_room
from broker.transport.backend import Backend
from broker.transport.callers import CallerIndex
from broker.transport.flood import FrameMeter
from broker.transport.handshake import accept_tls
from broker.transport.http import HttpDoor
from broker.transport.lifetimes import Lifetimes
from broker.transport.splice import Splice
from broker.transport.tls import ALPN_H2, Anonymous, SvidPeer, TlsPeer, judge

_LOG = logging.getLogger(__name__)

HANDSHAKE_DEADLINE = 10.0  # seconds; a slow client costs descriptors only
MAX_CONNECTIONS = 10_000
FDS_PER_CONNECTION = 3  # accepted, dialled, and gRPC's own end
ANONYMOUS_LIFETIME = timedelta(minutes=10)  # node attestation and token requests take seconds
OnRefusal = Callable[[BrokerError, str], None]
Verdict = Callable[[ssl.SSLObject, BundleSet, datetime], TlsPeer]


class _Connection:
    """One accepted socket, from its handshake to its end."""

    __slots__ = ("address", "is_open", "lifetime", "name", "peer", "splice", "transport")

    def __init__(self, address: str) -> None:
        self.address = address
        self.peer: TlsPeer | None = None
        self.transport: asyncio.Transport | None = None
        self.splice: Splice | None = None
        self.name = ""
        self.lifetime = -1
        self.is_open = True

    def abort(self) -> None:
        """End it at once."""
        if self.splice:
            self.splice.abort()
        elif self.transport:
            self.transport.abort()


class _Gate(asyncio.Protocol):
    """Stands on a connection until its peer is judged, and for good where that peer is refused."""

    def __init__(self, judged: Callable[[asyncio.Transport], None], lost: Callable[[], None]) -> None:
        self._judged = judged
        self._lost = lost

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        try:
            self._judged(cast("asyncio.Transport", transport))
        except BaseException:
            cast("asyncio.Transport", transport).abort()
            raise

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        self._lost()


def bound_socket(host: str, port: int) -> socket.socket:
    """Listen on a port. Raises Misconfigured (``address_unavailable``)."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=BACKLOG, dualstack_ipv6=host == "::")
    except OSError as error:
        raise Misconfigured(
            f"cannot listen on {host}:{port}: {error.strerror}",
            code="address_unavailable",
            hint="another program may have it, or it is no address of this machine",
        ) from error


class TlsListener:
    """One port: ``h2`` goes to the private gRPC server, ``http/1.1`` (or no ALPN) to an ASGI app, with the peer attached.

    The ASGI app finds the peer in ``scope["extensions"]["broker.peer"]`` (Anonymous or SvidPeer); gRPC handlers by
    ``index``. Either backend may be None: that protocol is refused then.
    """

    def __init__(
        self,
        *,
        host: str,
        port: int,
        context: Callable[[], ssl.SSLContext],
        bundles: Callable[[], BundleSet],
        clock: Clock,
        index: CallerIndex[TlsPeer],
        grpc_backend: Path | None,
        http_app: Any | None,
        verdict: Verdict = judge,
        on_refusal: OnRefusal | None = None,
        max_connections: int = MAX_CONNECTIONS,
        handshake_deadline: float = HANDSHAKE_DEADLINE,
    ) -> None:
        """``context`` is asked for each accepted socket (see ContextSource); ``on_refusal(error, remote_address)``."""
        self._address = (host, port)
        self._context = context
        self._bundles = bundles
        self._clock = clock
        self._index = index
        self._backend = Backend(grpc_backend) if grpc_backend else None
        self._http = HttpDoor(http_app, clock) if http_app else None
        self._verdict = verdict
        self._on_refusal = on_refusal
        self._max_connections = max_connections
        self._room = 0
        self._handshake_deadline = handshake_deadline
        self._open: dict[_Connection, asyncio.Task[None] | None] = {}
        self._emptied = asyncio.Event()
        self._lifetimes = Lifetimes(clock)
        self._acceptor: Acceptor | None = None
        self._port = port

    @property
    def port(self) -> int:
        """The port bound, also when 0 was asked for."""
        return self._port

    @property
    def connections(self) -> int:
        """How many connections are open, handshakes included."""
        return len(self._open)

    def drop(self, predicate: Callable[[TlsPeer], bool]) -> int:
        """Abort connections whose peer matches (a banned agent); gives their number."""
        matching = [one for one in self._open if one.peer is not None and predicate(one.peer)]
        for connection in matching:
            connection.abort()
        return len(matching)

    def recheck(self) -> int:
        """Verify every connection's chain again under the bundles of now; abort what fails. Call on a bundle change."""
        bundles, now = self._bundles(), self._clock.now()

        def fails(peer: TlsPeer) -> bool:
            if isinstance(peer, Anonymous):
                return False
            try:
                verify_x509_svid([one.public_bytes(Encoding.DER) for one in peer.svid.chain], bundles, now=now)
            except InvalidSvid:
                return True
            return False

        return self.drop(fails)

    async def start(self) -> None:
        """Bind and listen. Raises Misconfigured (``address_unavailable``)."""
        self._room = connection_room(self._max_connections, FDS_PER_CONNECTION)
        listening = bound_socket(*self._address)
        self._port = listening.getsockname()[1]
        self._acceptor = Acceptor(listening, self._accepted, lambda: len(self._open) < self._room, self._make_room)
        self._acceptor.start()
        self._lifetimes.start()

    async def stop(self, grace: float = 5.0) -> None:
        """Stop accepting, let HTTP requests in progress end for ``grace`` seconds, then close everything.

        gRPC calls in progress end with their own server's stop(): stop that one first. Harmless when repeated.
        """
        if self._acceptor is None:
            return
        self._acceptor.close()
        self._acceptor = None
        if self._http:
            await self._http.stop(grace)
        self._lifetimes.stop()
        setups = [setup for setup in self._open.values() if setup]
        for setup in setups:
            setup.cancel()
        await asyncio.gather(*setups, return_exceptions=True)
        for connection in list(self._open):
            connection.abort()
        if self._open:
            self._emptied.clear()
            await self._emptied.wait()

    def _make_room(self) -> None:
        # The oldest that proved nothing makes place. Its loss resumes accepting.
        oldest = next((one for one in self._open if not isinstance(one.peer, SvidPeer) and one.transport), None)
        if oldest:
            oldest.abort()

    def _accepted(self, accepted: socket.socket) -> None:
        connection = _Connection(_remote(accepted))
        setup = asyncio.get_running_loop().create_task(self._set_up(accepted, connection))
        self._open[connection] = setup
        setup.add_done_callback(lambda done: self._is_set_up(done, accepted, connection))

    async def _set_up(self, accepted: socket.socket, connection: _Connection) -> None:
        # asyncio sets it only on sockets that say IPPROTO_TCP, which create_server's do not: each answer would wait 40 ms.
        accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        gate = _Gate(lambda transport: self._judged(connection, transport), lambda: self._ended(connection))
        await accept_tls(accepted, gate, self._context(), deadline=self._handshake_deadline)
        if connection.splice and self._backend:
            await self._backend.join(connection.splice, connection.name)

    def _is_set_up(self, setup: asyncio.Task[None], accepted: socket.socket, connection: _Connection) -> None:
        # Here and not in the task itself: a task that is cancelled before its first step runs nothing of its own.
        if connection in self._open:
            self._open[connection] = None
        error = None if setup.cancelled() else setup.exception()
        if error is None and not setup.cancelled():
            return
        connection.abort()
        if connection.transport is None:
            accepted.close()
            self._ended(connection)
        if isinstance(error, ssl.SSLCertVerificationError):
            code = "svid_expired" if "expired" in error.verify_message else "svid_untrusted"
            self._refused(InvalidSvid(f"the handshake refused it: {error.verify_message}", code=code), connection)
        elif isinstance(error, BrokerError):
            self._refused(error, connection)
        elif isinstance(error, OSError):
            # ssl's errors and time-outs: scanners and garbage, nobody to tell, nothing to record.
            _LOG.debug("handshake with %s failed: %s", connection.address, type(error).__name__)
        elif error:
            _LOG.error("defect while a connection was set up: %s", type(error).__name__)

    def _judged(self, connection: _Connection, transport: asyncio.Transport) -> None:
        """Give the verdict, between the last byte of the handshake and the first of the application."""
        connection.transport = transport
        ssl_object: ssl.SSLObject = transport.get_extra_info("ssl_object")
        is_h2 = ssl_object.selected_alpn_protocol() == ALPN_H2
        try:
            peer = self._verdict(ssl_object, self._bundles(), self._clock.now())
            protocol = self._spliced(connection, peer) if is_h2 else self._served(connection, peer)
        except BrokerError as error:
            if not is_h2:
                transport.write(_forbidden(error))
            # To HTTP/2 not a byte: after our SETTINGS gRPC would call the connection good, and dial again at once.
            transport.close()
            self._refused(error, connection)
            return
        connection.peer = peer
        hour = peer.svid.expires_at if isinstance(peer, SvidPeer) else self._clock.now() + ANONYMOUS_LIFETIME
        connection.lifetime = self._lifetimes.add(hour, connection.abort)
        transport.set_protocol(protocol)
        protocol.connection_made(transport)

    def _spliced(self, connection: _Connection, peer: TlsPeer) -> asyncio.BaseProtocol:
        if self._backend is None:
            raise Refused("gRPC is not served here", code="protocol_not_served")
        connection.name = self._index.admit(replace(peer, address=_host(connection.address)))

        def closed(error: Exception | None) -> None:
            self._ended(connection)
            if isinstance(error, BrokerError):
                self._refused(error, connection)

        watch = FrameMeter(asyncio.get_running_loop().time)
        connection.splice = Splice(self._backend.buffer, closed, watch)
        return connection.splice.front

    def _served(self, connection: _Connection, peer: TlsPeer) -> asyncio.BaseProtocol:
        if self._http is None:
            raise Refused("HTTP is not served here", code="protocol_not_served")
        return self._http.protocol(peer, lambda: self._ended(connection))

    def _ended(self, connection: _Connection) -> None:
        if not connection.is_open:
            return
        connection.is_open = False
        self._index.forget(connection.name)
        self._lifetimes.forget(connection.lifetime)
        self._open.pop(connection, None)
        if not self._open:
            self._emptied.set()
        if self._acceptor:
            self._acceptor.resume()

    def _refused(self, error: BrokerError, connection: _Connection) -> None:
        _LOG.debug("refused at the port: %s", error.reason)
        if self._on_refusal:
            self._on_refusal(error, connection.address)


def _forbidden(error: BrokerError) -> bytes:
    # ssl cannot send an alert of our choice (access_denied), so the reason travels one layer above.
    body = json.dumps({"error": {"code": error.reason, "message": "the client certificate is refused"}}).encode()
    head = "HTTP/1.1 403 Forbidden\r\nconnection: close\r\ncontent-type: application/json\r\ncontent-length: "
    return f"{head}{len(body)}\r\n\r\n".encode() + body


def _host(address: str) -> str:
    return address.rpartition(":")[0].strip("[]") or address


def _remote(accepted: socket.socket) -> str:
    try:
        host, port, *_ = accepted.getpeername()
    except OSError:
        return "unknown"
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
