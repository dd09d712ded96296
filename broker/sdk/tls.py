"""TLS with this process's SVID: contexts that follow rotation by themselves.

The stdlib reads certificates from a context when a handshake starts, and its stores only grow. So a context here delegates each
new connection to a context built from the newest identity and bundles; connections that exist keep what they began with.
Whether a peer is who it should be is judged after the handshake, per trust domain: :func:`require_peer`.
"""

import ssl
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

from broker.clock import Clock, SystemClock
from broker.errors import Refused, Unavailable
from broker.spiffe import BundleSet, SpiffeId, X509Svid
from broker.spiffe.x509svid import split_der
from broker.transport import tls

if TYPE_CHECKING:
    from broker.sdk.workload import Workload


class RotatingContext(ssl.SSLContext):
    """An ``SSLContext`` that gives each new connection the context of that moment."""

    _newest: Callable[[], ssl.SSLContext]

    def wrap_bio(self, *args: Any, **kwargs: Any) -> ssl.SSLObject:
        """Begin a connection over memory buffers (asyncio, uvicorn, httpx2)."""
        return self._newest().wrap_bio(*args, **kwargs)

    def wrap_socket(self, *args: Any, **kwargs: Any) -> ssl.SSLSocket:
        """Begin a connection over a socket (``http.server``)."""
        return self._newest().wrap_socket(*args, **kwargs)


def server_context(workload: "Workload", *, alpn: Sequence[str] = ("http/1.1",)) -> ssl.SSLContext:
    """Give a context for a service: its SVID, and client certificates required."""

    def build(identity: tls.TlsIdentity, bundles: BundleSet) -> ssl.SSLContext:
        return tls.server_context(identity, _roots(bundles), client="required", alpn=alpn)

    return _rotating(ssl.PROTOCOL_TLS_SERVER, workload, build)


def client_context(
    workload: "Workload", *, check_hostname: bool = True, alpn: Sequence[str] = ("http/1.1",)
) -> ssl.SSLContext:
    """Give a context for calling services: our SVID, their certificate under our bundles, and their DNS name.

    Pass ``check_hostname=False`` only together with :func:`require_peer` on the connection: somebody must say who it is.
    """

    def build(identity: tls.TlsIdentity, bundles: BundleSet) -> ssl.SSLContext:
        context = tls.client_context(identity, _roots(bundles), alpn=alpn)
        context.check_hostname = check_hostname
        return context

    context = _rotating(ssl.PROTOCOL_TLS_CLIENT, workload, build)
    context.check_hostname = check_hostname
    return context


def require_peer(
    connection: ssl.SSLObject | ssl.SSLSocket,
    bundles: BundleSet,
    allowed: Collection[SpiffeId],
    *,
    clock: Clock | None = None,
) -> X509Svid:
    """Say who is on the other end, if it is one of ``allowed``.

    Raises:
        InvalidSvid: no certificate, or one that does not verify under the bundle of its own trust domain.
        Refused: somebody else.
    """
    peer = tls.judge(connection, bundles, (clock or SystemClock()).now())
    if not isinstance(peer, tls.SvidPeer):
        raise Refused("the peer showed no certificate", code="no_peer_certificate")
    if peer.svid.id not in allowed:
        raise Refused(f"the peer is {peer.svid.id}", code="unexpected_peer")
    return peer.svid


def _rotating(
    protocol: int, workload: "Workload", build: Callable[[tls.TlsIdentity, BundleSet], ssl.SSLContext]
) -> RotatingContext:
    built: list[tuple[object, object, ssl.SSLContext]] = []

    def newest() -> ssl.SSLContext:
        identity, bundles = workload.current, workload.bundles
        if identity is None or not bundles:
            raise Unavailable("no identity yet: wait for Workload.identity() before serving", code="no_identity_yet")
        if not built or built[0][0] is not identity or built[0][1] is not bundles:
            built[:] = [(identity, bundles, build(identity.tls, bundles))]
        return built[0][2]

    context = RotatingContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context._newest = newest  # noqa: SLF001 - our own subclass; SSLContext's __new__ takes no further arguments
    return context


def _roots(bundles: BundleSet) -> tuple[bytes, ...]:
    return tuple(der for bundle in bundles.values() for der in split_der(bundle.x509_der()))
