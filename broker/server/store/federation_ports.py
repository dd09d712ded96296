"""The port of the store for federation: relationships with other trust domains, and their bundles.

Composed in :mod:`broker.server.store.ports`, as the other tables' ports are.
"""

from typing import Protocol

from broker.registry.entry import Entry
from broker.server.store.bundle_rows import PublishedBundle
from broker.spiffe import TrustDomain
from broker.spiffe.federation import Relationship


class FederationReads(Protocol):
    """Other trust domains, read."""

    def relationship(self, trust_domain: TrustDomain) -> Relationship | None:
        """Give one federation relationship, or None."""
        ...

    def relationships(self) -> tuple[Relationship, ...]:
        """Give all federation relationships by trust domain."""
        ...

    def federated_bundle(self, trust_domain: TrustDomain) -> PublishedBundle | None:
        """Give one federated bundle, or None."""
        ...

    def federated_bundles(self) -> tuple[PublishedBundle, ...]:
        """Give all federated bundles by trust domain."""
        ...

    def entries_federating(self, trust_domain: TrustDomain) -> tuple[Entry, ...]:
        """Give the entries that federate with a trust domain, oldest first."""
        ...


class FederationWrites(FederationReads, Protocol):
    """Other trust domains, written. Writes here are no changes of the log yet: the act says ``change`` itself."""

    def add_relationship(self, relationship: Relationship) -> None:
        """Add; Conflict(code="relationship_exists") when the trust domain has one."""
        ...

    def replace_relationship(self, relationship: Relationship) -> bool:
        """Replace the trust domain's relationship; give whether there was one."""
        ...

    def remove_relationship(self, trust_domain: TrustDomain) -> bool:
        """Remove; give whether there was one."""
        ...

    def put_federated_bundle(self, bundle: PublishedBundle) -> None:
        """Add, or replace the one of the same trust domain."""
        ...

    def remove_federated_bundle(self, trust_domain: TrustDomain) -> bool:
        """Remove; give whether there was one."""
        ...
