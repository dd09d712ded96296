"""Who stands above our X.509 authorities: nobody, a certificate and key in files, or (elsewhere) another server.

The port is what the rotation asks: a certificate for a new key, the roots and keys that belong into our bundle because
of it, and a place to publish our JWT keys. Knows files; the network is behind another adapter of the same port.
"""

import os
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Final, Protocol

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

from broker.clock import Clock
from broker.errors import BrokerError, Invalid, Misconfigured
from broker.keys import Signer
from broker.server.authority import lint, profile
from broker.server.authority import x509 as authorities
from broker.server.authority.profile import Issuer, Validity
from broker.server.store.rows import AdoptedAuthority, AuthorityKind, Source
from broker.spiffe import TrustDomain
from broker.spiffe.certificates import read_authority

MAX_FILE: Final = 1 << 20
"""Bytes of a certificate file: a bundle of some hundred roots."""

SigningKey = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey


@dataclass(frozen=True, slots=True)
class Minted:
    """A new authority's certificate (DER); what leads from it to the root (concatenated DER, without the root); the roots.

    ``upstream`` is the key identifier of who signed it, in hex; empty for a self-signed one, which is its own root.
    """

    certificate: bytes
    above: bytes = b""
    upstream: str = ""
    roots: tuple[AdoptedAuthority, ...] = ()


@dataclass(frozen=True, slots=True)
class PublicJwtKey:
    """A JWT key as it is published: DER SubjectPublicKeyInfo."""

    id: str
    public: bytes = field(repr=False)
    not_after: datetime


class Upstream(Protocol):
    """What stands above."""

    @property
    def is_above(self) -> bool:
        """Tell whether there is anybody above at all."""
        ...

    async def mint(self, signer: Signer, ttl: timedelta) -> Minted:
        """Certify a new authority's key for at most ``ttl``; raises Unavailable, Refused, Misconfigured."""
        ...

    async def publish(self, key: PublicJwtKey) -> tuple[AdoptedAuthority, ...]:
        """Publish a JWT key above, and give the JWT keys that are published there; nobody above: ``()``."""
        ...

    async def bundle(self) -> tuple[AdoptedAuthority, ...] | None:
        """Give all that is published above now, or None where that is not followed; raises Unavailable."""
        ...


class SelfSigned:
    """Nobody above: each authority signs itself."""

    is_above = False

    def __init__(self, trust_domain: TrustDomain, clock: Clock) -> None:
        self._trust_domain = trust_domain
        self._clock = clock

    async def mint(self, signer: Signer, ttl: timedelta) -> Minted:
        """Sign with the key itself."""
        validity = profile.authority_validity(self._clock.now(), ttl)
        serial = profile.serial_number(secrets.randbits(profile.SERIAL_BITS))
        return Minted(authorities.self_signed(self._trust_domain, signer, serial, validity))

    async def publish(self, key: PublicJwtKey) -> tuple[AdoptedAuthority, ...]:
        """Nowhere."""
        return ()

    async def bundle(self) -> tuple[AdoptedAuthority, ...] | None:
        """Nothing."""
        return None


class DiskUpstream:
    """A certificate and its key in files, read again for each new authority, so that the files may be renewed."""

    is_above = True

    def __init__(
        self, trust_domain: TrustDomain, clock: Clock, *, certificate: Path, key: Path, bundle: Path | None
    ) -> None:
        """``certificate``: PEM, the signing certificate first, then those above it; ``bundle``: PEM roots.

        Without a bundle file the certificate must be a root itself.
        """
        self._trust_domain = trust_domain
        self._clock = clock
        self._certificate = certificate
        self._key = key
        self._bundle = bundle

    def check(self) -> None:
        """Read all files and judge them; raises Misconfigured."""
        self._read()

    async def mint(self, signer: Signer, ttl: timedelta) -> Minted:
        """Sign with the key in the file."""
        chain, key, roots = self._read()
        is_root = chain[0] in roots
        above = () if is_root else chain
        ends = _root_of(chain, roots)
        issuer = Issuer.of(chain[0], (*chain[1:], ends))
        now = self._clock.now()
        life = profile.authority_validity(now, ttl)
        if issuer.validity.not_after <= now:
            raise Misconfigured("the upstream certificate has expired", code="upstream_expired", hint="renew the file")
        validity = Validity(
            max(life.not_before, issuer.validity.not_before), min(life.not_after, issuer.validity.not_after)
        )
        serial = profile.serial_number(secrets.randbits(profile.SERIAL_BITS))
        builder = profile.intermediate_certificate(self._trust_domain, signer.public_key, serial, validity, issuer)
        made = builder.sign(key, hashes.SHA256())
        lint.authority(made, issuer)
        return Minted(
            made.public_bytes(Encoding.DER),
            b"".join(one.public_bytes(Encoding.DER) for one in above),
            profile.issuer_key_id(made),
            adopted_roots(roots),
        )

    async def publish(self, key: PublicJwtKey) -> tuple[AdoptedAuthority, ...]:
        """Nowhere: a file publishes nothing."""
        return ()

    async def bundle(self) -> tuple[AdoptedAuthority, ...] | None:
        """Nothing is followed: roots come with each new authority."""
        return None

    def _read(self) -> tuple[tuple[x509.Certificate, ...], SigningKey, tuple[x509.Certificate, ...]]:
        chain = _certificates(self._certificate)
        key = _private_key(self._key)
        if _spki(key.public_key()) != _spki(chain[0].public_key()):
            raise _bad(self._key, "the key is not the upstream certificate's")
        roots = _certificates(self._bundle) if self._bundle is not None else (chain[-1],)
        _require_chain(self._certificate, chain, roots)
        return tuple(one for one in chain if one is chain[0] or one not in roots), key, roots


def adopted_roots(
    roots: Iterable[x509.Certificate], tainted: Iterable[x509.Certificate] = ()
) -> tuple[AdoptedAuthority, ...]:
    """Give roots from above as rows of our bundle, by key identifier."""
    marked = frozenset(tainted)
    return tuple(
        AdoptedAuthority(
            AuthorityKind.X509,
            profile.subject_key_id(root),
            root.public_bytes(Encoding.DER),
            root.not_valid_after_utc,
            Source.UPSTREAM,
            tainted=root in marked,
        )
        for root in dict.fromkeys(roots)
    )


def _require_chain(path: Path, chain: Sequence[x509.Certificate], roots: Sequence[x509.Certificate]) -> None:
    try:
        for certificate in (*chain, *roots):
            read_authority(certificate, anchor=True)
        for below, above in zip(chain, (*chain[1:], _root_of(chain, roots)), strict=True):
            if below is not above:
                below.verify_directly_issued_by(above)
    except BrokerError as error:
        raise _bad(path, error.message) from None
    except Exception:  # noqa: BLE001 - a signature that does not hold, a key of another kind: the same advice
        raise _bad(path, "its certificates do not lead to a root of the bundle") from None


def _root_of(chain: Sequence[x509.Certificate], roots: Sequence[x509.Certificate]) -> x509.Certificate:
    last = chain[-1]
    if last in roots:
        return last
    for root in roots:
        if root.subject == last.issuer:
            try:
                last.verify_directly_issued_by(root)
            except Exception:  # noqa: BLE001, S112 - another root of the same name
                continue
            return root
    raise Invalid("its certificates do not lead to a root of the bundle")


def _certificates(path: Path) -> tuple[x509.Certificate, ...]:
    try:
        return tuple(x509.load_pem_x509_certificates(_text(path)))
    except ValueError:
        raise _bad(path, "it does not hold certificates in PEM") from None


def _private_key(path: Path) -> SigningKey:
    try:
        key = load_pem_private_key(_text(path, secret=True), password=None)
    except (ValueError, TypeError):
        # ``from None``: the error's text may quote the file.
        raise _bad(path, "it does not hold a private key in PEM without a password") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey):
        raise _bad(path, "its key is neither EC nor RSA")
    return key


def _text(path: Path, *, secret: bool = False) -> bytes:
    try:
        with path.open("rb") as file:
            if secret and os.fstat(file.fileno()).st_mode & 0o077:
                raise _bad(path, "others may read it", "chmod it 0600")
            return file.read(MAX_FILE)
    except OSError as error:
        raise _bad(path, f"it cannot be read: {error.strerror}") from None


def _bad(path: Path, reason: str, hint: str = "see [server.upstream] disk") -> Misconfigured:
    return Misconfigured(
        f"the upstream authority in {path} cannot be used: {reason}", code="upstream_unusable", hint=hint
    )


def _spki(key: object) -> bytes:
    if not isinstance(key, ec.EllipticCurvePublicKey | rsa.RSAPublicKey):
        return b""
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
