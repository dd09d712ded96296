"""A certificate authority for the development issuer: its key lives in a 0700 directory and vouches for loopback only."""

import ipaddress
import os
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from broker.errors import Misconfigured

CA_LIFE = timedelta(days=365)
LEAF_LIFE = timedelta(days=7)
BACKDATE = timedelta(minutes=5)
"""Clocks on one machine agree, but a clock may be stepped."""


@dataclass(frozen=True, slots=True)
class Files:
    """Where the authority and its server certificate are (PEM)."""

    directory: Path

    @property
    def ca(self) -> Path:
        """The root that clients trust."""
        return self.directory / "ca.pem"

    @property
    def ca_key(self) -> Path:
        """The root's key, 0600."""
        return self.directory / "ca.key"

    @property
    def leaf(self) -> Path:
        """The server certificate for loopback."""
        return self.directory / "tls.pem"

    @property
    def leaf_key(self) -> Path:
        """Its key, 0600."""
        return self.directory / "tls.key"

    @property
    def signing_key(self) -> Path:
        """The key of the tokens, 0600."""
        return self.directory / "signing.key"


def load_or_make_key(path: Path) -> ec.EllipticCurvePrivateKey:
    """Give the key of a file, made when it is missing; raises Misconfigured for another kind of file."""
    if not path.exists():
        write_private(path, _key_pem(ec.generate_private_key(ec.SECP256R1())))
    try:
        key = load_pem_private_key(path.read_bytes(), None)
    except ValueError:
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise Misconfigured(f"{path} holds no P-256 key", hint="broker dev down --purge starts afresh")
    return key


def prepare(files: Files, now: datetime) -> None:
    """Make the authority, unless it is good for another day, and a new server certificate under it."""
    key = load_or_make_key(files.ca_key)
    ca = _current_ca(files.ca, key, now)
    if ca is None:
        ca = _make_ca(key, now)
        files.ca.write_bytes(ca.public_bytes(Encoding.PEM))
    leaf_key = ec.generate_private_key(ec.SECP256R1())
    leaf = _make_leaf(leaf_key, ca, key, now)
    write_private(files.leaf_key, _key_pem(leaf_key))
    files.leaf.write_bytes(leaf.public_bytes(Encoding.PEM))


def write_private(path: Path, data: bytes) -> None:
    """Write a file that only its owner may read, from its first byte on."""
    temporary = path.with_name(f".{path.name}.new")
    temporary.unlink(missing_ok=True)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
    temporary.replace(path)


def _current_ca(path: Path, key: ec.EllipticCurvePrivateKey, now: datetime) -> x509.Certificate | None:
    try:
        found = x509.load_pem_x509_certificate(path.read_bytes())
    except (OSError, ValueError):
        return None
    lasts = found.not_valid_after_utc - now > LEAF_LIFE
    return found if lasts and found.public_key() == key.public_key() else None


def _make_ca(key: ec.EllipticCurvePrivateKey, now: datetime) -> x509.Certificate:
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "broker dev: never trust this outside this machine")])
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BACKDATE)
        .not_valid_after(now + CA_LIFE)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .add_extension(_loopback_only(), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )


def _make_leaf(
    key: ec.EllipticCurvePrivateKey, ca: x509.Certificate, ca_key: ec.EllipticCurvePrivateKey, now: datetime
) -> x509.Certificate:
    names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.IPv4Address("127.0.0.1")), x509.DNSName("localhost")])
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "broker dev issuer")]))
        .issuer_name(ca.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BACKDATE)
        .not_valid_after(now + LEAF_LIFE)
        .add_extension(names, critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key()), critical=False)
        .sign(ca_key, hashes.SHA256())
    )


def _loopback_only() -> x509.NameConstraints:
    permitted = [x509.IPAddress(ipaddress.IPv4Network("127.0.0.0/8")), x509.DNSName("localhost")]
    return x509.NameConstraints(permitted_subtrees=permitted, excluded_subtrees=None)


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
