"""X.509 authorities: a key with its certificate, the leaves it signs, and the authorities below it.

Knows profiles and signers; who may have what, and that it must be recorded first, is the use cases' business. What
breaks the profile is not signed (``lint``).
"""

from dataclasses import dataclass, field
from datetime import datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from broker.errors import Unavailable
from broker.keys import Signer
from broker.server.authority import leaf_der, lint, profile
from broker.server.authority.leaf_der import LeafForm
from broker.server.authority.profile import Issuer, Leaf, PublicKey, Validity
from broker.spiffe import TrustDomain
from broker.spiffe.certificates import split_der


@dataclass(frozen=True, slots=True)
class X509Authority:
    """An authority that can sign: its id, what its leaves say of it, its key, and what they are sent with.

    ``chain_der``: its own certificate and those above it without the root; empty where it is the root itself.
    """

    id: str
    issuer: Issuer
    form: LeafForm = field(repr=False)
    signer: Signer = field(repr=False)
    chain_der: tuple[bytes, ...] = field(default=(), repr=False)

    @classmethod
    def of(
        cls, authority_id: str, certificate_der: bytes, signer: Signer, above: bytes = b"", *, is_root: bool = True
    ) -> "X509Authority":
        """Join a published certificate with the key that is held here; ``above`` is concatenated DER without the root.

        Raises Invalid when leaves under it would break the profile.
        """
        between = tuple(split_der(above)) if above else ()
        own = x509.load_der_x509_certificate(certificate_der)
        issuer = Issuer.of(own, tuple(map(x509.load_der_x509_certificate, between)))
        form = LeafForm.of(issuer)
        lint.form(form, issuer, signer.public_key)
        return cls(authority_id, issuer, form, signer, () if is_root else (certificate_der, *between))

    def validity(self, now: datetime, ttl: timedelta) -> Validity:
        """Give a leaf's life under this authority; raises Unavailable once the authority has ended."""
        return profile.leaf_validity(now, ttl, self.issuer.validity)

    def sign(self, leaf: Leaf, key: PublicKey) -> bytes:
        """Sign one leaf and give it in DER; raises Unavailable for a life it does not cover, Invalid by ``lint``."""
        # NOTE(security): the validity was computed before; an authority that changed in between must not sign past itself.
        if leaf.validity.not_after > self.issuer.validity.not_after:
            raise Unavailable("the leaf would outlive its authority", code="authority_ended")
        lint.leaf(leaf, key, self.issuer)
        tbs = self.form.to_be_signed(leaf, key)
        return leaf_der.certificate(tbs, self.signer.sign_der(tbs))

    def issue(self, leaf: Leaf, key: PublicKey) -> tuple[bytes, ...]:
        """Sign one leaf and give its chain, leaf first and without the root; raises as :meth:`sign`."""
        return (self.sign(leaf, key), *self.chain_der)

    def certify(self, trust_domain: TrustDomain, key: PublicKey, serial: int, validity: Validity) -> tuple[bytes, ...]:
        """Sign an authority below this one and give its chain, it first; raises Refused, Invalid."""
        unit = f"DOWNSTREAM-{len(self.chain_der) + 1}"
        builder = profile.intermediate_certificate(trust_domain, key, serial, validity, self.issuer, unit=unit)
        made = self.signer.certify(builder)
        lint.authority(made, self.issuer)
        return (made.public_bytes(Encoding.DER), *self.chain_der)


def self_signed(trust_domain: TrustDomain, signer: Signer, serial: int, validity: Validity) -> bytes:
    """Make a new authority's certificate, in DER; raises Invalid by ``lint``."""
    builder = profile.authority_certificate(
        trust_domain, signer.public_key, serial, validity, path_length=profile.NESTING
    )
    made = signer.certify(builder)
    lint.authority(made, None)
    return made.public_bytes(Encoding.DER)
