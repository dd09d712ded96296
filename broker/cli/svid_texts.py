"""SVIDs and bundles as the texts that files and people get: PEM, and the members of an answer."""

from collections.abc import Sequence
from typing import Any

from broker.cli.output import moment


def pem(der: bytes) -> str:
    """Write certificates, concatenated DER, as PEM."""
    from broker.spiffe.x509svid import split_der  # noqa: PLC0415 - slow to import

    return pem_of(split_der(der))


def pem_of(chain: Sequence[bytes]) -> str:
    """Write certificates, each DER, as PEM."""
    from cryptography import x509  # noqa: PLC0415 - slow to import
    from cryptography.hazmat.primitives.serialization import Encoding  # noqa: PLC0415

    loaded = [x509.load_der_x509_certificate(one) for one in chain]
    return "".join(one.public_bytes(Encoding.PEM).decode() for one in loaded)


def key_pem(key: Any) -> bytes:
    """Write a private key as PKCS #8, PEM."""
    from cryptography.hazmat.primitives.serialization import (  # noqa: PLC0415 - slow to import
        Encoding,
        NoEncryption,
        PrivateFormat,
    )

    written: bytes = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return written


def x509_row(spiffe_id: str, chain: Sequence[bytes], bundle: str, hint: str = "") -> dict[str, Any]:
    """Give what is shown of an X.509-SVID: never its key. ``bundle`` is PEM."""
    import hashlib  # noqa: PLC0415

    from cryptography import x509  # noqa: PLC0415 - slow to import

    from broker.spiffe.jose import b64url_encode  # noqa: PLC0415

    leaf = x509.load_der_x509_certificate(chain[0])
    try:
        names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        dns_names = names.get_values_for_type(x509.DNSName)
    except x509.ExtensionNotFound:
        dns_names = []
    return {
        "spiffe_id": spiffe_id,
        "not_before": leaf.not_valid_before_utc,
        "not_after": leaf.not_valid_after_utc,
        "serial_number": f"{leaf.serial_number:x}",
        "x5t_s256": b64url_encode(hashlib.sha256(chain[0]).digest()),
        "dns_names": dns_names,
        "hint": hint,
        "certificates": pem_of(chain),
        "bundle": bundle,
        "files": [],
    }


def expiry_of(token: str) -> int:
    """Give the ``exp`` of a JWT-SVID; raises InvalidJson or InvalidToken."""
    from broker.spiffe.jose import numeric_date, parse_compact  # noqa: PLC0415 - imports cryptography

    return int(numeric_date(parse_compact(token).payload, "exp", required=True))


def jwt_row(spiffe_id: str, token: str, hint: str = "") -> dict[str, Any]:
    """Give what is shown of a JWT-SVID: all of it."""
    return {"spiffe_id": spiffe_id, "expires_at": moment(expiry_of(token)), "hint": hint, "svid": token}
