"""X.509-SVIDs: the rules of the leaf, and the verdict over a whole chain (X509-SVID §5).

Responsible for what makes a certificate a SPIFFE identity, and for the one rule that TLS libraries do not know: the
authority must be in the bundle of the trust domain that the leaf names. Does no I/O and reads no clock.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import InitVar, dataclass, field
from datetime import datetime
from typing import Final

from cryptography import x509
from cryptography.x509.oid import NameOID

from broker.errors import InvalidSpiffeId, InvalidSvid
from broker.spiffe import certificates
from broker.spiffe.bundles import BundleSet
from broker.spiffe.certificates import split_der
from broker.spiffe.chains import MAX_CHAIN, find_path
from broker.spiffe.ids import SpiffeId
from broker.spiffe.jose import b64url_encode

__all__ = ["X509Svid", "parse_x509_svid_id", "split_der", "verify_x509_svid"]

_SEAL: Final = object()


@dataclass(frozen=True, slots=True)
class X509Svid:
    """A verified X.509-SVID. Only :func:`verify_x509_svid` makes one.

    ``chain`` is the path that was verified, leaf first, without ``authority``, the trust bundle's certificate that
    ends it. ``x5t`` is the leaf's SHA-256 thumbprint in base64url, as in the claim ``x5t#S256`` (RFC 8705 §3.1).
    """

    id: SpiffeId
    not_before: datetime
    not_after: datetime
    serial: int
    x5t: str
    chain: tuple[x509.Certificate, ...] = field(repr=False)
    authority: x509.Certificate = field(repr=False)
    seal: InitVar[object]
    expires_at: datetime = field(init=False, repr=False, compare=False)
    """The end of the first certificate of the path to expire: nothing may rely on the SVID after it."""

    def __post_init__(self, seal: object) -> None:
        if seal is not _SEAL:
            raise TypeError("an X509Svid comes from verify_x509_svid only")
        ends = min(certificate.not_valid_after_utc for certificate in (*self.chain, self.authority))
        object.__setattr__(self, "expires_at", ends)

    @property
    def leaf(self) -> x509.Certificate:
        """The certificate of the identity itself."""
        return self.chain[0]

    @property
    def issuer(self) -> x509.Certificate:
        """The certificate that signed the leaf."""
        return (*self.chain, self.authority)[1]


def verify_x509_svid(chain_der: Sequence[bytes], bundles: BundleSet, *, now: datetime) -> X509Svid:
    """Verify a chain, leaf first and the rest in any order, at an aware time; raises InvalidSvid (X509-SVID §5).

    What the bundle says is revoked, leaf or intermediate, is refused (``svid_revoked``).
    """
    if now.tzinfo is None:
        raise ValueError("now must be an aware datetime")
    if not 1 <= len(chain_der) <= MAX_CHAIN:
        raise InvalidSvid(f"the chain does not have 1 to {MAX_CHAIN} certificates", code="svid_chain_length")
    leaf = certificates.read(certificates.load(chain_der[0]))
    spiffe_id = _leaf_id(leaf.uris())
    _check_subject(leaf.subject(), spiffe_id)
    certificates.check_leaf_usage(leaf)
    bundle = bundles.get(spiffe_id.trust_domain)
    if bundle is None:
        raise InvalidSvid(
            f"there is no bundle of the trust domain {spiffe_id.trust_domain}",
            code="svid_no_bundle",
            hint="federate with that trust domain, or wait for its bundle",
        )
    intermediates = [certificates.read_authority(certificates.load(der)) for der in chain_der[1:]]
    path = find_path(leaf, intermediates, bundle.anchors, now=now)
    if bundle.revoked.names_any(path):
        raise InvalidSvid("the SVID was revoked", code="svid_revoked", hint="fetch a new one from the node agent")
    return X509Svid(
        id=spiffe_id,
        not_before=leaf.not_before,
        not_after=leaf.not_after,
        serial=leaf.certificate.serial_number,
        x5t=b64url_encode(hashlib.sha256(chain_der[0]).digest()),
        chain=path[:-1],
        authority=path[-1],
        seal=_SEAL,
    )


def parse_x509_svid_id(certificate: x509.Certificate) -> SpiffeId:
    """Read the SPIFFE ID of a certificate nobody has verified: its one and only URI name; raises InvalidSvid."""
    return _spiffe_id(certificates.read(certificate).uris())


def _leaf_id(uris: Sequence[str]) -> SpiffeId:
    spiffe_id = _spiffe_id(uris)
    if not spiffe_id.path:
        raise InvalidSvid("the leaf's SPIFFE ID has no path", code="svid_root_path")
    return spiffe_id


def _check_subject(subject: x509.Name, spiffe_id: SpiffeId) -> None:
    """Refuse a common name that claims another SPIFFE ID: there is software that reads it first."""
    for attribute in subject.get_attributes_for_oid(NameOID.COMMON_NAME):
        name = str(attribute.value)
        if name.lower().startswith("spiffe://") and name != str(spiffe_id):
            raise InvalidSvid("the certificate's common name claims another SPIFFE ID", code="svid_subject")


def _spiffe_id(uris: Sequence[str]) -> SpiffeId:
    if len(uris) != 1:
        raise InvalidSvid(f"the certificate has {len(uris)} URI names instead of one", code="svid_uri_count")
    try:
        return SpiffeId(uris[0])
    except InvalidSpiffeId as error:
        raise InvalidSvid(f"the certificate's URI name: {error.message}", code=error.reason, hint=error.hint) from None
