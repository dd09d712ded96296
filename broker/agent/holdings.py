"""What is held for one workload: an X.509-SVID with its key, or a JWT-SVID. Values, which no repr shows."""

from dataclasses import dataclass, field
from datetime import datetime

from cryptography.hazmat.primitives.asymmetric import ec

from broker.agent.cache import EstateCache
from broker.registry import Entry
from broker.spiffe import X509Svid
from broker.spiffe.x509svid import split_der


@dataclass(frozen=True, slots=True)
class X509Holding:
    """A verified X.509-SVID and the private key that was made for it here."""

    entry: Entry
    svid: X509Svid = field(repr=False)
    chain_der: bytes = field(repr=False)  # concatenated, leaf first
    key: ec.EllipticCurvePrivateKey = field(repr=False)
    key_der: bytes = field(repr=False)  # PKCS#8
    rotate_at: datetime
    shared: bool = False  # handed to more than one process while the server was away

    @property
    def chain(self) -> tuple[bytes, ...]:
        """The certificates as DER, leaf first."""
        return tuple(split_der(self.chain_der))

    def is_valid(self, cache: EstateCache, now: datetime) -> bool:
        """Say whether it may still be handed out: not expired, not revoked, and its authority is still trusted."""
        own = cache.own_bundle
        return (
            now < self.svid.expires_at
            and own is not None
            and self.svid.authority in own.x509_authorities
            and not cache.is_revoked(self.svid)
        )

    def is_fresh(self, entry: Entry, cache: EstateCache, now: datetime) -> bool:
        """Say whether nothing asks for a new one: valid, of this revision, before its half-life, authority untainted."""
        return not self.is_due(entry, cache, now) and self.is_valid(cache, now)

    def is_due(self, entry: Entry, cache: EstateCache, now: datetime) -> bool:
        """Say of one that is valid whether something asks for a new one all the same."""
        return now >= self.rotate_at or not _is_same(self.entry, entry) or cache.is_tainted(self.svid.authority)


@dataclass(frozen=True, slots=True)
class JwtHolding:
    """A verified JWT-SVID."""

    entry: Entry
    kid: str
    token: str = field(repr=False)
    expires_at: datetime
    renew_at: datetime
    issued_at: int = 0  # seconds since 1970; 0: the server did not say

    def is_valid(self, cache: EstateCache, now: datetime) -> bool:
        """Say whether it may still be handed out."""
        own = cache.own_bundle
        return now < self.expires_at and own is not None and self.kid in own.jwt_authorities

    def is_fresh(self, entry: Entry, cache: EstateCache, now: datetime) -> bool:
        """Say whether nothing asks for a new one."""
        return (
            now < self.renew_at
            and _is_same(self.entry, entry)
            and self.is_valid(cache, now)
            and not cache.is_tainted_kid(self.kid)
        )


def _is_same(held: Entry, now: Entry) -> bool:
    # A re-created entry may have the revision of the old one; the object itself is the quick way to be sure.
    return held is now or (held.revision == now.revision and held.created_at == now.created_at and held == now)
