"""Certificates that an operator put into files for node attestors: of authorities, of a node, of a TPM's own key."""

from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from broker.attestation.contract import AttestorFailed
from broker.errors import InvalidSvid, Misconfigured
from broker.spiffe import certificates

MAX_FILE: Final = 1 << 20  # bytes of a file of certificates: a thousand authorities
MAX_FILES: Final = 4096  # in a directory: all makers together have some hundred
_PEM: Final = b"-----BEGIN CERTIFICATE-----"


def read_authorities(path: Path) -> list[x509.Certificate]:
    """Read the makers' authorities from a directory of PEM and DER files, or one; raises Misconfigured where there is none."""
    found = [certificate for file in _files(path) for certificate in authorities_of(file)]
    if not found:
        raise Misconfigured(f"ca_path {path} holds no certificate", hint="put the makers' authorities there")
    return found


def _files(path: Path) -> list[Path]:
    try:
        if not path.is_dir():
            return [path]
        # Names with a dot, and directories, are what mounted volumes and editors leave there.
        files = sorted(one for one in path.iterdir() if not one.name.startswith(".") and one.is_file())
    except OSError as error:
        raise Misconfigured(f"{path} cannot be read: {error.strerror}") from None
    if len(files) > MAX_FILES:
        raise Misconfigured(f"ca_path {path} holds more than {MAX_FILES} files")
    return files


def authorities_of(file: Path) -> list[x509.Certificate]:
    """Read authorities from one file, PEM or DER; raises Misconfigured for anything else in it."""
    try:
        content = content_of(file)
        pem = _PEM in content
        found = x509.load_pem_x509_certificates(content) if pem else [x509.load_der_x509_certificate(content)]
        for certificate in found:
            certificates.read_authority(certificate, anchor=True)
    except OSError as error:
        raise Misconfigured(f"{file} cannot be read: {error.strerror}") from None
    except (ValueError, x509.InvalidVersion, InvalidSvid) as error:
        raise Misconfigured(f"{file} holds something else than certificates of authorities: {error}") from None
    return found


def read_certificate(path: Path) -> bytes:
    """Read one endorsement key's certificate, PEM or DER, giving DER; raises AttestorFailed."""
    try:
        content = content_of(path)
        if _PEM not in content:
            return content
        (certificate,) = x509.load_pem_x509_certificates(content)
        return certificate.public_bytes(Encoding.DER)
    except OSError as error:
        raise AttestorFailed(f"{path} cannot be read: {error.strerror}", code="ek_certificate_malformed") from None
    except (ValueError, x509.InvalidVersion):
        raise AttestorFailed(f"{path} does not hold one certificate", code="ek_certificate_malformed") from None


def content_of(path: Path) -> bytes:
    """Read a file of certificates, or a key; raises OSError, and ValueError where it is too long."""
    with path.open("rb") as file:
        content = file.read(MAX_FILE + 1)
    if len(content) > MAX_FILE:
        raise ValueError(f"it is larger than {MAX_FILE} bytes")
    return content
