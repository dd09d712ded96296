"""Other trust domains in memory, fed by the change log: their bundles, the relationships, and whom this server can judge.

Bundles stay apart by trust domain and are never merged (SPIFFE Federation §4). Knows no sockets and decides nothing.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Final

from broker.server.authority.authorities import Authorities
from broker.server.identity.changes import GONE
from broker.server.store.bundle_rows import PublishedBundle
from broker.server.store.ports import Reader, Store
from broker.server.store.rows import Change
from broker.spiffe import Bundle, BundleSet, SpiffeId, TrustDomain
from broker.spiffe.federation import Profile, Relationship

BUNDLE_KIND: Final = "federated_bundle"
RELATIONSHIP_KIND: Final = "federation_relationship"

Listener = Callable[[str, TrustDomain], None]


class Federated:
    """What is known of other trust domains at this moment."""

    def __init__(self, authorities: Authorities, configured: Iterable[Relationship] = ()) -> None:
        """``configured``: relationships of the settings, which stand before those of the store."""
        self._authorities = authorities
        self._configured = MappingProxyType({one.trust_domain: one for one in configured})
        self._stored: dict[TrustDomain, Relationship] = {}
        self._published: dict[TrustDomain, PublishedBundle] = {}
        self._bundles: dict[TrustDomain, Bundle] = {}
        self._trusted = authorities.bundles
        self._withdrawn_at = 0
        self._listeners: list[Listener] = []
        authorities.subscribe(self._combine)

    async def load(self, store: Store) -> None:
        """Take a snapshot, then follow the change log without a gap between the two."""
        early: list[Change] = []
        stop = store.subscribe(early.extend)
        bundles, relationships, head = await store.read(_snapshot)
        for one in bundles:
            self._published[one.trust_domain] = one
            self._bundles[one.trust_domain] = one.checked()
        self._stored = {one.trust_domain: one for one in relationships}
        stop()
        self.apply([change for change in early if change.seq > head])
        self._combine()
        store.subscribe(self.apply)

    # ---- questions

    @property
    def trusted(self) -> BundleSet:
        """The bundles under which callers are judged, each by its own trust domain's; a new object after each change."""
        return self._trusted

    @property
    def bundles(self) -> Mapping[TrustDomain, PublishedBundle]:
        """The bundles of all other trust domains."""
        return self._published

    def trusted_bundle(self, trust_domain: TrustDomain) -> Bundle | None:
        """Give one trust domain's bundle for verifying, the own one too, or None."""
        return self._trusted.get(trust_domain)

    @property
    def stored(self) -> Mapping[TrustDomain, Relationship]:
        """The relationships that were made through the API."""
        return self._stored

    def is_configured(self, trust_domain: TrustDomain) -> bool:
        """Tell whether the settings name a relationship with a trust domain."""
        return trust_domain in self._configured

    @property
    def relationships(self) -> Mapping[TrustDomain, Relationship]:
        """The relationships that count: the settings' own before those of the store."""
        return {**self._stored, **self._configured}

    def withdrew_after(self, seq: int) -> bool:
        """Tell whether a bundle was removed after this change: who held it must be told so."""
        return self._withdrawn_at > seq

    # ---- changes

    def subscribe(self, listener: Listener) -> None:
        """Call on the event loop after a bundle or a relationship has changed, with the kind and the trust domain."""
        self._listeners.append(listener)

    def apply(self, changes: Sequence[Change]) -> None:
        """Take in what was committed."""
        told = [(change.kind, self._apply(change)) for change in changes if change.kind in _KINDS]
        if any(kind == BUNDLE_KIND for kind, _ in told):
            self._combine()
        for kind, trust_domain in told:
            for listener in tuple(self._listeners):
                listener(kind, trust_domain)

    def _apply(self, change: Change) -> TrustDomain:
        trust_domain = TrustDomain(change.key)
        if change.kind == RELATIONSHIP_KIND:
            if change.body == GONE:
                self._stored.pop(trust_domain, None)
            else:
                self._stored[trust_domain] = relationship_of(trust_domain, change.body)
        elif change.body == GONE:
            self._published.pop(trust_domain, None)
            self._bundles.pop(trust_domain, None)
            self._withdrawn_at = change.seq
        else:
            published = PublishedBundle.read(change.body)
            self._published[trust_domain], self._bundles[trust_domain] = published, published.checked()
        return trust_domain

    def _combine(self) -> None:
        self._trusted = BundleSet((*self._authorities.bundles.values(), *self._bundles.values()))


_KINDS: Final = frozenset({BUNDLE_KIND, RELATIONSHIP_KIND})


def relationship_text(relationship: Relationship) -> str:
    """Write a relationship for the change log."""
    return json.dumps([relationship.url, relationship.profile.value, str(relationship.endpoint_id or "")])


def relationship_of(trust_domain: TrustDomain, text: str) -> Relationship:
    """Read a relationship from the change log."""
    url, profile, endpoint_id = json.loads(text)
    return Relationship(trust_domain, url, Profile(profile), SpiffeId(endpoint_id) if endpoint_id else None)


def _snapshot(reader: Reader) -> tuple[tuple[PublishedBundle, ...], tuple[Relationship, ...], int]:
    return reader.federated_bundles(), reader.relationships(), reader.change_head()
