"""The bundle endpoint: a port of its own where other trust domains fetch our bundle (SPIFFE Federation §5).

Shows the server's own SVID (https_spiffe), or a certificate from files that are read again when they change (https_web).
Nobody is asked for a certificate or a password: what is served is public, and only its origin matters.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from broker.clock import Clock
from broker.errors import Misconfigured
from broker.server.settings import BundleEndpointSettings
from broker.spiffe import Bundle, BundleSet
from broker.spiffe.federation import Profile
from broker.telemetry.log import get_logger
from broker.transport.callers import CallerIndex
from broker.transport.tls import ContextSource, TlsIdentity, TlsPeer, nobody, public_context
from broker.transport.tls_listener import TlsListener

MAX_CONNECTIONS: Final = 1000
"""At once: other trust domains poll every few minutes."""

_Facts = tuple[int, int, int]

log = get_logger("bundle_endpoint")


class ServingCertificate:
    """A certificate and its key in two files; the pair of the moment, read again when either has changed."""

    def __init__(self, certificate: Path, key: Path, clock: Clock, *, every: float) -> None:
        """Read them; ``every`` in seconds: how often they are looked at. Raises Misconfigured."""
        self._paths = (certificate, key)
        self._clock = clock
        self._every = every
        self._seen = _facts(self._paths)
        self._looked_at = clock.monotonic()
        self._identity = _read(certificate, key)

    def identity(self) -> TlsIdentity:
        """Give the pair; one that cannot be read, as between the writing of the two files, leaves the last good one."""
        now = self._clock.monotonic()
        if now - self._looked_at < self._every:
            return self._identity
        self._looked_at = now
        try:
            seen = _facts(self._paths)
            if seen != self._seen:
                self._identity, self._seen = _read(*self._paths), seen
                log.info("serving_certificate_read", path=str(self._paths[0]))
        except Misconfigured as error:
            log.warning("serving_certificate_not_read", error=error.message)
        return self._identity


def bundle_endpoint(
    settings: BundleEndpointSettings, *, bundle: Callable[[], Bundle], svid: Callable[[], TlsIdentity], clock: Clock
) -> TlsListener:
    """Make the endpoint's listener; raises Misconfigured for certificate files that cannot be read."""
    identity = svid
    if settings.profile is Profile.HTTPS_WEB:
        assert settings.cert_file_path is not None
        assert settings.key_file_path is not None
        every = settings.file_sync_interval.total_seconds()
        identity = ServingCertificate(settings.cert_file_path, settings.key_file_path, clock, every=every).identity
    nothing = BundleSet()
    public_context(identity())
    index: CallerIndex[TlsPeer] = CallerIndex()
    return TlsListener(
        host=settings.address,
        port=settings.port,
        context=ContextSource(identity, lambda: nothing, lambda shown, _bundles: public_context(shown)),
        bundles=lambda: nothing,
        clock=clock,
        index=index,
        grpc_backend=None,
        http_app=endpoint_app(bundle, int(settings.refresh_hint.total_seconds())),
        verdict=nobody,
        max_connections=MAX_CONNECTIONS,
    )


def endpoint_app(bundle: Callable[[], Bundle], refresh_hint: int) -> Starlette:
    """Make the app: ``GET /`` gives the newest bundle, and nothing else is there."""
    written: list[tuple[Bundle, str]] = []

    async def give(request: Request) -> Response:
        current = bundle()
        if not written or written[0][0] is not current:
            written[:] = [(current, current.with_refresh_hint(refresh_hint).to_json())]
        return Response(written[0][1], media_type="application/json")

    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return PlainTextResponse(f"{error.status_code} {error.detail.lower()}\n", error.status_code, error.headers)

    app = Starlette(routes=[Route("/", give, methods=["GET"])], exception_handlers={HTTPException: refused})
    app.router.redirect_slashes = False
    return app


def _facts(paths: tuple[Path, Path]) -> tuple[_Facts, _Facts]:
    def facts(path: Path) -> _Facts:
        found = path.stat()
        return found.st_ino, found.st_size, found.st_mtime_ns

    try:
        return facts(paths[0]), facts(paths[1])
    except OSError as error:
        raise _unreadable(str(error.filename), error.strerror or "unreadable") from error


def _read(certificate: Path, key: Path) -> TlsIdentity:
    try:
        chain = x509.load_pem_x509_certificates(certificate.read_bytes())
        private = load_pem_private_key(key.read_bytes(), password=None)
    except OSError as error:
        raise _unreadable(str(error.filename), error.strerror or "unreadable") from error
    except (ValueError, TypeError, UnsupportedAlgorithm):
        # ``from None``: what the library says may quote the file, and the file is a key.
        raise _unreadable(f"{certificate} or {key}", "not PEM, or encrypted") from None
    if not isinstance(private, ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey):
        raise _unreadable(str(key), "neither an EC nor an RSA key")
    if private.public_key() != chain[0].public_key():
        raise _unreadable(str(key), "not the key of the first certificate")
    return TlsIdentity(tuple(one.public_bytes(Encoding.DER) for one in chain), private)


def _unreadable(what: str, why: str) -> Misconfigured:
    return Misconfigured(
        f"the bundle endpoint's certificate: {what}: {why}",
        code="serving_certificate",
        hint="correct cert_file_path and key_file_path of [server.federation.bundle_endpoint]",
    )
