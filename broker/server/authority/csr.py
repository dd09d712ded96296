"""Certificate requests: the one thing taken from them is a public key, proven to be held by the sender.

Its words are SPIRE's. Subject, names and every other wish in a request are ignored: who the certificate is for was decided before
(CVE-2021-27098 was a server that read them). An operator who mints decides by the request itself.
"""

from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from broker.errors import Invalid, InvalidSpiffeId
from broker.server.authority.profile import PublicKey
from broker.spiffe import SpiffeId

MAX_REQUEST: Final = 8192
"""Largest request, in bytes: an RSA-4096 one with a few names has under 2,000."""
MIN_RSA_BITS: Final = 2048
MAX_RSA_BITS: Final = 4096
"""Checking the signature of a larger key costs more than signing ten certificates."""

_CURVES: Final = (ec.SECP256R1, ec.SECP384R1)
_HASHES: Final = (hashes.SHA256, hashes.SHA384, hashes.SHA512)


@dataclass(frozen=True, slots=True)
class Wishes:
    """What a request asks for beside its key."""

    spiffe_id: SpiffeId
    dns_names: tuple[str, ...]
    subject: x509.Name


def requested_key(
    csr_der: bytes, *, malformed: str = "malformed CSR", unproven: str = "invalid CSR signature"
) -> PublicKey:
    """Give the public key of a PKCS#10 request whose own signature holds (RFC 2986); raises Invalid.

    ``malformed`` and ``unproven``: what SPIRE's method calls a request that cannot be read, and one that its key did not sign.
    """
    _check_size(csr_der, malformed)
    try:
        csr = x509.load_der_x509_csr(csr_der)
        key = csr.public_key()
        digest = csr.signature_hash_algorithm
    except (ValueError, UnsupportedAlgorithm, TypeError):
        raise Invalid(malformed, code="csr_malformed") from None
    checked = _strong(key)
    if not isinstance(digest, _HASHES):
        raise Invalid("the certificate request is signed with a weak digest", code="csr_weak", hint="use SHA-256")
    if not _is_held(csr, checked, digest):
        raise Invalid(unproven, code="csr_signature")
    return checked


def _check_size(csr_der: bytes, malformed: str) -> None:
    if not csr_der or len(csr_der) > MAX_REQUEST:
        raise Invalid(f"{malformed}: it has 1 to {MAX_REQUEST} bytes", code="csr_size")


def _is_held(csr: x509.CertificateSigningRequest, key: PublicKey, digest: hashes.HashAlgorithm) -> bool:
    if not isinstance(key, ec.EllipticCurvePublicKey):
        with suppress(InvalidSignature, ValueError):
            return csr.is_signature_valid
        return False
    try:
        # As csr.is_signature_valid does, but without reading the key a second time.
        key.verify(csr.signature, csr.tbs_certrequest_bytes, ec.ECDSA(digest))
    except (InvalidSignature, ValueError):
        return False
    return True


def _strong(key: object) -> PublicKey:
    if isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, _CURVES):
        return key
    if isinstance(key, rsa.RSAPublicKey) and MIN_RSA_BITS <= key.key_size <= MAX_RSA_BITS:
        return key
    raise Invalid(
        "the key of the certificate request is not accepted",
        code="csr_key",
        hint=f"use a P-256 or P-384 key, or RSA of {MIN_RSA_BITS} to {MAX_RSA_BITS} bits",
    )


def requested_names(csr_der: bytes) -> Wishes:
    """Give the names that a request asks for: for operators who mint, nobody else. Raises Invalid."""
    _check_size(csr_der, "malformed CSR")
    try:
        csr = x509.load_der_x509_csr(csr_der)
        subject = csr.subject
        found = [one.value for one in csr.extensions if isinstance(one.value, x509.SubjectAlternativeName)]
    except (ValueError, UnsupportedAlgorithm, TypeError, x509.DuplicateExtension):
        raise Invalid("malformed CSR", code="csr_malformed") from None
    names = found[0] if found else x509.SubjectAlternativeName([])
    uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    if not uris:
        raise Invalid("CSR URI SAN is required", code="csr_names", hint="put one SPIFFE ID into its SAN")
    if len(uris) > 1:
        raise Invalid("only one URI SAN is expected", code="csr_names")
    try:
        return Wishes(SpiffeId(uris[0]), tuple(names.get_values_for_type(x509.DNSName)), subject)
    except InvalidSpiffeId as error:
        raise Invalid(f"CSR URI SAN is invalid: {error.message}", code=error.reason, hint=error.hint) from None
