"""The port of the store for who watches over tasks, and whom they hang on; composed in :mod:`broker.server.store.ports`."""

from datetime import datetime
from typing import Protocol

from broker.registry.entry import Entry
from broker.server.store.rows import SessionLeaf, SessionRow, TokenRow
from broker.spiffe import SpiffeId, TrustDomain
from broker.tasks.task import Task


class SupervisionReads(Protocol):
    """Tasks by what they hang on, read. States are as written: judge them with ``effective_state``."""

    def leased_tasks(self) -> tuple[str, ...]:
        """Give the ids of the active tasks that live by a heartbeat. Looks at every task: for the start of a server."""
        ...

    def lapsed_tasks(self) -> tuple[str, ...]:
        """Give the ids of the tasks that are suspended because their heartbeat stopped. Looks at every task."""
        ...

    def agents_with_sessions(self) -> tuple[SpiffeId, ...]:
        """Give the node agents that have told of a session that lives. Looks at every living session."""
        ...

    def sessions_of_other_runs(self, agent: SpiffeId, run: str) -> tuple[SessionRow, ...]:
        """Give the living sessions that another run of this node agent told of, oldest first."""
        ...

    def session_leaves(self, session_id: str, now: datetime) -> tuple[SessionLeaf, ...]:
        """Give every leaf of a session that is still valid, its present one first."""
        ...

    def sessions_signed_by(self, authority: str, now: datetime) -> tuple[SessionRow, ...]:
        """Give the living sessions that hold a valid leaf of this X.509 authority; looks at all that it signed."""
        ...

    def tasks_of_agent(self, agent: SpiffeId) -> tuple[Task, ...]:
        """Give the tasks of one SPIFFE ID that have not ended, oldest first."""
        ...

    def tasks_of_trust_domain(self, trust_domain: TrustDomain) -> tuple[Task, ...]:
        """Give the tasks of all SPIFFE IDs of a trust domain that have not ended, oldest first."""
        ...

    def entries_of(self, spiffe_id: SpiffeId) -> tuple[Entry, ...]:
        """Give the entries that issue one SPIFFE ID, oldest first."""
        ...

    def living_resources(self, now: datetime) -> tuple[str, ...]:
        """Give the resources for which there is a token that has neither expired nor been revoked. Looks at every token."""
        ...

    def tokens_for(self, resource: str, now: datetime, limit: int) -> tuple[TokenRow, ...]:
        """Give up to ``limit`` tokens for a resource that have neither expired nor been revoked. Looks at every token."""
        ...
