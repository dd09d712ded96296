"""What hangs on what the identity half takes away, as the identity half sees it: a port, and who hangs nothing on it.

Called inside the transaction that takes it away, so that what ends with it ends in the same commit.
"""

from datetime import datetime
from typing import Final, Protocol

from broker.registry.entry import Entry
from broker.server.store.ports import Writer
from broker.spiffe import SpiffeId, TrustDomain


class Withdrawals(Protocol):
    """Ends what hangs on entries, node agents and trust domains. ``by`` says who took it away."""

    def entry_gone(self, writer: Writer, entry: Entry, by: str, now: datetime) -> None:
        """End what hung on an entry that was just removed."""
        ...

    def entry_changed(self, writer: Writer, before: Entry, after: Entry, by: str, now: datetime) -> None:
        """End what an entry no longer allows; ``after`` is written already."""
        ...

    def node_gone(self, writer: Writer, agent_id: SpiffeId, by: str, now: datetime) -> None:
        """End what a node agent vouched for that was just banned or forgotten."""
        ...

    def trust_domain_gone(self, writer: Writer, trust_domain: TrustDomain, by: str, now: datetime) -> None:
        """End what the workloads of another trust domain did, whose bundle was just removed."""
        ...


class _Nothing:
    """Nothing hangs on anything: for an identity half by itself, as in its own tests."""

    def entry_gone(self, writer: Writer, entry: Entry, by: str, now: datetime) -> None:
        """Do nothing."""

    def entry_changed(self, writer: Writer, before: Entry, after: Entry, by: str, now: datetime) -> None:
        """Do nothing."""

    def node_gone(self, writer: Writer, agent_id: SpiffeId, by: str, now: datetime) -> None:
        """Do nothing."""

    def trust_domain_gone(self, writer: Writer, trust_domain: TrustDomain, by: str, now: datetime) -> None:
        """Do nothing."""


NOTHING: Final[Withdrawals] = _Nothing()
