"""Asks a kubelet or an API server over HTTP: one question a connection, no redirects, each answer bounded and in time.

Blocks: for a thread of ``BlockingReads``. Whoever asks reads authorities, certificates and tokens anew for each question,
for they are renewed at any time. Faults say what is wrong and quote nothing; an attestor makes its own refusal of them.
Knows no selectors, and of Kubernetes' objects only that they are JSON.
"""

import http.client
import io
import json
import os
import re
import socket
import ssl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal, TypeAlias, TypeVar, cast

from pydantic import BaseModel, ValidationError

from broker.attestation.reads import Deadline
from broker.errors import Invalid
from broker.spiffe.strictjson import loads

MAX_HEAD: Final = 1 << 16  # bytes beside the body
MAX_DEPTH: Final = 64  # of the JSON: managedFields nest as deep as the fields that they speak of, twice
MAX_FILE: Final = 1 << 20  # bytes of a token, a certificate or all authorities of a machine
_HOST: Final = re.compile(r"[A-Za-z0-9.:_-]{1,253}")
_PORT: Final = re.compile("[0-9]{1,5}")
_BEARER: Final = re.compile(rb"[\x21-\x7e]+")
M = TypeVar("M", bound=BaseModel)
FaultKind: TypeAlias = Literal["answer", "credentials", "denied", "unreachable", "untrusted"]


class Fault(Exception):
    """Why there is no answer; ``what`` completes "the kubelet …", and ``hint`` is a remedy or empty."""

    def __init__(self, kind: FaultKind, what: str, hint: str = "") -> None:
        super().__init__(what)
        self.kind: Final = kind
        self.what: Final = what
        self.hint: Final = hint


class NotFound(Fault):
    """It answered 404."""


@dataclass(frozen=True, slots=True, repr=False)
class Server:
    """Whom to ask, how it is known, and as whom."""

    host: str
    port: int
    context: ssl.SSLContext | None  # None: plain HTTP
    token: bytes | None
    max_answer: int  # bytes of a body
    name: str = ""  # that its certificate must bear; empty: the host's
    prefix: str = ""  # of every path

    def ask(self, model: type[M], path: str, deadline: Deadline, question: Mapping[str, object] | None = None) -> M:
        """Get a thing, or post a question. Raises :class:`Fault`, and ``TimeoutError`` when it is late."""
        status, body = self._answer(self._request(path, question), deadline)
        if status == http.HTTPStatus.NOT_FOUND:
            raise NotFound("answer", "answered 404")
        if status in {http.HTTPStatus.UNAUTHORIZED, http.HTTPStatus.FORBIDDEN}:
            raise Fault("denied", "does not let us ask")
        if status not in {http.HTTPStatus.OK, http.HTTPStatus.CREATED}:
            raise Fault("answer", f"answered {status}")
        try:
            return model.model_validate(loads(body, max_bytes=self.max_answer, max_depth=MAX_DEPTH))
        except (ValidationError, Invalid):
            raise Fault("answer", "gave an answer that is not what it should be") from None

    def _request(self, path: str, question: Mapping[str, object] | None) -> bytes:
        body = b"" if question is None else json.dumps(question).encode()
        host = f"[{self.host}]" if ":" in self.host else self.host
        head = (
            f"{'GET' if question is None else 'POST'} {self.prefix}{path} HTTP/1.1\r\nHost: {host}:{self.port}\r\n"
            f"Accept: application/json\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
            "Connection: close\r\n"
        ).encode("ascii")
        bearer = b"" if self.token is None else b"Authorization: Bearer " + self.token + b"\r\n"
        return head + bearer + b"\r\n" + body

    def _answer(self, request: bytes, deadline: Deadline) -> tuple[int, bytes]:
        try:
            response = http.client.HTTPResponse(cast("socket.socket", _Received(self._exchange(request, deadline))))
            response.begin()
            return response.status, response.read()  # IncompleteRead where it is cut short
        except TimeoutError:
            raise
        except ssl.SSLCertVerificationError:
            raise Fault("untrusted", "has a certificate that does not verify") from None
        except http.client.HTTPException:  # its text could hold a piece of the answer
            raise Fault("answer", "gave an answer that is too long, cut short or not HTTP") from None
        except OSError:
            raise Fault("unreachable", "cannot be asked") from None

    def _exchange(self, request: bytes, deadline: Deadline) -> bytes:
        with socket.create_connection((self.host, self.port), deadline.left()) as plain:
            if self.context is None:
                return self._send(plain, request, deadline)
            with self.context.wrap_socket(plain, server_hostname=self.name or self.host) as secured:
                return self._send(secured, request, deadline)

    def _send(self, connection: socket.socket, request: bytes, deadline: Deadline) -> bytes:
        """Send, then read to the end, each read bounded by the deadline and all of them by a budget."""
        connection.settimeout(deadline.left())
        connection.sendall(request)
        answer = bytearray()
        while part := connection.recv(1 << 16):
            answer += part
            if len(answer) > self.max_answer + MAX_HEAD:
                raise http.client.HTTPException("too long")
            connection.settimeout(deadline.left())
        return bytes(answer)


class _Received(io.BytesIO):
    """A whole answer, as ``http.client`` wants to be given it."""

    def makefile(self, mode: str) -> io.BytesIO:
        return self


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What Kubernetes gives our own pod: its environment, and its service account's directory."""

    environ: Mapping[str, str] = field(default_factory=lambda: os.environ)
    service_account: Path = Path("/var/run/secrets/kubernetes.io/serviceaccount")

    @property
    def authorities_path(self) -> Path:
        """The cluster's authorities, PEM."""
        return self.service_account / "ca.crt"

    @property
    def token_path(self) -> Path:
        """Our service account's token, which the kubelet renews."""
        return self.service_account / "token"

    def api_server_address(self) -> tuple[str, int]:
        """Give host and port of the cluster's API server; raises ``ValueError`` outside of pods."""
        host, port = (self.environ.get(f"KUBERNETES_SERVICE_{name}", "") for name in ("HOST", "PORT"))
        if not is_host(host) or _PORT.fullmatch(port) is None:
            raise ValueError("not in a pod")
        return host, int(port)

    def api_server(self, max_answer: int) -> Server:
        """Read how our own cluster's API server is asked. Raises :class:`Fault`."""
        with reading_credentials():
            host, port = self.api_server_address()
            context = trusting(read_file(self.authorities_path))
            return Server(host, port, context, bearer(read_file(self.token_path)), max_answer)


def is_host(text: str) -> bool:
    """Say whether it is a host's name or address, and nothing that could change a request."""
    return _HOST.fullmatch(text) is not None


@contextmanager
def reading_credentials(hint: str = "") -> Iterator[None]:
    """Make one :class:`Fault` of whatever is wrong with the files read below: their errors may quote a secret."""
    try:
        yield
    except (OSError, ValueError, LookupError, TypeError, Invalid):  # ssl.SSLError is an OSError
        raise Fault("credentials", "cannot be asked: its authorities or our credentials cannot be read", hint) from None


def trusting(authorities: bytes, *, by_name: bool = True) -> ssl.SSLContext:
    """Trust these authorities, PEM; ``by_name``: only for the host's own name. Raises ``ValueError`` for none."""
    context = _client()
    context.check_hostname = by_name
    context.load_verify_locations(cadata=authorities.decode("ascii", "ignore"))  # comments may be in any language
    return context


def trusting_the_public() -> ssl.SSLContext:
    """Trust the machine's own list, as kubectl does for API servers with a public certificate."""
    context = _client()
    context.load_default_certs()
    return context


def trusting_anybody() -> ssl.SSLContext:
    """Trust whoever answers: for an operator who has said that in so many words."""
    context = _client()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def present(context: ssl.SSLContext, certificate: bytes, key: bytes) -> None:
    """Show a client certificate, PEM. Raises ``OSError``."""
    # OpenSSL reads a key from a file only, and this one is in memory.
    with open(os.memfd_create("client", os.MFD_CLOEXEC), "wb") as memory:  # noqa: PTH123 - a descriptor
        memory.write(key + b"\n" + certificate)
        memory.flush()
        context.load_cert_chain(f"/proc/self/fd/{memory.fileno()}", password="")  # never asks a terminal


def bearer(token: bytes) -> bytes:
    """Give the token without the white space around it; raises ``ValueError`` for what would not stay in its header."""
    if _BEARER.fullmatch(token := token.strip()) is None:
        raise ValueError("not a token")
    return token


def read_file(path: Path, most: int = MAX_FILE) -> bytes:
    """Read a small file; raises ``OSError``, and ``ValueError`` for one of more than ``most`` bytes."""
    with path.open("rb") as secret:
        content = secret.read(most + 1)
    if len(content) > most:
        raise ValueError("the file is too long")
    return content


def _client() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context
