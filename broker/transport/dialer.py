"""gRPC to a server that is known by its SPIFFE ID: the server is judged by the bundle of its trust domain, never by DNS.

grpcio can only check host names, so it connects to a private Unix socket; each such connection is spliced to a TLS
connection that this module made and judged. Knows nothing of calls and services.
"""

import asyncio
import os
import shutil
import socket
import ssl
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import cast

import grpc.aio
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from typing_extensions import override

from broker.clock import Clock
from broker.errors import BrokerError, Invalid, InvalidSvid, Misconfigured, Unavailable
from broker.spiffe import BundleSet, SpiffeId
from broker.transport.acceptor import BACKLOG, Acceptor
from broker.transport.handshake import connect_tls
from broker.transport.lifetimes import Lifetimes
from broker.transport.peercred import peer_pid
from broker.transport.redial import Redial
from broker.transport.socket_path import MAX_PATH_BYTES
from broker.transport.splice import CHUNK, Splice
from broker.transport.tls import ALPN_H2, SvidPeer, TlsIdentity, client_context, judge, peer_chain

CONNECT_DEADLINE = 10.0  # seconds for name, TCP and TLS together
MAX_CONNECTIONS = 64  # of one channel: grpcio makes one, and a new one while the old one drains
MAX_MESSAGE_BYTES = 4 * 1024 * 1024  # as on every server of ours
_CHANNEL_OPTIONS = (
    ("grpc.use_local_subchannel_pool", 1),  # another dialer's path may come again: never share its connection
    ("grpc.enable_http_proxy", 0),
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.initial_reconnect_backoff_ms", 200),
    ("grpc.min_reconnect_backoff_ms", 15_000),  # in truth how long one attempt may take: longer than CONNECT_DEADLINE
    ("grpc.max_reconnect_backoff_ms", 1_000),  # to our own socket: when the server itself is tried is Redial's to say
    ("grpc.keepalive_time_ms", 30_000),  # finds a server that went without a word, while calls are open
    ("grpc.keepalive_timeout_ms", 10_000),
)

_UNKNOWN_AUTHORITY = frozenset({7, 18, 19, 20, 21})
"""OpenSSL's X509_V_ERR_ codes of a chain that ends in no authority of ours: bad signature, self-signed, no issuer."""

UnsafeServerCheck = Callable[[tuple[bytes, ...]], None]


class _TooSoonError(Unavailable):
    """Nobody asked the server: it could not be reached a moment ago."""


class _Gate(asyncio.Protocol):
    """Judges the server when the handshake ends, before a byte of ours is sent."""

    def __init__(self, judged: Callable[[asyncio.Transport], asyncio.BaseProtocol]) -> None:
        self._judged = judged
        self.refusal: BrokerError | None = None

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        tls = cast("asyncio.Transport", transport)
        try:
            protocol = self._judged(tls)
        except BrokerError as error:
            self.refusal = error
            tls.abort()
            return
        tls.set_protocol(protocol)
        protocol.connection_made(tls)


class SpiffeDialer:
    """``async with SpiffeDialer(…) as channel:`` gives a ``grpc.aio.Channel`` to ``address`` (``host:port``)."""

    def __init__(
        self,
        address: str,
        *,
        identity: Callable[[], TlsIdentity | None],
        bundles: Callable[[], BundleSet],
        expect: SpiffeId,
        clock: Clock,
        unsafe_accept_any_server: UnsafeServerCheck | None = None,
        directory: Path | None = None,
        on_failed: Callable[[str], None] = lambda _reason: None,
    ) -> None:
        """``identity`` and ``bundles`` are asked for each new TLS connection; raises Invalid for a bad address.

        ``on_failed`` is told why no connection can be made: once, until it is for another reason.

        ``unsafe_accept_any_server(chain)`` is called instead of verification while there is no bundle of
        ``expect.trust_domain``; it may raise to refuse. ``directory``: where the private socket's directory is made.
        """
        self._host, self._port = _split(address)
        self._identity = identity
        self._bundles = bundles
        self._expect = expect
        self._clock = clock
        self._unsafe = unsafe_accept_any_server
        self._parent = directory
        self._buffer = memoryview(bytearray(CHUNK))
        self._open: dict[Splice, asyncio.Task[None] | None] = {}
        self._judged_by: dict[Splice, x509.Certificate] = {}
        self._lost = 0
        self._emptied = asyncio.Event()
        self._lifetimes = Lifetimes(clock)
        self._redial = Redial()
        self._last_error: str | None = None
        self._on_failed = on_failed
        self._is_stranger = False
        self._channel: grpc.aio.Channel | None = None
        self._acceptor: Acceptor | None = None
        self._directory: Path | None = None

    @property
    def last_error(self) -> str | None:
        """Why the last connection could not be made, in words for a log; None after a success."""
        return self._last_error

    @property
    def lost(self) -> int:
        """How many connections to the server have ended, whoever ended them: what was under way on them is lost."""
        return self._lost

    @property
    def is_stranger(self) -> bool:
        """Whether the last server that showed a certificate was of an authority that is not in the bundle."""
        return self._is_stranger

    def reconnect(self) -> None:
        """Drop the current TLS connections: the next is made at once, with the identity and bundles of then."""
        self._redial.at_once()
        for splice in list(self._open):
            splice.abort()

    def recheck(self) -> None:
        """Drop the connections to a server whose authority is no longer in the bundle. Call on a bundle change."""
        bundle = self._bundles().get(self._expect.trust_domain)
        trusted = frozenset(bundle.x509_authorities) if bundle else frozenset()
        for splice, authority in list(self._judged_by.items()):
            if authority not in trusted:
                splice.abort()

    async def __aenter__(self) -> grpc.aio.Channel:
        """Open the private socket and the channel; no connection is made before the first call."""
        self._directory = Path(tempfile.mkdtemp(prefix="broker-", dir=self._parent))  # 0700
        path = self._directory / "s"
        if len(os.fsencode(path)) > MAX_PATH_BYTES:
            self._directory.rmdir()
            raise Misconfigured(f"{path} is too long for a socket", code="socket_path_unsafe", hint="shorten TMPDIR")
        listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        listening.bind(os.fspath(path))
        listening.listen(BACKLOG)
        self._acceptor = Acceptor(listening, self._accepted, lambda: len(self._open) < MAX_CONNECTIONS)
        self._acceptor.start()
        self._lifetimes.start()
        authority = f"[{self._host}]:{self._port}" if ":" in self._host else f"{self._host}:{self._port}"
        options = (*_CHANNEL_OPTIONS, ("grpc.default_authority", authority))
        self._channel = grpc.aio.insecure_channel(f"unix:{path}", options=options)
        return self._channel

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the channel, its connections and the private directory."""
        if self._channel:
            await self._channel.close()
        if self._acceptor:
            self._acceptor.close()
        self._lifetimes.stop()
        setups = [setup for setup in self._open.values() if setup]
        for setup in setups:
            setup.cancel()
        await asyncio.gather(*setups, return_exceptions=True)
        self.reconnect()
        if self._open:
            self._emptied.clear()
            await self._emptied.wait()
        if self._directory:
            shutil.rmtree(self._directory, ignore_errors=True)

    def _accepted(self, accepted: socket.socket) -> None:
        if peer_pid(accepted) != os.getpid():
            accepted.close()  # what is sent here leaves under our identity: from this process only
            return
        lifetimes: list[int] = []
        splice = Splice(self._buffer, lambda _error: self._ended(splice, lifetimes))
        setup = asyncio.get_running_loop().create_task(self._connect(accepted, splice, lifetimes))
        self._open[splice] = setup
        setup.add_done_callback(lambda done: self._connected(done, accepted, splice, lifetimes))

    async def _connect(self, accepted: socket.socket, splice: Splice, lifetimes: list[int]) -> None:
        await asyncio.get_running_loop().connect_accepted_socket(lambda: splice.front, accepted)
        if any(one.back.spoke for one in self._open):
            self._redial.at_once()
        if (wait := self._redial.take(asyncio.get_running_loop().time())) > 0:
            raise _TooSoonError(f"the server is away, and tried again in {wait:.1f} s", code="server_away")
        await self._dial(_Gate(lambda transport: self._judged(transport, splice, lifetimes)))

    def _connected(
        self, setup: asyncio.Task[None], accepted: socket.socket, splice: Splice, lifetimes: list[int]
    ) -> None:
        # Here and not in the task itself: a task that is cancelled before its first step runs nothing of its own.
        if splice in self._open:
            self._open[splice] = None
        error = None if setup.cancelled() else setup.exception()
        if error is None and not setup.cancelled():
            self._last_error, self._is_stranger = None, False
            return
        if error is not None and not isinstance(error, _TooSoonError):
            self._redial.failed(asyncio.get_running_loop().time())
        if not isinstance(error, _TooSoonError):
            self._failed(_words(error) if error else "closed")
        if isinstance(error, ssl.SSLCertVerificationError):
            self._is_stranger = error.verify_code in _UNKNOWN_AUTHORITY
        splice.abort()
        if splice.front.transport is None:
            accepted.close()
            self._ended(splice, lifetimes)

    def _failed(self, reason: str) -> None:
        if reason != self._last_error:
            self._last_error = reason
            self._on_failed(reason)

    async def _dial(self, gate: _Gate) -> None:
        await connect_tls(self._host, self._port, gate, self._context(), deadline=CONNECT_DEADLINE)
        if gate.refusal:
            raise gate.refusal

    def _context(self) -> ssl.SSLContext:
        bundle = self._bundles().get(self._expect.trust_domain)
        if bundle is None and self._unsafe is None:
            raise Unavailable(f"there is no bundle of {self._expect.trust_domain} yet", code="no_bundle")
        roots = [authority.public_bytes(Encoding.DER) for authority in bundle.x509_authorities] if bundle else []
        return client_context(self._identity(), roots, (ALPN_H2,), unsafe_accept_any_server=bundle is None)

    def _judged(self, transport: asyncio.Transport, splice: Splice, lifetimes: list[int]) -> asyncio.BaseProtocol:
        ssl_object: ssl.SSLObject = transport.get_extra_info("ssl_object")
        if ssl_object.selected_alpn_protocol() != ALPN_H2:
            raise Unavailable("the server does not speak HTTP/2", code="protocol_not_served")
        bundles = self._bundles()
        if self._expect.trust_domain not in bundles and self._unsafe is not None:
            self._unsafe(peer_chain(ssl_object))
            return splice.back
        peer = judge(ssl_object, bundles, self._clock.now())
        if not isinstance(peer, SvidPeer) or peer.svid.id != self._expect:
            shown = peer.svid.id if isinstance(peer, SvidPeer) else "nobody"
            raise InvalidSvid(f"the server is {shown}, not {self._expect}", code="server_unexpected")
        lifetimes.append(self._lifetimes.add(peer.svid.expires_at, splice.abort))
        self._judged_by[splice] = peer.svid.authority
        return splice.back

    def _ended(self, splice: Splice, lifetimes: list[int]) -> None:
        self._open.pop(splice, None)
        if self._judged_by.pop(splice, None) is not None:
            self._lost += 1
        if splice.back.spoke:
            self._redial.at_once()
        elif splice.ended_by is splice.back:
            self._redial.failed(asyncio.get_running_loop().time())
            self._failed("the server closed the connection after the handshake: it may refuse our certificate")
        if not self._open:
            self._emptied.set()
        for number in lifetimes:
            self._lifetimes.forget(number)
        if self._acceptor:
            self._acceptor.resume()


def _split(address: str) -> tuple[str, int]:
    host, colon, port = address.rpartition(":")
    if not (colon and host and port.isascii() and port.isdecimal() and 0 < int(port) < 65536):
        raise Invalid(f"{address!r} is not host:port", code="invalid_address")
    return host.removeprefix("[").removesuffix("]"), int(port)


def _words(error: BaseException) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the server's certificate does not verify: {error.verify_message}"
    if isinstance(error, BrokerError):
        return f"{error.message} ({error.reason})"
    if isinstance(error, TimeoutError):
        return "no answer in time"
    return f"{type(error).__name__}: {error}"
