"""Tasks by what they hang on: their supervision, their agent, its entry, its authority, their audience.

What looks at whole tables is for the start of a server, or for what an operator does rarely.
"""

# ruff: noqa: S608 - the texts are put together from constants only

import json
from collections.abc import Iterable
from datetime import datetime
from typing import Final

from broker.registry.entry import Entry
from broker.server.store.rows import SessionLeaf, SessionRow, TokenRow
from broker.server.store.sql import micros, moment
from broker.server.store.tables.entries import EntryReading
from broker.server.store.tables.sessions import SessionReading
from broker.server.store.tables.tasks import TaskReading
from broker.server.store.tables.tokens import TokenReading
from broker.server.store.tables.tree_ends import LIVING
from broker.spiffe import SpiffeId, TrustDomain
from broker.tasks.causes import Cause
from broker.tasks.task import State, Supervision, Task

_IN_STATE: Final = f"SELECT id FROM tasks WHERE {LIVING} AND state = ?"
_LEASED: Final = f"{_IN_STATE} AND supervision = ? ORDER BY id"
_LAPSED: Final = f"{_IN_STATE} AND cause = ? ORDER BY id"
_OF_AGENT: Final = f"SELECT id FROM tasks WHERE agent = ? AND {LIVING} ORDER BY created_at, id"
# All SPIFFE IDs of a trust domain lie between its own and the one with the character after the slash.
_OF_DOMAIN: Final = f"SELECT id FROM tasks WHERE agent > ? AND agent < ? AND {LIVING} ORDER BY created_at, id"
_AFTER_SLASH: Final = "0"
_AGENTS: Final = "SELECT DISTINCT agent FROM sessions WHERE ended_at IS NULL ORDER BY agent"
_OTHER_RUNS: Final = "SELECT id FROM sessions WHERE agent = ? AND run <> ? AND ended_at IS NULL ORDER BY started_at, id"
_EARLIER_LEAVES: Final = (
    "SELECT x5t, not_after, serial FROM session_leaves WHERE session = ? AND not_after > ? ORDER BY not_after DESC, x5t"
)
_SIGNED: Final = "SELECT svids FROM issued_svids WHERE authority = ? AND not_after > ?"
_LIVING_HELD: Final = (
    "SELECT id, serial FROM sessions WHERE ended_at IS NULL"
    " UNION SELECT s.id, l.serial FROM sessions s JOIN session_leaves l ON l.session = s.id"
    " WHERE s.ended_at IS NULL AND l.not_after > ? ORDER BY 1"
)
_ENTRIES: Final = "SELECT id FROM entries WHERE spiffe_id = ? ORDER BY created_at, id"
_LIVING_TOKEN: Final = "FROM tokens WHERE expires_at > ? AND revoked_at IS NULL"  # noqa: S105 - part of a query
_RESOURCES: Final = f"SELECT DISTINCT resource {_LIVING_TOKEN} ORDER BY resource"
_TOKENS: Final = f"SELECT jti {_LIVING_TOKEN} AND resource = ? ORDER BY jti LIMIT ?"


class SupervisionReading(EntryReading, SessionReading, TaskReading, TokenReading):
    """Finds tasks, sessions and tokens by what they hang on."""

    def leased_tasks(self) -> tuple[str, ...]:
        """Give the ids of the active tasks that live by a heartbeat."""
        return tuple(row[0] for row in self._sql.rows(_LEASED, (State.ACTIVE, Supervision.LEASE)))

    def lapsed_tasks(self) -> tuple[str, ...]:
        """Give the ids of the tasks that are suspended because their heartbeat stopped."""
        return tuple(row[0] for row in self._sql.rows(_LAPSED, (State.SUSPENDED, Cause.LEASE_LAPSED)))

    def agents_with_sessions(self) -> tuple[SpiffeId, ...]:
        """Give the node agents that have told of a session that lives."""
        return tuple(SpiffeId(row[0]) for row in self._sql.rows(_AGENTS))

    def sessions_of_other_runs(self, agent: SpiffeId, run: str) -> tuple[SessionRow, ...]:
        """Give the living sessions that another run of this node agent told of, oldest first."""
        return self._sessions_by_id(row[0] for row in self._sql.rows(_OTHER_RUNS, (str(agent), run)))

    def session_leaves(self, session_id: str, now: datetime) -> tuple[SessionLeaf, ...]:
        """Give every leaf of a session that is still valid, its present one first."""
        session = self.session(session_id)
        if session is None:
            return ()
        present = SessionLeaf(session.x5t, session.not_after, session.serial)
        earlier = (
            SessionLeaf(row[0], moment(row[1]), row[2])
            for row in self._sql.rows(_EARLIER_LEAVES, (session_id, micros(now)))
            if row[0] != session.x5t
        )
        return tuple(leaf for leaf in (present, *earlier) if leaf.not_after > now)

    def sessions_signed_by(self, authority: str, now: datetime) -> tuple[SessionRow, ...]:
        """Give the living sessions that hold a valid leaf of this X.509 authority."""
        signed = {one[0] for (batch,) in self._sql.rows(_SIGNED, (authority, micros(now))) for one in json.loads(batch)}
        held = self._sql.rows(_LIVING_HELD, (micros(now),))
        return self._sessions_by_id(dict.fromkeys(session_id for session_id, serial in held if serial in signed))

    def tasks_of_agent(self, agent: SpiffeId) -> tuple[Task, ...]:
        """Give the tasks of one SPIFFE ID that have not ended, oldest first."""
        return self._tasks_by_id(row[0] for row in self._sql.rows(_OF_AGENT, (str(agent),)))

    def tasks_of_trust_domain(self, trust_domain: TrustDomain) -> tuple[Task, ...]:
        """Give the tasks of all SPIFFE IDs of a trust domain that have not ended, oldest first."""
        own = str(trust_domain.id)
        return self._tasks_by_id(row[0] for row in self._sql.rows(_OF_DOMAIN, (f"{own}/", own + _AFTER_SLASH)))

    def entries_of(self, spiffe_id: SpiffeId) -> tuple[Entry, ...]:
        """Give the entries that issue one SPIFFE ID, oldest first."""
        found = (self.entry(row[0]) for row in self._sql.rows(_ENTRIES, (str(spiffe_id),)))
        return tuple(entry for entry in found if entry is not None)

    def living_resources(self, now: datetime) -> tuple[str, ...]:
        """Give the resources for which there is a token that has neither expired nor been revoked."""
        return tuple(row[0] for row in self._sql.rows(_RESOURCES, (micros(now),)))

    def tokens_for(self, resource: str, now: datetime, limit: int) -> tuple[TokenRow, ...]:
        """Give up to ``limit`` tokens for a resource that have neither expired nor been revoked."""
        found = (self.token(row[0]) for row in self._sql.rows(_TOKENS, (micros(now), resource, limit)))
        return tuple(token for token in found if token is not None)

    def _tasks_by_id(self, ids: Iterable[str]) -> tuple[Task, ...]:
        return tuple(task for task in map(self.task, ids) if task is not None)

    def _sessions_by_id(self, ids: Iterable[str]) -> tuple[SessionRow, ...]:
        return tuple(session for session in map(self.session, ids) if session is not None)
