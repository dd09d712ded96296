"""Federation relationships, the newest bundle of each other trust domain, and which entries federate with one."""

from typing import Final

from broker.errors import Conflict
from broker.registry.entry import Entry
from broker.server.store.bundle_rows import PublishedBundle
from broker.server.store.sql import Duplicate, Row
from broker.server.store.tables.entries import ALL_FEDERATING, EntryReading, read_entry
from broker.server.store.tables.known import Known
from broker.spiffe import SpiffeId, TrustDomain
from broker.spiffe.federation import Profile, Relationship

_RELATIONSHIP: Final = (
    "SELECT trust_domain, url, profile, endpoint_id FROM federation_relationships WHERE trust_domain = ?"
)
_RELATIONSHIPS: Final = (
    "SELECT trust_domain, url, profile, endpoint_id FROM federation_relationships ORDER BY trust_domain"
)
_ADD: Final = "INSERT INTO federation_relationships (trust_domain, url, profile, endpoint_id) VALUES (?, ?, ?, ?)"
_REPLACE: Final = "UPDATE federation_relationships SET url = ?, profile = ?, endpoint_id = ? WHERE trust_domain = ?"
_REMOVE: Final = "DELETE FROM federation_relationships WHERE trust_domain = ?"
_BUNDLE: Final = "SELECT body FROM federated_bundles WHERE trust_domain = ?"
_BUNDLES: Final = "SELECT body FROM federated_bundles ORDER BY trust_domain"
_PUT_BUNDLE: Final = (
    "INSERT INTO federated_bundles (trust_domain, body) VALUES (?, ?)"
    " ON CONFLICT (trust_domain) DO UPDATE SET body = excluded.body"
)
_REMOVE_BUNDLE: Final = "DELETE FROM federated_bundles WHERE trust_domain = ?"


class FederationReading(EntryReading):
    """Reads what is known of other trust domains."""

    def relationship(self, trust_domain: TrustDomain) -> Relationship | None:
        """Give one relationship, or None."""
        row = self._sql.row(_RELATIONSHIP, (trust_domain.name,))
        return None if row is None else _read(row)

    def relationships(self) -> tuple[Relationship, ...]:
        """Give all relationships by trust domain."""
        return tuple(map(_read, self._sql.rows(_RELATIONSHIPS)))

    def federated_bundle(self, trust_domain: TrustDomain) -> PublishedBundle | None:
        """Give one trust domain's bundle, or None."""
        row = self._sql.row(_BUNDLE, (trust_domain.name,))
        return None if row is None else PublishedBundle.read(row[0])

    def federated_bundles(self) -> tuple[PublishedBundle, ...]:
        """Give all federated bundles by trust domain."""
        return tuple(PublishedBundle.read(row[0]) for row in self._sql.rows(_BUNDLES))

    def entries_federating(self, trust_domain: TrustDomain) -> tuple[Entry, ...]:
        """Give the entries that federate with a trust domain, oldest first."""
        known = Known()
        entries = (read_entry(row, known) for row in self._sql.rows(ALL_FEDERATING))
        return tuple(entry for entry in entries if trust_domain in entry.federates_with)


class FederationWriting(FederationReading):
    """Writes what is known of other trust domains."""

    def add_relationship(self, relationship: Relationship) -> None:
        """Add; Conflict(code="relationship_exists") when the trust domain has one."""
        try:
            self._sql.attempt(_ADD, (relationship.trust_domain.name, *_values(relationship)))
        except Duplicate:
            raise Conflict("federation relationship already exists", code="relationship_exists") from None

    def replace_relationship(self, relationship: Relationship) -> bool:
        """Replace the trust domain's relationship; give whether there was one."""
        return self._sql.run(_REPLACE, (*_values(relationship), relationship.trust_domain.name)) == 1

    def remove_relationship(self, trust_domain: TrustDomain) -> bool:
        """Remove; give whether there was one."""
        return self._sql.run(_REMOVE, (trust_domain.name,)) == 1

    def put_federated_bundle(self, bundle: PublishedBundle) -> None:
        """Add, or replace the one of the same trust domain."""
        self._sql.run(_PUT_BUNDLE, (bundle.trust_domain.name, bundle.text()))

    def remove_federated_bundle(self, trust_domain: TrustDomain) -> bool:
        """Remove; give whether there was one."""
        return self._sql.run(_REMOVE_BUNDLE, (trust_domain.name,)) == 1


def _values(relationship: Relationship) -> tuple[str, str, str]:
    return relationship.url, relationship.profile.value, str(relationship.endpoint_id or "")


def _read(row: Row) -> Relationship:
    return Relationship(TrustDomain(row[0]), row[1], Profile(row[2]), SpiffeId(row[3]) if row[3] else None)
