"""One certificate at a time: read it strictly, and say whether it may sign others (RFC 5280 §4).

Knows what a certificate says of itself. Whether anybody vouches for it is the business of chains; which SPIFFE ID it
carries, that of x509svid.
"""

from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Final

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, ExtensionOID, SignatureAlgorithmOID

from broker.errors import InvalidSpiffeId, InvalidSvid
from broker.spiffe.ids import SCHEME, SpiffeId

MAX_CERTIFICATE: Final = 32 * 1024
"""Largest certificate, in bytes of DER: an SVID has about 600; thousands of names are an attack."""
MIN_RSA_BITS: Final = 2048
MAX_RSA_BITS: Final = 8192
"""Checking a larger key's signature is a denial of service."""
MAX_SERIAL_BITS: Final = 159
"""Twenty octets, positive (RFC 5280 §4.1.2.2)."""
_REMEMBERED: Final = 256
"""Authorities whose reading is remembered: every handshake of a trust domain brings the same few."""

# The DER of the OID prime-field, which stands only in a curve that is spelled out. The library reads such a curve where
# it equals a named one; RFC 5480 §2.1.1 allows names alone.
_SPELLED_OUT: Final = bytes.fromhex("06072a8648ce3d0101")
_CURVES: Final = (ec.SECP256R1, ec.SECP384R1, ec.SECP521R1)
_HASHES: Final = (hashes.SHA256, hashes.SHA384, hashes.SHA512)
# Certificate policies need no more than being known while nothing requires one (RFC 5280 §6.1.1, explicit policy off).
_UNDERSTOOD: Final = frozenset(
    {
        ExtensionOID.BASIC_CONSTRAINTS,
        ExtensionOID.KEY_USAGE,
        ExtensionOID.EXTENDED_KEY_USAGE,
        ExtensionOID.SUBJECT_ALTERNATIVE_NAME,
        ExtensionOID.NAME_CONSTRAINTS,
        ExtensionOID.CERTIFICATE_POLICIES,
    }
)
# What the library raises for malformed content. Where warnings are errors, its warnings arrive here too.
_MALFORMED: Final = (
    ValueError,
    TypeError,
    KeyError,
    UnsupportedAlgorithm,
    Warning,
    x509.DuplicateExtension,
    x509.InvalidVersion,
    x509.UnsupportedGeneralNameType,
)
_BOTH_ROLES: Final = frozenset({ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH})


@dataclass(frozen=True, slots=True)
class Facts:
    """What a certificate says of itself, read once. Nobody has vouched for it yet."""

    certificate: x509.Certificate
    not_before: datetime
    not_after: datetime
    is_ca: bool
    path_length: int | None
    basic_critical: bool
    key_usage: x509.KeyUsage | None
    key_usage_critical: bool
    purposes: frozenset[x509.ObjectIdentifier] | None
    names: tuple[x509.GeneralName, ...]
    names_critical: bool
    constraints: x509.NameConstraints | None
    key_id: bytes | None
    issuer_key_id: bytes | None

    def uris(self) -> list[str]:
        """Give the URI names, in the certificate's order."""
        return [name.value for name in self.names if isinstance(name, x509.UniformResourceIdentifier)]

    def subject(self) -> x509.Name:
        """Give the subject's name; raises InvalidSvid."""
        try:
            return self.certificate.subject
        except _MALFORMED:
            raise InvalidSvid("a certificate's name is malformed", code="svid_malformed") from None

    def check_time(self, now: datetime) -> None:
        """Refuse outside of the validity, both ends included (RFC 5280 §4.1.2.5)."""
        who = "an authority of the chain" if self.is_ca else "the certificate"
        if now < self.not_before:
            raise InvalidSvid(f"{who} is not valid yet", code="svid_not_yet_valid", hint="compare the clocks")
        if now > self.not_after:
            raise InvalidSvid(f"{who} has expired", code="svid_expired", hint="renew it, or compare the clocks")


@dataclass(frozen=True, slots=True)
class Authority:
    """A certificate that may sign others, if somebody vouches for it."""

    facts: Facts
    self_issued: bool


def load(der: bytes) -> x509.Certificate:
    """Parse one DER certificate with nothing after it; raises InvalidSvid."""
    if len(der) > MAX_CERTIFICATE:
        raise InvalidSvid(f"a certificate is larger than {MAX_CERTIFICATE} bytes", code="svid_too_large")
    if _SPELLED_OUT in der:
        raise InvalidSvid("a certificate's key has an unnamed curve", code="svid_weak_key")
    try:
        return x509.load_der_x509_certificate(der)
    except _MALFORMED:
        raise InvalidSvid("a certificate is not valid DER", code="svid_malformed") from None


def split_der(blob: bytes) -> list[bytes]:
    """Cut concatenated DER certificates by their lengths, with nothing left over; raises InvalidSvid (X.690 §8.1)."""
    pieces = []
    rest = memoryview(blob)
    while rest:
        size = _der_size(rest)
        pieces.append(bytes(rest[:size]))
        rest = rest[size:]
    return pieces


def read(certificate: x509.Certificate) -> Facts:
    """Read what path validation asks of any certificate but an anchor; raises InvalidSvid for what may not stand in a chain."""
    facts = _read(certificate)
    if not 0 < certificate.serial_number < 1 << MAX_SERIAL_BITS:
        raise InvalidSvid("a certificate's serial number is out of range", code="svid_malformed")
    digest = certificate.signature_hash_algorithm
    if not isinstance(digest, _HASHES) and certificate.signature_algorithm_oid != SignatureAlgorithmOID.ED25519:
        raise InvalidSvid("a certificate's signature algorithm is not accepted", code="svid_weak_signature")
    return facts


@lru_cache(maxsize=_REMEMBERED)
def read_authority(certificate: x509.Certificate, *, anchor: bool = False) -> Authority:
    """Read a certificate that signs others: cA, keyCertSign and the rest (RFC 5280 §4.2.1, X509-SVID §4); raises InvalidSvid."""
    # An anchor is trusted as it is: nobody checks its signature on itself, and old roots bear the serial number 0.
    facts = _read(certificate) if anchor else read(certificate)
    if not (facts.is_ca and facts.basic_critical):
        raise InvalidSvid("an issuing certificate is not marked as an authority", code="svid_issuer_not_ca")
    # A trust anchor may leave key usage out, since it is trusted for what it is (RFC 5280 §6.1.1); no other may.
    if not (facts.key_usage.key_cert_sign if facts.key_usage else anchor):
        raise InvalidSvid("an issuing certificate may not sign certificates", code="svid_issuer_key_usage")
    if not anchor and facts.purposes is not None and not _serves_both(facts.purposes):
        raise InvalidSvid("an issuing certificate is for other purposes", code="svid_issuer_key_usage")
    subject = facts.subject()
    if not subject.rdns:
        raise InvalidSvid("an issuing certificate has no name", code="svid_malformed")
    _check_own_id(facts)
    return Authority(facts, self_issued=subject == certificate.issuer)


def check_leaf_usage(facts: Facts) -> None:
    """Refuse a leaf that may sign, or may not authenticate both ways (X509-SVID §4, §5.2); raises InvalidSvid."""
    if facts.is_ca:
        raise InvalidSvid("the leaf certificate is an authority", code="svid_leaf_is_ca")
    if facts.constraints is not None:
        raise InvalidSvid("the leaf certificate holds name constraints", code="svid_leaf_is_ca")
    if not facts.names_critical and not facts.subject().rdns:
        # RFC 5280 §4.1.2.6: without a subject, the alternative name is the only one.
        raise InvalidSvid("the leaf certificate has no subject, and its names are not critical", code="svid_san")
    usage = facts.key_usage
    if usage is None or not facts.key_usage_critical:
        raise InvalidSvid("the leaf certificate has no critical key usage", code="svid_key_usage")
    if usage.key_cert_sign or usage.crl_sign:
        raise InvalidSvid("the leaf certificate may sign certificates or CRLs", code="svid_key_usage")
    if not usage.digital_signature:
        raise InvalidSvid("the leaf certificate may not be used for signatures", code="svid_key_usage")
    if facts.purposes is not None and not facts.purposes >= _BOTH_ROLES:
        raise InvalidSvid("the leaf certificate is not for both servers and clients", code="svid_extended_key_usage")


def _der_size(data: memoryview) -> int:
    # A certificate is a SEQUENCE of definite length, written in the fewest bytes.
    if len(data) < 2 or data[0] != 0x30:
        raise InvalidSvid("it does not start with a DER certificate", code="svid_malformed")
    first = data[1]
    width = first & 0x7F if first & 0x80 else 0
    if first == 0x80 or width > 3 or len(data) < 2 + width:
        raise InvalidSvid("a DER length is not valid", code="svid_malformed")
    length = int.from_bytes(data[2 : 2 + width]) if width else first
    if width and (length < 0x80 or length >> (8 * (width - 1)) == 0):
        raise InvalidSvid("a DER length is not in its shortest form", code="svid_malformed")
    if length > MAX_CERTIFICATE or 2 + width + length > len(data):
        raise InvalidSvid("a DER certificate is cut off or too large", code="svid_malformed")
    return 2 + width + length


def _read(certificate: x509.Certificate) -> Facts:
    try:
        extensions = {extension.oid: extension for extension in certificate.extensions}
        version = certificate.version
        strong = _strong_key(certificate)
        # Asked for here, where they may fail: an unknown algorithm raises, an odd number warns.
        _ = certificate.signature_hash_algorithm, certificate.serial_number
    except _MALFORMED:
        raise InvalidSvid("a certificate is malformed or of an unknown kind", code="svid_malformed") from None
    if version is not x509.Version.v3:
        raise InvalidSvid("a certificate is not of version 3", code="svid_malformed")
    if not strong:
        raise InvalidSvid("a certificate's key is weak or of an unknown kind", code="svid_weak_key")
    _check_critical(extensions)
    return _facts(certificate, extensions)


def _strong_key(certificate: x509.Certificate) -> bool:
    key = certificate.public_key()
    if isinstance(key, ec.EllipticCurvePublicKey):
        return isinstance(key.curve, _CURVES)
    if isinstance(key, rsa.RSAPublicKey):
        return MIN_RSA_BITS <= key.key_size <= MAX_RSA_BITS and key.key_size % 8 == 0
    return isinstance(key, ed25519.Ed25519PublicKey)


def _check_critical(extensions: dict[x509.ObjectIdentifier, x509.Extension[x509.ExtensionType]]) -> None:
    # Policy constraints would make policies matter, which are not processed here: refuse rather than ignore.
    if ExtensionOID.POLICY_CONSTRAINTS in extensions:
        raise InvalidSvid("a certificate holds policy constraints", code="svid_critical_extension")
    constraints = extensions.get(ExtensionOID.NAME_CONSTRAINTS)
    if constraints is not None and not constraints.critical:
        raise InvalidSvid("a certificate's name constraints are not critical", code="svid_name_constraints")
    if any(extension.critical and oid not in _UNDERSTOOD for oid, extension in extensions.items()):
        raise InvalidSvid("a certificate holds an unknown critical extension", code="svid_critical_extension")


def _facts(
    certificate: x509.Certificate, extensions: dict[x509.ObjectIdentifier, x509.Extension[x509.ExtensionType]]
) -> Facts:
    def value(oid: x509.ObjectIdentifier) -> x509.ExtensionType | None:
        extension = extensions.get(oid)
        return None if extension is None else extension.value

    def critical(oid: x509.ObjectIdentifier) -> bool:
        return oid in extensions and extensions[oid].critical

    basic, usage = value(ExtensionOID.BASIC_CONSTRAINTS), value(ExtensionOID.KEY_USAGE)
    purposes, names = value(ExtensionOID.EXTENDED_KEY_USAGE), value(ExtensionOID.SUBJECT_ALTERNATIVE_NAME)
    constraints = value(ExtensionOID.NAME_CONSTRAINTS)
    own, issuers = value(ExtensionOID.SUBJECT_KEY_IDENTIFIER), value(ExtensionOID.AUTHORITY_KEY_IDENTIFIER)
    return Facts(
        certificate=certificate,
        not_before=certificate.not_valid_before_utc,
        not_after=certificate.not_valid_after_utc,
        is_ca=isinstance(basic, x509.BasicConstraints) and basic.ca,
        path_length=basic.path_length if isinstance(basic, x509.BasicConstraints) else None,
        basic_critical=critical(ExtensionOID.BASIC_CONSTRAINTS),
        key_usage=usage if isinstance(usage, x509.KeyUsage) else None,
        key_usage_critical=critical(ExtensionOID.KEY_USAGE),
        purposes=frozenset(purposes) if isinstance(purposes, x509.ExtendedKeyUsage) else None,
        names=tuple(names) if isinstance(names, x509.SubjectAlternativeName) else (),
        names_critical=critical(ExtensionOID.SUBJECT_ALTERNATIVE_NAME),
        constraints=constraints if isinstance(constraints, x509.NameConstraints) else None,
        key_id=own.digest if isinstance(own, x509.SubjectKeyIdentifier) else None,
        issuer_key_id=issuers.key_identifier if isinstance(issuers, x509.AuthorityKeyIdentifier) else None,
    )


def _serves_both(purposes: frozenset[x509.ObjectIdentifier]) -> bool:
    return purposes >= _BOTH_ROLES or ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE in purposes


def _check_own_id(facts: Facts) -> None:
    # X509-SVID §3: an authority may be an SVID itself, but then of the trust domain as a whole.
    for uri in facts.uris():
        if uri.startswith(SCHEME):
            try:
                path = SpiffeId(uri).path
            except InvalidSpiffeId as error:
                raise InvalidSvid(f"an authority's SPIFFE ID: {error.message}", code="svid_issuer_id") from None
            if path:
                raise InvalidSvid("an authority's SPIFFE ID has a path", code="svid_issuer_id")
