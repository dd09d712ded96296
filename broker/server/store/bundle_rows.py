"""A trust domain's bundle with what SPIRE's message says beyond the standard's document: each key's end, and taint.

The same value is a row, the body of a change, and what our API shows. Its text stays inside our own store, so reading it
raises plain errors: a text that cannot be read is a defect.
"""

import base64
import json
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_der_public_key

from broker.errors import InvalidBundle, InvalidToken
from broker.spiffe import Bundle, TrustDomain, jose
from broker.spiffe.jose import PublicKey

MAX_AUTHORITIES: Final = 500
"""Keys of one bundle: a trust domain has one to three for each replica."""
MAX_KEY_BYTES: Final = 1 << 20
"""All keys of one bundle together: it travels to each agent in one message of at most 4 MiB."""


@dataclass(frozen=True, slots=True)
class PublishedKey:
    """One published authority: a DER certificate, or a DER SubjectPublicKeyInfo with its ``kid``; no end: unknown."""

    id: str
    public: bytes
    not_after: datetime | None = None
    tainted: bool = False


@dataclass(frozen=True, slots=True)
class PublishedBundle:
    """The bundle of one trust domain; the refresh hint is in seconds, 0 for none, as is a sequence of 0."""

    trust_domain: TrustDomain
    x509: tuple[PublishedKey, ...]
    jwt: tuple[PublishedKey, ...]
    sequence: int
    refresh_hint: int

    @classmethod
    def of(cls, bundle: Bundle) -> "PublishedBundle":
        """Show a bundle that was read from a document."""
        return cls(
            bundle.trust_domain,
            tuple(x509_key(certificate.public_bytes(Encoding.DER)) for certificate in bundle.x509_authorities),
            tuple(
                PublishedKey(kid, key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo))
                for kid, key in sorted(bundle.jwt_authorities.items())
            ),
            bundle.sequence or 0,
            bundle.refresh_hint or 0,
        )

    def checked(self) -> Bundle:
        """Give the bundle that a verifier uses; raises InvalidBundle for keys that none could use."""
        if len(self.x509) + len(self.jwt) > MAX_AUTHORITIES:
            raise InvalidBundle(f"a bundle has at most {MAX_AUTHORITIES} authorities", code="bundle_too_large")
        if sum(len(key.public) for key in (*self.x509, *self.jwt)) > MAX_KEY_BYTES:
            raise InvalidBundle(f"a bundle has at most {MAX_KEY_BYTES} bytes of authorities", code="bundle_too_large")
        if len({key.id for key in self.jwt}) != len(self.jwt):
            raise InvalidBundle("two JWT authorities have one key ID", code="bundle_key_id")
        return Bundle(
            self.trust_domain,
            tuple(_certificate(key.public) for key in self.x509),
            {key.id: jwt_public_key(key.public) for key in self.jwt},
            sequence=self.sequence,
            refresh_hint=self.refresh_hint or None,
        )

    def text(self) -> str:
        """Write it as one JSON text."""
        return json.dumps(
            {
                "trust_domain": self.trust_domain.name,
                "x509": [_key_members(key) for key in self.x509],
                "jwt": [_key_members(key) for key in self.jwt],
                "sequence": str(self.sequence),
                "refresh_hint": str(self.refresh_hint),
            },
            separators=(",", ":"),
        )

    @classmethod
    def read(cls, text: str) -> "PublishedBundle":
        """Read what :meth:`text` wrote."""
        members: dict[str, Any] = json.loads(text)
        return cls(
            TrustDomain(members["trust_domain"]),
            tuple(map(_key_of, members["x509"])),
            tuple(map(_key_of, members["jwt"])),
            int(members["sequence"]),
            int(members["refresh_hint"]),
        )


def x509_key(der: bytes, *, tainted: bool = False) -> PublishedKey:
    """Show a certificate, which needs no other name; raises InvalidBundle for what is none, or fits into no document."""
    certificate = _certificate(der)
    Bundle(_ANY, (certificate,)).to_json()
    return PublishedKey("", der, certificate.not_valid_after_utc, tainted)


def jwt_public_key(der: bytes) -> PublicKey:
    """Read a DER SubjectPublicKeyInfo that JWT-SVIDs can be signed with; raises InvalidBundle."""
    try:
        key = load_der_public_key(der)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise InvalidBundle("a JWT authority is not a public key", code="bundle_key") from None
    try:
        if isinstance(key, ec.EllipticCurvePublicKey | rsa.RSAPublicKey):
            # The same limits on curves and sizes as for a key that comes in a document.
            return jose.public_key_from_jwk(jose.jwk_from_public_key(key))
    except InvalidToken:
        pass
    raise InvalidBundle("a JWT authority is of a kind that signs no JWT-SVID", code="bundle_key")


_ANY: Final = TrustDomain("any")


def _certificate(der: bytes) -> x509.Certificate:
    try:
        return x509.load_der_x509_certificate(der)
    except (ValueError, TypeError):
        raise InvalidBundle("an X.509 authority is not a certificate", code="bundle_certificate") from None


def _key_members(key: PublishedKey) -> list[object]:
    ends = None if key.not_after is None else int(key.not_after.timestamp())
    return [key.id, base64.b64encode(key.public).decode("ascii"), ends, key.tainted]


def _key_of(members: list[Any]) -> PublishedKey:
    name, public, ends, tainted = members
    return PublishedKey(
        name, base64.b64decode(public), None if ends is None else datetime.fromtimestamp(ends, UTC), tainted
    )
