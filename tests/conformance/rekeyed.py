"""Cases of x509-limbo made anew: the same certificates, word for word, around keys of ours, at the time of now.

The suite keeps its private keys, and without a leaf's nobody completes a handshake. Every certificate is copied with its
names, extensions and order; its key is one of the same kind, its validity moves with the clock. A leaf becomes a workload's:
it gets a SPIFFE ID beside its names, and the usages of an SVID.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import lru_cache
from typing import Any

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from tests.conformance import limbo
from tests.conformance.limbo import Case
from tests.fakes.svid_pki import BOTH, Holder, key_usage

UNREADABLE = (
    ValueError, TypeError, OverflowError, AttributeError, UnsupportedAlgorithm, x509.DuplicateExtension, x509.InvalidVersion,
    x509.UnsupportedGeneralNameType,
)  # fmt: skip
SIGNABLE = (hashes.SHA256, hashes.SHA384, hashes.SHA512)
EXACT = "validity::not"  # cases about the last second, which a handshake cannot meet


class CannotBeMade(Exception):
    """The builder refuses to write such a certificate, or nobody could read the original."""


@dataclass(frozen=True)
class Rekeyed:
    """The chain, leaf first as the suite orders it, and the anchors."""

    leaf: Holder
    others: Sequence[Holder]
    anchors: Sequence[x509.Certificate]


def rekeyed(case: Case, spiffe_id: str, now: datetime) -> Rekeyed:
    """Make the case anew; raises CannotBeMade."""
    if EXACT in case.id:
        raise CannotBeMade("a moment")
    pems = (case.leaf_pem, *case.others_pem, *case.trusted_pem)
    originals = [limbo.loaded(pem) for pem in pems]
    if any(one is None for one in originals):
        raise CannotBeMade("unreadable")
    maker = _Maker([one for one in originals if one is not None], now - case.moment)
    try:
        made = [maker.make(one, spiffe_id if place == 0 else "") for place, one in enumerate(maker.originals)]
    except UNREADABLE as error:
        raise CannotBeMade(str(error)) from None
    above = 1 + len(case.others_pem)
    return Rekeyed(made[0], made[1:above], [one.certificate for one in made[above:]])


class _Maker:
    def __init__(self, originals: Sequence[x509.Certificate], shift: timedelta) -> None:
        self.originals, self.shift = originals, shift
        self._keys: dict[bytes, Any] = {}

    def make(self, original: x509.Certificate, spiffe_id: str) -> Holder:
        digest = original.signature_hash_algorithm
        if not isinstance(digest, SIGNABLE):
            raise CannotBeMade("a digest that nobody signs with any more")
        key = self._key(original)
        builder = (
            x509.CertificateBuilder()
            .subject_name(original.subject)
            .issuer_name(original.issuer)
            .public_key(key.public_key())
            .serial_number(original.serial_number)
            .not_valid_before((original.not_valid_before_utc + self.shift).replace(tzinfo=None))
            .not_valid_after((original.not_valid_after_utc + self.shift).replace(tzinfo=None))
        )
        for extension in _leaf(original, spiffe_id) if spiffe_id else list(original.extensions):
            builder = builder.add_extension(extension.value, extension.critical)
        return Holder(builder.sign(self._signer(original), digest), key)

    def _key(self, certificate: x509.Certificate) -> Any:
        public = certificate.public_key()
        name = public.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        if name not in self._keys:
            self._keys[name] = _like(public)
        return self._keys[name]

    def _signer(self, certificate: x509.Certificate) -> Any:
        for issuer in self.originals:
            try:
                certificate.verify_directly_issued_by(issuer)
            except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
                continue
            return self._key(issuer)
        # Signed by somebody who is not there.
        return ec.generate_private_key(ec.SECP256R1())


def _like(public: Any) -> Any:
    if isinstance(public, ec.EllipticCurvePublicKey):
        return ec.generate_private_key(public.curve)
    if isinstance(public, rsa.RSAPublicKey):
        return _rsa(public.key_size)
    raise CannotBeMade("a kind of key that TLS does not use")


@lru_cache
def _rsa(bits: int) -> rsa.RSAPrivateKey:
    # RSA keys take long to make; the suite's cases do not depend on two of one size being different.
    return rsa.generate_private_key(65537, bits)


def _leaf(original: x509.Certificate, spiffe_id: str) -> list[x509.Extension[Any]]:
    kept = []
    names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(spiffe_id)]
    critical = False
    for extension in original.extensions:
        if isinstance(extension.value, x509.SubjectAlternativeName):
            names += list(extension.value)
            critical = extension.critical
        elif not isinstance(extension.value, x509.KeyUsage | x509.ExtendedKeyUsage):
            kept.append(extension)
    added = [
        (x509.SubjectAlternativeName(names), critical),
        (key_usage("digital_signature"), True),
        (x509.ExtendedKeyUsage(list(BOTH)), False),
    ]
    return [*kept, *(x509.Extension(value.oid, flag, value) for value, flag in added)]
