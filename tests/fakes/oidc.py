"""A small real OpenID issuer over HTTPS, with a CA of its own: discovery, keys, ID tokens, and the faults of bad days.

It serves on a port of the kernel's choice in a thread of its own. ``OidcIssuer.start(directory)`` writes the CA to a file.
"""

import base64
import contextlib
import functools
import ipaddress
import itertools
import json
import ssl
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID


def b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


_TURNS = itertools.count()


@functools.cache
def _rsa_key(place: int) -> rsa.RSAPrivateKey:
    """RSA keys take long to make: four are used in turns, so that neighbours always differ."""
    return rsa.generate_private_key(65537, 2048)


class SigningKey:
    """One key of the issuer: RS256 or ES256. A stranger's is never one of an issuer's."""

    def __init__(self, kid: str, alg: str = "RS256", *, is_strangers: bool = False) -> None:
        self.kid = kid
        self.alg = alg
        self.private: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey
        if alg == "RS256":
            self.private = _rsa_key(-1 if is_strangers else next(_TURNS) % 4)
        else:
            self.private = ec.generate_private_key(ec.SECP256R1())

    def sign(self, data: bytes) -> bytes:
        if isinstance(self.private, rsa.RSAPrivateKey):
            return self.private.sign(data, padding.PKCS1v15(), hashes.SHA256())
        r, s = decode_dss_signature(self.private.sign(data, ec.ECDSA(hashes.SHA256())))
        return r.to_bytes(32) + s.to_bytes(32)

    def jwk(self) -> dict[str, Any]:
        members: dict[str, Any] = {"kid": self.kid, "use": "sig", "alg": self.alg}
        if isinstance(self.private, rsa.RSAPrivateKey):
            numbers = self.private.public_key().public_numbers()
            size = (numbers.n.bit_length() + 7) // 8
            return members | {"kty": "RSA", "n": b64(numbers.n.to_bytes(size)), "e": b64(numbers.e.to_bytes(3))}
        point = self.private.public_key().public_numbers()
        return members | {"kty": "EC", "crv": "P-256", "x": b64(point.x.to_bytes(32)), "y": b64(point.y.to_bytes(32))}


class OidcIssuer:
    """The issuer. ``fetched`` counts requests by path; ``fault`` breaks the answers (see ``_Handler``)."""

    def __init__(self, directory: Path) -> None:
        self.keys = [SigningKey("key-1")]
        self.fetched: dict[str, int] = {}
        self.fault = ""
        self.claimed_issuer: str | None = None
        self.jwks_uri: str | None = None
        self.extra_jwks: list[dict[str, Any]] = []
        self.events: dict[str, str] = {}
        self.polled: list[dict[str, Any]] = []
        self.poll_token = ""
        self.poll_language = ""
        self.ca_path = directory / "oidc-ca.pem"
        context = self._tls()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler_of(self))
        self._server.daemon_threads = True
        self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self.issuer = f"https://localhost:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)

    @classmethod
    @contextlib.contextmanager
    def start(cls, directory: Path) -> "Iterator[OidcIssuer]":
        issuer = cls(directory)
        issuer._thread.start()
        try:
            yield issuer
        finally:
            issuer._server.shutdown()
            issuer._server.server_close()
            issuer._thread.join()

    def token(
        self,
        sub: Any = "alice",
        *,
        key: SigningKey | None = None,
        header: Mapping[str, Any] | None = None,
        now: float | None = None,
        lifetime: int = 600,
        **claims: Any,
    ) -> str:
        """Sign a token: an ID token for ``broker`` unless claims or header say otherwise; ``None`` leaves a member out."""
        signer = key or self.keys[0]
        at = int(time.time() if now is None else now)
        payload = {"iss": self.issuer, "sub": sub, "aud": "broker", "iat": at, "exp": at + lifetime} | claims
        top = {"alg": signer.alg, "kid": signer.kid, "typ": "JWT"} | dict(header or {})
        return self.raw_token(_present(top), _present(payload), signer)

    def raw_token(self, header: Mapping[str, Any], payload: Mapping[str, Any], key: SigningKey | None = None) -> str:
        text = b64(json.dumps(header).encode()) + "." + b64(json.dumps(payload).encode())
        return text + "." + b64((key or self.keys[0]).sign(text.encode()))

    def rotate(self, alg: str = "RS256") -> SigningKey:
        """Replace all keys by a new one."""
        self.keys = [SigningKey(f"key-{time.monotonic_ns()}", alg)]
        return self.keys[0]

    def document(self, path: str) -> bytes | None:
        if path == "/.well-known/openid-configuration":
            return json.dumps(
                {
                    "issuer": self.claimed_issuer or self.issuer,
                    "jwks_uri": self.jwks_uri or f"{self.issuer}/jwks",
                    "id_token_signing_alg_values_supported": ["RS256", "ES256"],
                }
            ).encode()
        if path == "/jwks":
            return json.dumps({"keys": [key.jwk() for key in self.keys] + self.extra_jwks}).encode()
        return None

    def _tls(self) -> ssl.SSLContext:
        root, leaf = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "an OpenID issuer's CA")])
        names = x509.SubjectAlternativeName(
            [x509.DNSName("localhost"), x509.IPAddress(ipaddress.IPv4Address("127.0.0.1"))]
        )
        ca = _certificate(name, name, root.public_key(), is_ca=True).sign(root, hashes.SHA256())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
        end = _certificate(subject, name, leaf.public_key(), is_ca=False).add_extension(names, critical=False)
        certificate = end.sign(root, hashes.SHA256())
        self.ca_path.write_bytes(ca.public_bytes(Encoding.PEM))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        with tempfile.NamedTemporaryFile() as file:
            file.write(certificate.public_bytes(Encoding.PEM))
            file.write(leaf.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
            file.flush()
            context.load_cert_chain(file.name)
        return context


def _certificate(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, *, is_ca: bool
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=is_ca, path_length=None), critical=True)
    )


def _present(members: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in members.items() if value is not None}


def _handler_of(issuer: OidcIssuer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        """Faults: redirect, status, huge, slow, garbage, http (a plain address of the keys), empty (no keys)."""

        def do_GET(self) -> None:
            issuer.fetched[self.path] = issuer.fetched.get(self.path, 0) + 1
            body = issuer.document(self.path)
            fault = issuer.fault
            with contextlib.suppress(OSError):
                if body is None or fault == "status":
                    self._send(404, b"{}")
                elif fault == "redirect":
                    self._send(302, b"", location=f"https://localhost:1{self.path}")
                elif fault == "huge":
                    self._send(200, b" " * 70_000 + body)
                elif fault == "garbage":
                    self._send(200, b'{"issuer": "x", "issuer": "y"}')
                elif fault == "slow":
                    self.send_response(200)
                    self.end_headers()
                    for byte in body:
                        self.wfile.write(bytes([byte]))
                        time.sleep(0.2)
                elif fault == "empty" and self.path == "/jwks":
                    self._send(200, b'{"keys": []}')
                elif fault == "http" and self.path != "/jwks":
                    self._send(200, body.replace(b'"jwks_uri": "https:', b'"jwks_uri": "http:'))
                else:
                    self._send(200, body)

        def do_POST(self) -> None:
            """As a transmitter of security events: give those that were not acknowledged (RFC 8936)."""
            asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
            issuer.polled.append(asked)
            issuer.poll_language = self.headers.get("content-language", "")
            for jti in (*asked["ack"], *asked.get("setErrs", {})):
                if issuer.fault != "deaf":
                    issuer.events.pop(jti, None)
            if issuer.fault == "status" or self.headers.get("authorization", "") != issuer.poll_token:
                self._send(401, b"{}")
                return
            most = None if issuer.fault == "eager" else asked["maxEvents"]
            first = dict(itertools.islice(issuer.events.items(), most))
            more = len(first) < len(issuer.events) or issuer.fault == "more"
            self._send(200, json.dumps({"sets": first, "moreAvailable": more}).encode())

        def _send(self, status: int, body: bytes, **headers: str) -> None:
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(body)))
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    return Handler
