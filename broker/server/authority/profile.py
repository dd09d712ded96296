"""What every certificate of ours says: the profiles of authorities, agents, workloads and the server itself.

Pure: keys, serial numbers and ``now`` come in as arguments. A profile decides all of a certificate but its key and its
identity, so that nothing a request says can widen it (X509-SVID §4, RFC 5280 §4.2).
"""

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from broker.errors import Invalid, Refused, Unavailable
from broker.spiffe import SpiffeId, TrustDomain

BACKDATE: Final = timedelta(seconds=30)
"""A certificate starts this long before it is signed: a verifier's clock may be behind ours."""
SERIAL_BITS: Final = 128
"""Random bits of a serial number; at most 159 fit into its 20 octets (RFC 5280 §4.1.2.2)."""
MAX_COMMON_NAME: Final = 64
"""``ub-common-name`` (RFC 5280, appendix A.1)."""
NESTING: Final = 4
"""Authorities that may stand below one of ours: with leaf and root that is still within what verifiers take in a chain."""

PublicKey = ec.EllipticCurvePublicKey | rsa.RSAPublicKey

_NO_USAGE: Final = {
    "digital_signature": False,
    "content_commitment": False,
    "key_encipherment": False,
    "data_encipherment": False,
    "key_agreement": False,
    "key_cert_sign": False,
    "crl_sign": False,
    "encipher_only": False,
    "decipher_only": False,
}


def _extension(value: x509.ExtensionType, *, critical: bool) -> x509.Extension[x509.ExtensionType]:
    return x509.Extension(value.oid, critical, value)


# X5-12, X5-14: digitalSignature and nothing else; ECDSA in TLS 1.3 needs no other.
_LEAF_USAGE: Final = _extension(x509.KeyUsage(**(_NO_USAGE | {"digital_signature": True})), critical=True)
# X5-13.
_CA_USAGE: Final = _extension(x509.KeyUsage(**(_NO_USAGE | {"key_cert_sign": True, "crl_sign": True})), critical=True)
# X5-16: both or none. Every SVID is used at both ends of mTLS.
_LEAF_EXTENDED_USAGE: Final = _extension(
    x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]), critical=False
)
_LEAF_CONSTRAINTS: Final = _extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
LEAF_EXTENSIONS: Final = (_LEAF_USAGE, _LEAF_EXTENDED_USAGE, _LEAF_CONSTRAINTS)
"""What every leaf says, whoever it is for and whoever signs it."""
_EMPTY: Final = x509.Name([])


@dataclass(frozen=True, slots=True)
class Validity:
    """From when to when; both ends count."""

    not_before: datetime
    not_after: datetime


@dataclass(frozen=True, slots=True)
class Issuer:
    """What a certificate says of the authority that signs it, computed once per authority.

    ``validity`` ends with the first certificate of its chain to end. ``path_length`` None: without limit.
    """

    name: x509.Name
    key_identifier: x509.Extension[x509.ExtensionType]
    validity: Validity
    trust_domain: TrustDomain | None = None
    path_length: int | None = None

    @classmethod
    def of(cls, authority: x509.Certificate, above: Sequence[x509.Certificate] = ()) -> "Issuer":
        """Read an authority's certificate, and the life of those above it."""
        ski = authority.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
        aki = x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(ski)
        life = Validity(
            max(one.not_valid_before_utc for one in (authority, *above)),
            min(one.not_valid_after_utc for one in (authority, *above)),
        )
        length = authority.extensions.get_extension_for_class(x509.BasicConstraints).value.path_length
        return cls(authority.subject, _extension(aki, critical=False), life, _trust_domain(authority), length)


@dataclass(frozen=True, slots=True)
class Leaf:
    """What differs from one leaf to the next; the rest is the profile's."""

    spiffe_id: SpiffeId
    serial: int
    validity: Validity
    dns_names: Sequence[str] = ()
    ip_addresses: Sequence[ipaddress.IPv4Address | ipaddress.IPv6Address] = ()
    subject: x509.Name = _EMPTY


def key_identifier(key: ec.EllipticCurvePublicKey | rsa.RSAPublicKey) -> str:
    """Name a key by its identifier in hex (RFC 5280 §4.2.1.2, method 1): what SPIRE calls an X.509 authority by."""
    return x509.SubjectKeyIdentifier.from_public_key(key).digest.hex()


def subject_key_id(certificate: x509.Certificate) -> str:
    """Give a certificate's key identifier in hex, as it says or as its key has it."""
    try:
        return certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value.digest.hex()
    except x509.ExtensionNotFound:
        key = certificate.public_key()
        assert isinstance(key, ec.EllipticCurvePublicKey | rsa.RSAPublicKey)
        return key_identifier(key)


def issuer_key_id(certificate: x509.Certificate) -> str:
    """Give the key identifier of a certificate's issuer in hex; empty when it does not say."""
    try:
        found = certificate.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier).value.key_identifier
    except x509.ExtensionNotFound:
        return ""
    return found.hex() if found else ""


def serial_number(random_bits: int) -> int:
    """Make a serial number of 128 random bits: positive, as RFC 5280 §4.1.2.2 demands."""
    return random_bits or 1


def whole_seconds(moment: datetime) -> datetime:
    """Cut the fraction that a certificate cannot carry."""
    return moment.replace(microsecond=0)


def authority_validity(now: datetime, ttl: timedelta) -> Validity:
    """Give a new authority its life."""
    start = whole_seconds(now)
    return Validity(start - BACKDATE, start + ttl)


def leaf_validity(now: datetime, ttl: timedelta, authority: Validity) -> Validity:
    """Give a leaf its life, never longer than its authority's; raises Unavailable once that has ended."""
    start = whole_seconds(now)
    end = min(start + ttl, authority.not_after)
    if end <= start:
        raise Unavailable(
            "the signing authority has ended",
            code="authority_ended",
            hint="the server is rotating its authority; try again in a few seconds",
        )
    return Validity(max(start - BACKDATE, authority.not_before), end)


def life_of(certificate_der: bytes) -> Validity:
    """Read a certificate's life."""
    certificate = x509.load_der_x509_certificate(certificate_der)
    return Validity(certificate.not_valid_before_utc, certificate.not_valid_after_utc)


def authority_certificate(
    trust_domain: TrustDomain, key: ec.EllipticCurvePublicKey, serial: int, validity: Validity, *, path_length: int
) -> x509.CertificateBuilder:
    """Describe a self-signed authority: its SPIFFE ID is the trust domain's (X5-06, X5-07, X5-09, X5-13)."""
    name = _authority_name(trust_domain, serial)
    extensions = _authority_extensions(trust_domain, key, path_length)
    return _build((name, name), key, serial, validity, extensions)


def intermediate_certificate(
    trust_domain: TrustDomain, key: PublicKey, serial: int, validity: Validity, issuer: Issuer, *, unit: str = ""
) -> x509.CertificateBuilder:
    """Describe an authority below another: one path length less, never longer-lived; raises Refused where none may be.

    ``unit``: an organizational unit for its name, as SPIRE gives downstream authorities.
    """
    if issuer.path_length == 0:
        raise Refused(
            "the authority allows no other below it",
            code="path_length",
            hint="prepare and activate a new one, or have the upstream authority's path length raised",
        )
    length = NESTING if issuer.path_length is None else min(issuer.path_length, NESTING + 1) - 1
    name = _authority_name(trust_domain, serial, unit)
    extensions = [*_authority_extensions(trust_domain, key, length), issuer.key_identifier]
    return _build((name, issuer.name), key, serial, validity, extensions)


def _authority_name(trust_domain: TrustDomain, serial: int, unit: str = "") -> x509.Name:
    # The serial number in the name keeps the names of two authorities apart: a verifier that looks issuers up by name
    # would otherwise have to try each.
    units = [x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, unit)] if unit else []
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "SPIFFE"),
            *units,
            x509.NameAttribute(NameOID.COMMON_NAME, trust_domain.name[:MAX_COMMON_NAME]),
            x509.NameAttribute(NameOID.SERIAL_NUMBER, f"{serial:032x}"),
        ]
    )


def _authority_extensions(
    trust_domain: TrustDomain, key: PublicKey, path_length: int
) -> list[x509.Extension[x509.ExtensionType]]:
    return [
        _extension(x509.BasicConstraints(ca=True, path_length=path_length), critical=True),
        _CA_USAGE,
        _extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False),
        _extension(x509.SubjectAlternativeName([x509.UniformResourceIdentifier(str(trust_domain.id))]), critical=False),
    ]


def _trust_domain(authority: x509.Certificate) -> TrustDomain | None:
    try:
        names = authority.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        return SpiffeId(names.get_values_for_type(x509.UniformResourceIdentifier)[0]).trust_domain
    except (x509.ExtensionNotFound, IndexError, Invalid):
        return None


def leaf_subject(leaf: Leaf) -> x509.Name:
    """Name the leaf by its first DNS name, as SPIRE does: PostgreSQL and others read that and nothing else."""
    if not leaf.dns_names or len(leaf.dns_names[0]) > MAX_COMMON_NAME:
        return leaf.subject
    others = [attribute for attribute in leaf.subject if attribute.oid != NameOID.COMMON_NAME]
    return x509.Name([*others, x509.NameAttribute(NameOID.COMMON_NAME, leaf.dns_names[0])])


def leaf_certificate(leaf: Leaf, key: PublicKey, issuer: Issuer) -> x509.CertificateBuilder:
    """Describe an SVID that ends a chain: one URI SAN, both extended usages, no authority (X5-01 to X5-16)."""
    subject = leaf_subject(leaf)
    names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(str(leaf.spiffe_id))]
    names += [x509.DNSName(name) for name in leaf.dns_names]
    names += [x509.IPAddress(address) for address in leaf.ip_addresses]
    extensions = [
        *LEAF_EXTENSIONS,
        _extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False),
        issuer.key_identifier,
        # X5-04: without a subject the alternative name is all there is, and must be understood.
        _extension(x509.SubjectAlternativeName(names), critical=len(subject) == 0),
    ]
    return _build((subject, issuer.name), key, leaf.serial, leaf.validity, extensions)


def _build(
    names: tuple[x509.Name, x509.Name],
    key: PublicKey,
    serial: int,
    validity: Validity,
    extensions: Sequence[x509.Extension[x509.ExtensionType]],
) -> x509.CertificateBuilder:
    subject, issuer = names
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(serial)
        .not_valid_before(validity.not_before)
        .not_valid_after(validity.not_after)
    )
    for extension in extensions:
        builder = builder.add_extension(extension.value, extension.critical)
    return builder
