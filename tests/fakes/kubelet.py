"""A kubelet and an API server in one: HTTPS with a CA of its own, and the faults of bad days.

``pods`` is what the kubelet lists; ``things`` maps API paths to objects; ``review`` answers a TokenReview. ``fault`` breaks
an answer: status, redirect, cut, huge, garbage, duplicate, slow (a byte now and then), hang. ``is_chunked`` breaks none: Go
sends whatever is longer than a few KiB so.
"""

import contextlib
import functools
import ipaddress
import json
import ssl
import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

TOKEN = "agent-token"
RECORDINGS = Path(__file__).parent / "recordings"
HUGE = 1 << 20  # the piece that a huge answer is made of, sent until the asker has had enough


class FakeAuthority:
    """A CA that writes PEM files into a directory."""

    def __init__(self, directory: Path, name: str = "kubernetes") -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self.path = directory / "ca.crt"
        certificate = _builder(self._name, self._name, self._key, is_ca=True).sign(self._key, hashes.SHA256())
        self.path.write_bytes(certificate.public_bytes(Encoding.PEM))

    def leaf(self, name: str, *names: str) -> tuple[Path, Path]:
        """Certify a new key for DNS names and addresses; gives the certificate's and the key's files."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        certificate = (
            _builder(subject, self._name, key, is_ca=False)
            .add_extension(x509.SubjectAlternativeName([_general(one) for one in names]), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        paths = self.directory / f"{name}.crt", self.directory / f"{name}.key"
        paths[0].write_bytes(certificate.public_bytes(Encoding.PEM))
        paths[1].write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        return paths


class FakeKubernetes:
    """The server. ``token``: the bearer that it wants; ``None``: anybody, or a client certificate where one is wanted."""

    def __init__(self, directory: Path, *, names: tuple[str, ...] = ("localhost",), is_plain: bool = False) -> None:
        self.authority = FakeAuthority(directory)
        self.token: str | None = TOKEN
        (directory / "token").write_text(f"{TOKEN}\n")  # beside ca.crt, as in a service account's directory
        self.pods: list[dict[str, Any]] = []
        self.things: dict[str, Any] = {}
        self.review: Callable[[dict[str, Any]], dict[str, Any]] = lambda spec: {"authenticated": False}
        self.requests: list[str] = []
        self.reviewed: list[dict[str, Any]] = []
        self.fault = ""
        self.is_chunked = False
        self.released = threading.Event()
        self.asked: Callable[[str], None] = lambda path: None  # called before each answer
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.load_cert_chain(*self.authority.leaf("server", *names))
        self._server = _Server(("127.0.0.1", 0), functools.partial(_Handler, self))
        self._server.context = None if is_plain else self.context
        self.port = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.released.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def want_certificate(self) -> None:
        """Ask every client for a certificate of this CA, and for no token."""
        self.token = None
        self.context.verify_mode = ssl.CERT_REQUIRED
        self.context.load_verify_locations(self.authority.path)

    def truth(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        """Answer as Kubernetes does."""
        if method == "POST" and path.endswith("/apis/authentication.k8s.io/v1/tokenreviews"):
            spec = json.loads(body)["spec"]
            self.reviewed.append(spec)
            metadata = {"creationTimestamp": None}
            review = {
                "kind": "TokenReview",
                "apiVersion": "authentication.k8s.io/v1",
                "metadata": metadata,
                "spec": spec,
            }
            return 201, {**review, "status": self.review(spec)}
        if method == "GET" and path == "/pods":
            return 200, {"kind": "PodList", "apiVersion": "v1", "metadata": {}, "items": self.pods or None}
        if method == "GET" and path in self.things:
            return 200, self.things[path]
        return 404, {"kind": "Status", "status": "Failure", "code": 404}


class _Server(ThreadingHTTPServer):
    """Each connection's handshake is made in its own thread, and may fail."""

    context: ssl.SSLContext | None = None

    def finish_request(self, request: Any, client_address: Any) -> None:
        with contextlib.suppress(OSError):
            if self.context is None:
                super().finish_request(request, client_address)
                return
            with self.context.wrap_socket(request, server_side=True) as secured:
                super().finish_request(secured, client_address)
                secured.settimeout(1)
                with contextlib.suppress(OSError, ValueError):
                    secured.unwrap()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, fake: FakeKubernetes, *args: Any) -> None:
        self._fake = fake
        super().__init__(*args)

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def _answer(self) -> None:
        fake = self._fake
        body = self.rfile.read(int(self.headers.get("content-length", "0")))
        fake.requests.append(self.path)
        fake.asked(self.path)
        self.close_connection = True
        if fake.token is not None and self.headers.get("authorization") != f"Bearer {fake.token}":
            self._send(401, b"Unauthorized")
            return
        status, thing = fake.truth(self.command, self.path, body)
        with contextlib.suppress(OSError):
            self._faulty(status, json.dumps(thing).encode())

    def _faulty(self, status: int, body: bytes) -> None:
        fake, fault = self._fake, self._fake.fault
        if fault == "hang":
            fake.released.wait()
        elif fault == "status":
            self._send(500, body)
        elif fault == "redirect":
            self._send(302, b"", location=self.path)
        elif fault == "cut":
            self._send(status, body[:-1], length=len(body))
        elif fault == "garbage":
            self._send(status, b"{" + body)
        elif fault == "duplicate":
            self._send(status, body[:-1] + b', "kind": "' + json.loads(body)["kind"].encode() + b'"}')
        elif fault == "not-http":
            self.wfile.write(b"\x15\x03\x01 what?\r\n\r\n")
        elif fault == "huge":
            self._send(status, b"")
        elif fault == "slow":
            self.wfile.write(f"HTTP/1.1 {status} OK\r\n\r\n".encode())
            for byte in body:
                self.wfile.write(bytes([byte]))
                if fake.released.wait(0.02):
                    return
        elif fake.is_chunked:
            pieces = [body[at : at + 700] for at in range(0, len(body), 700)]
            framed = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)
            self.wfile.write(f"HTTP/1.1 {status} OK\r\nTransfer-Encoding: chunked\r\n\r\n".encode() + framed)
            self.wfile.write(b"0\r\n\r\n" if fault != "cut-chunk" else b"")
        else:
            self._send(status, body)

    def _send(self, status: int, body: bytes, *, length: int | None = None, **headers: str) -> None:
        self.send_response(status)
        self.send_header("content-type", "application/json")
        if self._fake.fault != "huge":
            self.send_header("content-length", str(len(body) if length is None else length))
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("connection", "close")
        self.end_headers()
        self.wfile.write(body)
        while self._fake.fault == "huge" and not self._fake.released.is_set():
            self.wfile.write(b" " * HUGE)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def recording(name: str) -> dict[str, Any]:
    """Give what a kubelet or an API server answers, whole: lists of pods of three runtimes, a TokenReview, a node.

    Every field is one of Kubernetes 1.33's, with values of a shop that does not exist; no cluster was listened to. Those
    under ``kubelet/`` are a real kubelet's own answers, as the README there says.
    """
    found: dict[str, Any] = json.loads((RECORDINGS / f"{name}.json").read_text())
    return found


def recorded_cgroup(name: str) -> bytes:
    """Give ``/proc/<pid>/cgroup`` of a process in a container of that real kubelet's."""
    return (RECORDINGS / "kubelet" / "cgroup" / f"{name}.txt").read_bytes()


def pod(uid: str, container: str, **changes: Any) -> dict[str, Any]:
    """A pod as a kubelet lists it, with one running container; ``changes`` replace top-level parts of its status."""
    return {
        "metadata": {
            "name": "orders-5d9f",
            "namespace": "shop",
            "uid": uid,
            "labels": {"app": "orders", "tier": "backend"},
            "ownerReferences": [
                {"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "orders", "uid": "owner-1", "controller": True}
            ],
            "creationTimestamp": "2026-01-01T00:00:00Z",
        },
        "spec": {"serviceAccountName": "orders", "nodeName": "node-1", "containers": [{"name": "main"}]},
        "status": {"phase": "Running", "hostIP": "10.0.0.1", "containerStatuses": [status(container)], **changes},
    }


def status(container: str, name: str = "main", state: str = "running", runtime: str = "containerd") -> dict[str, Any]:
    """One container's status."""
    return {
        "name": name,
        "image": f"registry.example/{name}:1",
        "imageID": f"registry.example/{name}@sha256:{'a' * 64}",
        "containerID": f"{runtime}://{container}" if container else "",
        "state": {state: {"startedAt": "2026-01-01T00:00:00Z"}},
        "ready": True,
        "restartCount": 0,
    }


def _general(name: str) -> x509.GeneralName:
    with contextlib.suppress(ValueError):
        return x509.IPAddress(ipaddress.ip_address(name))
    return x509.DNSName(name)


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, *, is_ca: bool
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=is_ca, path_length=None), critical=True)
    )
