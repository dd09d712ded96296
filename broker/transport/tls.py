"""TLS contexts and the verdict on a peer: TLS 1.3, no resumption, identity by SPIFFE ID and never by DNS name.

``ssl`` merges all roots, so a handshake that succeeded proves nothing about the trust domain. :func:`judge` verifies
the peer's chain again, under the bundle of the trust domain that its leaf names (X509-SVID section 5). Knows no sockets.
"""

import os
import ssl
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal, Protocol, cast

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.types import CertificateIssuerPrivateKeyTypes
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from broker.errors import InvalidSvid, Misconfigured
from broker.spiffe import BundleSet, X509Svid, verify_x509_svid

ALPN_H2 = "h2"
ALPN_HTTP1 = "http/1.1"
ClientCertificate = Literal["optional", "required", "none"]
_MODES = {"optional": ssl.CERT_OPTIONAL, "required": ssl.CERT_REQUIRED, "none": ssl.CERT_NONE}
_DER = 2  # _ssl.ENCODING_DER


@dataclass(frozen=True, slots=True)
class TlsIdentity:
    """What we present: the leaf first, then its intermediates (DER), and the leaf's private key, which no repr shows."""

    chain_der: tuple[bytes, ...] = field(repr=False)
    key: CertificateIssuerPrivateKeyTypes = field(repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class Anonymous:
    """A TLS peer that presented no certificate. ``address``: where it comes from, without the port; empty: not known."""

    address: str = field(default="", compare=False)


@dataclass(frozen=True, slots=True)
class SvidPeer:
    """A TLS peer whose X.509-SVID was verified on this very connection."""

    svid: X509Svid
    address: str = field(default="", compare=False)


TlsPeer = Anonymous | SvidPeer


def server_context(
    identity: TlsIdentity,
    roots_der: Iterable[bytes],
    *,
    client: ClientCertificate = "optional",
    alpn: Sequence[str] = (ALPN_HTTP1, ALPN_H2),
) -> ssl.SSLContext:
    """Make a server's context; ``roots_der``: every authority whose client certificates may finish the handshake.

    Of ``alpn`` the first that the client offers is chosen: curl, Go and browsers offer both and mean HTTP, gRPC offers h2 alone.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.num_tickets = 0  # a resumed session would skip the check of the chain
    context.verify_mode = _MODES[client]
    return _filled(context, identity, roots_der, alpn)


INTERMEDIATE_CIPHERS = (
    "ECDHE-ECDSA-AES128-GCM-SHA256:ECDHE-RSA-AES128-GCM-SHA256:ECDHE-ECDSA-AES256-GCM-SHA384:"
    "ECDHE-RSA-AES256-GCM-SHA384:ECDHE-ECDSA-CHACHA20-POLY1305:ECDHE-RSA-CHACHA20-POLY1305"
)
"""What Mozilla's intermediate level allows below TLS 1.3, in the client's own order of preference."""


def public_context(identity: TlsIdentity) -> ssl.SSLContext:
    """Make a context for a port that the whole world may read from: Mozilla's intermediate level, no client certificate."""
    context = server_context(identity, (), client="none", alpn=(ALPN_HTTP1,))
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(INTERMEDIATE_CIPHERS)
    return context


def client_context(
    identity: TlsIdentity | None,
    roots_der: Iterable[bytes],
    alpn: Sequence[str] = (ALPN_HTTP1,),
    *,
    unsafe_accept_any_server: bool = False,
) -> ssl.SSLContext:
    """Make a client's context: the server must chain to ``roots_der``; who it is remains for :func:`judge` to say.

    No host name is checked. ``unsafe_accept_any_server`` checks nothing at all: for a first contact without a bundle.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE if unsafe_accept_any_server else ssl.CERT_REQUIRED
    return _filled(context, identity, roots_der, alpn)


def _filled(
    context: ssl.SSLContext, identity: TlsIdentity | None, roots_der: Iterable[bytes], alpn: Sequence[str]
) -> ssl.SSLContext:
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.options |= ssl.OP_NO_TICKET | ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION
    # An authority of a bundle is trusted because it is in the bundle, not because it signed itself.
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    roots = b"".join(roots_der)
    if roots:
        context.load_verify_locations(cadata=roots)
    if identity is not None:
        _load_identity(context, identity)
    if alpn:
        context.set_alpn_protocols(list(alpn))
    return context


def _load_identity(context: ssl.SSLContext, identity: TlsIdentity) -> None:
    # ssl takes keys from paths only: this one is memory that has no name and ends with its descriptor.
    pem = b"".join(x509.load_der_x509_certificate(der).public_bytes(Encoding.PEM) for der in identity.chain_der)
    key = identity.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    with ExitStack() as stack:
        descriptor = os.memfd_create("tls-identity", os.MFD_CLOEXEC)
        stack.callback(os.close, descriptor)
        with open(descriptor, "wb", closefd=False) as memory:
            memory.write(key + pem)
        try:
            context.load_cert_chain(f"/proc/self/fd/{descriptor}")
        except ssl.SSLError:
            # ``from None``: OpenSSL's text is about the file, and the file is the key.
            raise Misconfigured("the key is not the certificate's", code="tls_identity") from None


def roots_of(bundles: BundleSet) -> tuple[bytes, ...]:
    """All X.509 authorities of all bundles, DER: what a handshake needs; which of them counts is judged after it."""
    return tuple(
        authority.public_bytes(Encoding.DER) for bundle in bundles.values() for authority in bundle.x509_authorities
    )


def peer_chain(ssl_object: ssl.SSLObject | ssl.SSLSocket) -> tuple[bytes, ...]:
    """What the peer presented in this handshake, DER, leaf first; ``()`` when it presented no certificate.

    Raises InvalidSvid: ``session_resumed`` (nothing was presented, whatever getpeercert() says), ``chain_unreadable``.
    """
    if ssl_object.session_reused:
        raise InvalidSvid("the TLS session was resumed", code="session_resumed", hint="make a full handshake")
    leaf = ssl_object.getpeercert(binary_form=True)
    if leaf is None:
        return ()
    chain = _presented(ssl_object)
    if not chain or chain[0] != leaf:
        raise InvalidSvid("the peer's certificate chain cannot be read", code="chain_unreadable")
    return chain


class _Certificate(Protocol):
    def public_bytes(self, encoding: int) -> bytes: ...


class _ChainReader(Protocol):
    def get_unverified_chain(self) -> Sequence[_Certificate | bytes] | None: ...


def _presented(ssl_object: ssl.SSLObject | ssl.SSLSocket) -> tuple[bytes, ...]:
    # Public from Python 3.13; before, the method sits on the inner object and gives certificate objects.
    reader = ssl_object if hasattr(ssl_object, "get_unverified_chain") else getattr(ssl_object, "_sslobj", None)
    if reader is None:
        return ()
    chain = cast("_ChainReader", reader).get_unverified_chain() or ()
    return tuple(one if isinstance(one, bytes) else one.public_bytes(_DER) for one in chain)


def judge(ssl_object: ssl.SSLObject | ssl.SSLSocket, bundles: BundleSet, now: datetime) -> TlsPeer:
    """Give the one verdict on a finished handshake: Anonymous, or a verified SVID; raises InvalidSvid otherwise."""
    chain = peer_chain(ssl_object)
    return SvidPeer(verify_x509_svid(chain, bundles, now=now)) if chain else Anonymous()


def nobody(ssl_object: ssl.SSLObject | ssl.SSLSocket, bundles: BundleSet, now: datetime) -> TlsPeer:
    """Give the verdict of a port that asks nobody for a certificate. A resumed session hides nothing there."""
    return Anonymous()


class ContextSource:
    """A context that is built again only when the identity or the bundles have become other objects."""

    def __init__(
        self,
        identity: Callable[[], TlsIdentity],
        bundles: Callable[[], BundleSet],
        build: Callable[[TlsIdentity, BundleSet], ssl.SSLContext],
    ) -> None:
        """Hold the providers of the moment; the source itself is the ``context`` argument of a listener."""
        self._identity = identity
        self._bundles = bundles
        self._build = build
        self._current: tuple[TlsIdentity, BundleSet, ssl.SSLContext] | None = None

    def __call__(self) -> ssl.SSLContext:
        """Give the context for a connection that begins now."""
        identity, bundles = self._identity(), self._bundles()
        if self._current is None or self._current[0] is not identity or self._current[1] is not bundles:
            # A new object each time: from a live context no root can be taken away.
            self._current = (identity, bundles, self._build(identity, bundles))
        return self._current[2]
