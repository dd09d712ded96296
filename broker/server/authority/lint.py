"""The last look before a signature counts: what breaks our profile is not signed (X509-SVID §2-4, RFC 5280 §4).

Pure. Three looks at three costs: each leaf is judged as the value that it is made from; what all leaves of an authority
have in common is judged once, as DER; each authority is judged as the certificate that it has become. Rules carry the
numbers of the SPIFFE checklist.
"""

import re
from typing import Final, TypeVar

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, ExtensionOID

from broker.errors import Invalid
from broker.server.authority import leaf_der
from broker.server.authority.leaf_der import LeafForm
from broker.server.authority.profile import Issuer, Leaf, PublicKey, Validity
from broker.spiffe import SpiffeId, TrustDomain

E = TypeVar("E", bound=x509.ExtensionType)

MAX_SERIAL_BITS: Final = 159
"""20 octets, and a positive number (RFC 5280 §4.1.2.2)."""
MIN_RSA_BITS: Final = 2048
_DNS_LABEL: Final = r"[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
_DNS_NAME: Final = re.compile(rf"(?=.{{1,253}}\Z)(?:\*\.)?{_DNS_LABEL}(?:\.{_DNS_LABEL})*")
_BOTH: Final = frozenset({ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH})
_PROBE: Final = 1 << 64
"""The serial number of the leaf that shows the form; it is never signed."""
_UNSIGNED: Final = bytes.fromhex("3006020101020101")
"""A well-formed ECDSA signature of nothing."""


def leaf(leaf: Leaf, key: PublicKey, issuer: Issuer) -> None:
    """Judge a leaf that is about to be signed; raises Invalid. Costs a microsecond: thousands are signed per second."""
    if not leaf.spiffe_id.path:
        raise _broken("X5-03", "a leaf's SPIFFE ID has a path")
    if issuer.trust_domain is not None and leaf.spiffe_id.trust_domain != issuer.trust_domain:
        raise _broken("X5-07", "a leaf is of its authority's trust domain")
    _check_serial(leaf.serial)
    _check_life(leaf.validity, issuer.validity)
    if not isinstance(key, ec.EllipticCurvePublicKey | rsa.RSAPublicKey):
        raise _broken("key", "a leaf's key is EC or RSA")
    if leaf.dns_names:
        for name in leaf.dns_names:
            if _DNS_NAME.fullmatch(name) is None:
                raise _broken("X5-02", "a DNS name is one (RFC 5280 §4.2.1.6)")
        if len(set(leaf.dns_names)) != len(leaf.dns_names):
            raise _broken("X5-02", "a DNS name stands once")


def form(form: LeafForm, issuer: Issuer, key: ec.EllipticCurvePublicKey) -> None:
    """Judge what all leaves of an authority will say, on one that is made for this and never signed; raises Invalid."""
    domain = issuer.trust_domain or TrustDomain("lint.invalid")
    for names in ((), ("lint.invalid",)):
        probe = Leaf(SpiffeId.of(domain, "/lint"), _PROBE, issuer.validity, names)
        certificate = x509.load_der_x509_certificate(leaf_der.certificate(form.to_be_signed(probe, key), _UNSIGNED))
        certified_leaf(certificate, issuer)


def certified_leaf(certificate: x509.Certificate, issuer: Issuer) -> None:
    """Judge a leaf as a certificate; raises Invalid."""
    extensions = _extensions(certificate)
    _check_common(certificate, issuer, extensions)
    usage = _extension(extensions, x509.KeyUsage, "X5-12", critical=True)
    if not usage.digital_signature or usage.key_cert_sign or usage.crl_sign:
        raise _broken("X5-14", "a leaf may sign data, and neither certificates nor revocation lists")
    if _extension(extensions, x509.BasicConstraints, "X5-09", critical=True).ca:
        raise _broken("X5-09", "a leaf is no authority")
    if not frozenset(_extension(extensions, x509.ExtendedKeyUsage, "X5-15")) >= _BOTH:
        raise _broken("X5-16", "a leaf is for both ends of TLS")
    names = extensions.get_extension_for_class(x509.SubjectAlternativeName)
    uris = names.value.get_values_for_type(x509.UniformResourceIdentifier)
    if len(uris) != 1:
        raise _broken("X5-01", "a certificate has one URI name")
    if not SpiffeId(uris[0]).path:
        raise _broken("X5-03", "a leaf's SPIFFE ID has a path")
    if names.critical != (len(list(certificate.subject)) == 0):
        raise _broken("X5-04", "the alternative name is critical where there is no subject, and only there")
    if ExtensionOID.AUTHORITY_KEY_IDENTIFIER not in {one.oid for one in extensions}:
        raise _broken("aki", "a certificate names its issuer's key (RFC 5280 §4.2.1.1)")


def authority(certificate: x509.Certificate, issuer: Issuer | None) -> None:
    """Judge an authority that was just signed, by ``issuer`` or by itself (None); raises Invalid."""
    extensions = _extensions(certificate)
    _check_common(certificate, issuer, extensions)
    constraints = _extension(extensions, x509.BasicConstraints, "X5-09", critical=True)
    if not constraints.ca:
        raise _broken("X5-09", "an authority is one")
    if issuer is not None and issuer.path_length is not None:
        own = constraints.path_length
        if issuer.path_length == 0 or own is None or own >= issuer.path_length:
            raise _broken("X5-10", "an authority allows less below it than its issuer does")
    usage = _extension(extensions, x509.KeyUsage, "X5-12", critical=True)
    if not usage.key_cert_sign:
        raise _broken("X5-13", "an authority may sign certificates")
    if usage.digital_signature or usage.key_agreement or usage.key_encipherment:
        raise _broken("X5-08", "an authority is not for authentication")
    if ExtensionOID.EXTENDED_KEY_USAGE in {one.oid for one in extensions}:
        raise _broken("X5-08", "an authority is not for authentication")
    uris = _extension(extensions, x509.SubjectAlternativeName, "X5-05").get_values_for_type(
        x509.UniformResourceIdentifier
    )
    if len(uris) != 1 or SpiffeId(uris[0]).path:
        raise _broken("X5-06", "an authority's SPIFFE ID is its trust domain's")
    if issuer is not None and issuer.trust_domain not in (None, SpiffeId(uris[0]).trust_domain):
        raise _broken("X5-07", "an authority is of its issuer's trust domain")
    if not list(certificate.subject):
        raise _broken("subject", "an authority has a name (RFC 5280 §4.1.2.6)")


def _check_common(certificate: x509.Certificate, issuer: Issuer | None, extensions: x509.Extensions) -> None:
    if certificate.version is not x509.Version.v3:
        raise _broken("version", "a certificate is of version 3")
    _check_serial(certificate.serial_number)
    life = Validity(certificate.not_valid_before_utc, certificate.not_valid_after_utc)
    _check_life(life, issuer.validity if issuer else life)
    if certificate.issuer != (issuer.name if issuer else certificate.subject):
        raise _broken("issuer", "a certificate names its issuer")
    key_id = _extension(extensions, x509.SubjectKeyIdentifier, "ski").digest
    if key_id != x509.SubjectKeyIdentifier.from_public_key(_strong(certificate)).digest:
        raise _broken("ski", "the key identifier is the key's (RFC 5280 §4.2.1.2)")
    if issuer is not None:
        named = _extension(extensions, x509.AuthorityKeyIdentifier, "aki")
        if named != issuer.key_identifier.value:
            raise _broken("aki", "a certificate names its issuer's key (RFC 5280 §4.2.1.1)")


def _strong(certificate: x509.Certificate) -> PublicKey:
    key = certificate.public_key()
    if isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP256R1 | ec.SECP384R1):
        return key
    if isinstance(key, rsa.RSAPublicKey) and key.key_size >= MIN_RSA_BITS:
        return key
    raise _broken("key", "a key is on P-256 or P-384, or RSA of 2048 bits and more")


def _check_serial(serial: int) -> None:
    if serial <= 0 or serial.bit_length() > MAX_SERIAL_BITS:
        raise _broken("serial", "a serial number is positive and has at most 20 octets (RFC 5280 §4.1.2.2)")


def _check_life(life: Validity, limits: Validity) -> None:
    if life.not_before >= life.not_after:
        raise _broken("validity", "a certificate ends after it begins")
    if life.not_after > limits.not_after or life.not_before < limits.not_before:
        raise _broken("validity", "a certificate lives within its authority's life")
    if life.not_before.microsecond or life.not_after.microsecond:
        raise _broken("validity", "a certificate's times are whole seconds (RFC 5280 §4.1.2.5)")


def _extensions(certificate: x509.Certificate) -> x509.Extensions:
    try:
        return certificate.extensions
    except (ValueError, x509.DuplicateExtension) as error:
        raise _broken("extensions", "the extensions can be read, each once (RFC 5280 §4.2)") from error


def _extension(extensions: x509.Extensions, kind: type[E], rule: str, *, critical: bool = False) -> E:
    try:
        found = extensions.get_extension_for_class(kind)
    except x509.ExtensionNotFound:
        raise _broken(rule, f"there is a {kind.__name__}") from None
    if critical and not found.critical:
        raise _broken(rule, f"{kind.__name__} is critical")
    return found.value


def _broken(rule: str, text: str) -> Invalid:
    return Invalid(
        f"the certificate was not signed: {text} ({rule})",
        code="certificate_profile",
        hint="the entry, or the authority, asks for what a SPIFFE certificate may not say",
    )
