"""Our own bundle, with what SPIRE's message says beyond the standard's: the end of each key, and taint."""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime

from broker.errors import NotFound
from broker.server.authority.authorities import Authorities, BundleKey
from broker.spiffe import TrustDomain


@dataclass(frozen=True, slots=True)
class PublishedKey:
    """One published authority: a DER certificate, or a DER SubjectPublicKeyInfo with its ``kid`` and end."""

    id: str
    public: bytes
    not_after: datetime
    tainted: bool


@dataclass(frozen=True, slots=True)
class PublishedBundle:
    """The bundle of one trust domain, as our API shows it; the refresh hint is in seconds."""

    trust_domain: TrustDomain
    x509: tuple[PublishedKey, ...]
    jwt: tuple[PublishedKey, ...]
    sequence: int
    refresh_hint: int


class Bundles:
    """The use cases of bundles."""

    def __init__(self, trust_domain: TrustDomain, authorities: Authorities) -> None:
        self._trust_domain = trust_domain
        self._authorities = authorities

    def own(self) -> PublishedBundle:
        """Give the own trust domain's bundle."""
        bundle = self._authorities.bundle
        return PublishedBundle(
            self._trust_domain,
            _published(self._authorities.x509_keys),
            _published(self._authorities.jwt_keys),
            bundle.sequence or 0,
            bundle.refresh_hint or 0,
        )

    def federated(self, trust_domain: TrustDomain) -> PublishedBundle:
        """Give a foreign trust domain's bundle; raises NotFound."""
        raise NotFound(f"there is no bundle of {trust_domain}", code="bundle_not_found")


def _published(rows: Iterable[BundleKey]) -> tuple[PublishedKey, ...]:
    return tuple(PublishedKey(row.id, row.public, row.not_after, row.tainted) for row in rows)
