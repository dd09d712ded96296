"""Bundle endpoints that answer what a test says: real sockets, real TLS, any answer. And an authority of the web."""

import asyncio
import datetime as dt
import ipaddress
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from broker.transport.tls import TlsIdentity, public_context

HOUR = dt.timedelta(hours=1)
Answer = Callable[[str], bytes | Awaitable[bytes]]


class WebAuthority:
    """A CA whose certificates bear DNS names and addresses, as on the web."""

    def __init__(self) -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "web CA")])
        self.certificate = self._sign(
            self.name,
            self.key,
            x509.BasicConstraints(ca=True, path_length=None),
            x509.SubjectKeyIdentifier.from_public_key(self.key.public_key()),
        )

    def write(self, path: Path) -> Path:
        path.write_bytes(self.certificate.public_bytes(Encoding.PEM))
        return path

    def issue(self, *hosts: str) -> TlsIdentity:
        key = ec.generate_private_key(ec.SECP256R1())
        leaf = self._sign(
            x509.Name([]),
            key,
            x509.BasicConstraints(ca=False, path_length=None),
            x509.SubjectAlternativeName([_name(host) for host in hosts]),
            x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]),
            x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()),
        )
        return TlsIdentity((leaf.public_bytes(Encoding.DER),), key)

    def files(self, directory: Path, *hosts: str) -> tuple[Path, Path]:
        """A certificate and its key as PEM files, as an operator has them."""
        identity = self.issue(*hosts)
        certificate, key = directory / "cert.pem", directory / "key.pem"
        certificate.write_bytes(x509.load_der_x509_certificate(identity.chain_der[0]).public_bytes(Encoding.PEM))
        key.write_bytes(identity.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        return certificate, key

    def _sign(
        self, subject: x509.Name, key: ec.EllipticCurvePrivateKey, *extensions: x509.ExtensionType
    ) -> x509.Certificate:
        now = dt.datetime.now(dt.UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self.name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - HOUR)
            .not_valid_after(now + HOUR)
        )
        for extension in extensions:
            builder = builder.add_extension(extension, critical=isinstance(extension, x509.BasicConstraints))
        return builder.sign(self.key, hashes.SHA256())


def _name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


class Endpoint:
    """One port; ``answers`` is asked for each request's first line and gives the whole response."""

    def __init__(self, port: int, seen: list[str]) -> None:
        self.port = port
        self.seen = seen

    def url(self, host: str = "127.0.0.1", path: str = "/") -> str:
        return f"https://{host}:{self.port}{path}"


@asynccontextmanager
async def endpoint(
    identity: TlsIdentity, answer: Answer, *, context: ssl.SSLContext | None = None
) -> AsyncIterator[Endpoint]:
    seen: list[str] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            line = head.split(b"\r\n", 1)[0].decode()
            seen.append(line)
            made = answer(line)
            writer.write(made if isinstance(made, bytes) else await made)
            await writer.drain()
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            writer.transport.abort()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context or public_context(identity))
    try:
        yield Endpoint(server.sockets[0].getsockname()[1], seen)
    finally:
        server.close()
        await server.wait_closed()


def ok(body: bytes | str, *headers: str) -> bytes:
    content = body.encode() if isinstance(body, str) else body
    lines = ["HTTP/1.1 200 OK", "content-type: application/json", f"content-length: {len(content)}", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + content


def redirect(location: str, status: int = 302) -> bytes:
    return f"HTTP/1.1 {status} Found\r\nlocation: {location}\r\ncontent-length: 0\r\n\r\n".encode()
