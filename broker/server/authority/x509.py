"""X.509 authorities: a key with its self-signed certificate, and the leaves it signs.

Knows profiles and signers; who may have a leaf, and that it must be recorded first, is the use cases' business.
"""

from dataclasses import dataclass, field
from datetime import datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from broker.errors import Unavailable
from broker.keys import Signer
from broker.server.authority import leaf_der, profile
from broker.server.authority.leaf_der import LeafForm
from broker.server.authority.profile import Issuer, Leaf, PublicKey, Validity
from broker.spiffe import TrustDomain

PATH_LENGTH = 0
"""No authority below ours: that changes with the first downstream server."""


@dataclass(frozen=True, slots=True)
class X509Authority:
    """An authority that can sign: its id, what its leaves say of it, and its key."""

    id: str
    issuer: Issuer
    form: LeafForm = field(repr=False)
    signer: Signer = field(repr=False)

    @classmethod
    def of(cls, authority_id: str, certificate_der: bytes, signer: Signer) -> "X509Authority":
        """Join a published certificate with the key that is held here."""
        issuer = Issuer.of(x509.load_der_x509_certificate(certificate_der))
        return cls(authority_id, issuer, LeafForm.of(issuer), signer)

    def validity(self, now: datetime, ttl: timedelta) -> Validity:
        """Give a leaf's life under this authority; raises Unavailable once the authority has ended."""
        return profile.leaf_validity(now, ttl, self.issuer.validity)

    def sign(self, leaf: Leaf, key: PublicKey) -> bytes:
        """Sign one leaf and give it in DER; raises Unavailable for a life that this authority does not cover."""
        # NOTE(security): the validity was computed before; an authority that changed in between must not sign past itself.
        if leaf.validity.not_after > self.issuer.validity.not_after:
            raise Unavailable("the leaf would outlive its authority", code="authority_ended")
        tbs = self.form.to_be_signed(leaf, key)
        return leaf_der.certificate(tbs, self.signer.sign_der(tbs))


def self_signed(trust_domain: TrustDomain, signer: Signer, serial: int, validity: Validity) -> bytes:
    """Make a new authority's certificate, in DER."""
    builder = profile.authority_certificate(trust_domain, signer.public_key, serial, validity, path_length=PATH_LENGTH)
    return signer.certify(builder).public_bytes(Encoding.DER)
