"""Which certificates their authorities take back before their time: revocation lists, read and asked (RFC 5280 §5, §6.3).

A certificate is named by the key that signed it and its serial number. A list counts only under the bundle whose authority
signed it. A list that is past its next update still counts: what is taken back stays so. How lists come, and how new the
newest is, is not known here.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from types import MappingProxyType
from typing import Final

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from broker.errors import InvalidBundle

MAX_CRL: Final = 2 * 1024 * 1024
"""Largest list, in bytes of DER: twice what the most revocations that a server of ours keeps take."""
MAX_CRLS: Final = 64
"""Most lists of one trust domain: two for each authority that is published."""

# What the library raises for malformed content. Where warnings are errors, its warnings arrive here too.
_MALFORMED: Final = (ValueError, TypeError, KeyError, UnsupportedAlgorithm, Warning, x509.DuplicateExtension)


@dataclass(frozen=True, slots=True)
class List:
    """A list of an authority that is not in the bundle, one below it: believed where that authority stands in a path."""

    serials: frozenset[int]
    crl: x509.CertificateRevocationList = field(repr=False)


@dataclass(frozen=True, slots=True)
class Revocations:
    """Serial numbers by the key that signed them (:func:`key_of`), and lists by their issuer's name. Immutable."""

    serials: Mapping[str, frozenset[int]] = field(default_factory=dict, repr=False, hash=False)
    lists: Mapping[x509.Name, tuple[List, ...]] = field(default_factory=dict, repr=False, hash=False)

    def __post_init__(self) -> None:
        """Leave out what names nothing, so that equal content is equal."""
        object.__setattr__(self, "serials", MappingProxyType({key: ones for key, ones in self.serials.items() if ones}))
        object.__setattr__(self, "lists", MappingProxyType(dict(self.lists)))

    def __len__(self) -> int:
        """How many certificates are named."""
        return sum(map(len, self.serials.values())) + sum(
            len(one.serials) for ones in self.lists.values() for one in ones
        )

    def names(self, certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
        """Say whether a certificate is taken back by the one that issued it, which somebody has vouched for."""
        serial = certificate.serial_number
        if self.serials and serial in self.serials.get(key_of(issuer), ()):
            return True
        return any(serial in one.serials and _is_signed(one.crl, issuer) for one in self.lists.get(issuer.subject, ()))

    def names_any(self, path: Sequence[x509.Certificate]) -> bool:
        """Say whether any certificate of a verified path, leaf first and anchor last, is taken back."""
        return bool(self.serials or self.lists) and any(map(self.names, path, path[1:]))


NOTHING: Final = Revocations()
"""Nothing is revoked."""


@lru_cache(maxsize=256)
def key_of(issuer: x509.Certificate) -> str:
    """Give an issuer's key identifier in hex, from the key itself (RFC 5280 §4.2.1.2 (1)): names can be alike, keys are not."""
    return x509.SubjectKeyIdentifier.from_public_key(issuer.public_key()).digest.hex()


def read_crls(lists: Sequence[bytes], authorities: Iterable[x509.Certificate]) -> Revocations:
    """Read the DER lists that these authorities signed, also those that name certificates of others among them.

    A list of an authority that is not here is kept until a path shows that authority; an indirect one is passed over.
    Raises InvalidBundle (``crl_malformed``, ``crl_untrusted``, ``crl_too_large``).
    """
    if len(lists) > MAX_CRLS or any(len(der) > MAX_CRL for der in lists):
        raise InvalidBundle(
            f"there are more than {MAX_CRLS} revocation lists, or one is larger than {MAX_CRL} bytes",
            code="crl_too_large",
        )
    by_name: dict[x509.Name, list[x509.Certificate]] = {}
    for authority in authorities:
        by_name.setdefault(authority.subject, []).append(authority)
    found: dict[str, set[int]] = {}
    others: dict[x509.Name, tuple[List, ...]] = {}
    try:
        for crl in map(x509.load_der_x509_crl, lists):
            if crl.issuer in by_name:
                for serial, issuers in _entries(crl, by_name, _signer(crl, by_name[crl.issuer])):
                    for issuer in issuers:
                        found.setdefault(key_of(issuer), set()).add(serial)
            elif len(crl) and not _is_indirect(crl):
                kept = List(frozenset(entry.serial_number for entry in crl), crl)
                others[crl.issuer] = (*others.get(crl.issuer, ()), kept)
    except _MALFORMED:
        raise InvalidBundle("a revocation list is malformed", code="crl_malformed") from None
    return Revocations({key: frozenset(serials) for key, serials in found.items()}, others)


def _is_signed(crl: x509.CertificateRevocationList, issuer: x509.Certificate) -> bool:
    # NOTE(security): a list that anybody could have made would let him take back whose certificate he likes.
    key = issuer.public_key()
    return isinstance(key, (ec.EllipticCurvePublicKey, rsa.RSAPublicKey)) and crl.is_signature_valid(key)


def _signer(crl: x509.CertificateRevocationList, candidates: Sequence[x509.Certificate]) -> x509.Certificate:
    for candidate in candidates:
        if _is_signed(crl, candidate):
            return candidate
    raise InvalidBundle("a revocation list is not signed by the authority that it names", code="crl_untrusted")


def _entries(
    crl: x509.CertificateRevocationList,
    by_name: Mapping[x509.Name, Sequence[x509.Certificate]],
    signer: x509.Certificate,
) -> Iterable[tuple[int, Sequence[x509.Certificate]]]:
    issuers: Sequence[x509.Certificate] = (signer,)
    if not _is_indirect(crl):
        yield from ((entry.serial_number, issuers) for entry in crl)
        return
    for entry in crl:
        try:
            named = entry.extensions.get_extension_for_class(x509.CertificateIssuer).value
        except x509.ExtensionNotFound:
            pass
        else:
            # RFC 5280 §5.3.3: it holds for the entries that follow, too.
            (name,) = named.get_values_for_type(x509.DirectoryName)
            issuers = by_name.get(name, ())
        yield entry.serial_number, issuers


def _is_indirect(crl: x509.CertificateRevocationList) -> bool:
    try:
        return crl.extensions.get_extension_for_class(x509.IssuingDistributionPoint).value.indirect_crl
    except x509.ExtensionNotFound:
        return False
