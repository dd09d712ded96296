"""Tasks end with the identity that they stand on: its entry, its node agent, its authority, its trust domain.

Each cause ends the workload sessions that stood on what is gone, and with them their tasks and tokens, through the one way in
which tasks end. What one act of an operator takes away ends in that act's own transaction; what an authority signed may be a
whole estate, and ends right after it, a part at a time, and again at the next start if that was cut off. Audiences are settings:
tokens for one that is gone are revoked when the server starts.
"""

from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from typing import Final

from broker.clock import Clock
from broker.registry.entry import Entry
from broker.server.store.ports import Store, Writer
from broker.server.store.rows import AuthorityKind, SessionRow
from broker.server.tasks.lifecycle import end, end_session, revoke_token
from broker.spiffe import SpiffeId, TrustDomain
from broker.tasks import Cause, State, Task
from broker.tasks.causes import SessionEnd
from broker.telemetry.log import get_logger

AT_ONCE: Final = 200
"""Sessions or tokens of one transaction, so that others do not wait."""
SERVER: Final = "server"
AUDIENCE_GONE: Final = "audience_gone"
"""The word of the record for tokens whose service is registered no longer."""

log = get_logger("withdrawals")


class TaskWithdrawals:
    """Ends sessions and tasks within the transaction that takes away what they stand on."""

    def entry_gone(self, writer: Writer, entry: Entry, by: str, now: datetime) -> None:
        """End the sessions of an entry that was just removed, and what its SPIFFE ID does without a session."""
        _end_sessions(writer, writer.sessions_of_entry(entry.id), SessionEnd.ENTRY_GONE, by, now)
        _end_unattended(writer, entry.spiffe_id, by, now)

    def entry_changed(self, writer: Writer, before: Entry, after: Entry, by: str, now: datetime) -> None:
        """End the sessions of an entry that is another's now, or the tasks of one that may start none any more.

        Other selectors are the node agent's to judge: it withdraws what a process no longer earns, and says so.
        """
        if before.spiffe_id != after.spiffe_id or before.parent_id != after.parent_id:
            _end_sessions(writer, writer.sessions_of_entry(before.id), SessionEnd.ENTRY_GONE, by, now)
        elif before.may_start_tasks and not after.may_start_tasks:
            for session in writer.sessions_of_entry(before.id):
                _end_tasks(writer, writer.tasks_of_session(session.id), Cause.ENTRY_DELETED, by, now)
        else:
            return
        _end_unattended(writer, before.spiffe_id, by, now)

    def node_gone(self, writer: Writer, agent_id: SpiffeId, by: str, now: datetime) -> None:
        """End the sessions that a node agent vouched for."""
        _end_sessions(writer, writer.sessions_of_agent(agent_id), SessionEnd.AGENT_BANNED, by, now)

    def trust_domain_gone(self, writer: Writer, trust_domain: TrustDomain, by: str, now: datetime) -> None:
        """End the tasks of a trust domain whose bundle is gone: nobody can tell any more who its workloads are."""
        _end_tasks(writer, writer.tasks_of_trust_domain(trust_domain), Cause.AUTHORITY_TAINTED, by, now)


class Distrust:
    """Ends what hangs on an authority or an audience that does not count any more."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock

    async def authority(self, kind: AuthorityKind, authority_id: str, by: str = SERVER) -> None:
        """End the sessions that hold a leaf of an X.509 authority; raises Unavailable. Harmless when repeated.

        Of the other kinds nothing lives on by itself: a task-token key takes its tokens with it when it leaves the key set,
        and a JWT key signs nothing that a task stands on.
        """
        if kind is not AuthorityKind.X509:
            return
        ended = 0
        while sessions := await self._store.read(
            lambda reader: reader.sessions_signed_by(authority_id, self._clock.now())[:AT_ONCE]
        ):
            await self._store.write(self._ending(sessions, by))
            ended += len(sessions)
        if ended:
            log.warning("sessions_ended_with_authority", authority=authority_id, count=ended, by=by)

    async def settle(self, tainted: Iterable[str], resources: Iterable[str]) -> None:
        """Make up at the start for what was cut off: tainted X.509 authorities, audiences that are registered no longer.

        ``resources`` are the registered ones; raises Unavailable.
        """
        for authority_id in tainted:
            await self.authority(AuthorityKind.X509, authority_id)
        known = frozenset(resources)
        for resource in await self._store.read(lambda reader: reader.living_resources(self._clock.now())):
            if resource not in known:
                await self._revoke_tokens(resource)

    def _ending(self, sessions: Sequence[SessionRow], by: str) -> Callable[[Writer], None]:
        def act(writer: Writer) -> None:
            _end_sessions(writer, sessions, SessionEnd.AUTHORITY_TAINTED, by, self._clock.now())

        return act

    async def _revoke_tokens(self, resource: str) -> None:
        def act(writer: Writer) -> int:
            now = self._clock.now()
            tokens = writer.tokens_for(resource, now, AT_ONCE)
            return sum(revoke_token(writer, token, by=SERVER, now=now, reason=AUDIENCE_GONE) > 0 for token in tokens)

        revoked = 0
        while count := await self._store.write(act):
            revoked += count
        log.warning("audience_gone", resource=resource, tokens_revoked=revoked)


def _end_sessions(writer: Writer, sessions: Sequence[SessionRow], cause: SessionEnd, by: str, now: datetime) -> None:
    for session in sessions:
        end_session(writer, session.id, agent=session.agent, now=now, cause=cause, by=by)


def _end_tasks(writer: Writer, tasks: Sequence[Task], cause: Cause, by: str, now: datetime) -> None:
    # Ancestors first: what hangs below them ends with them, once.
    for task in sorted(tasks, key=lambda one: one.depth):
        current = writer.task(task.id)
        if current is not None and not current.state.is_terminal:
            end(writer, current, State.REVOKED, cause, by=by, now=now)


def _end_unattended(writer: Writer, spiffe_id: SpiffeId, by: str, now: datetime) -> None:
    """End the tasks that hang on no process, when no entry lets their SPIFFE ID act any more."""
    if any(entry.may_start_tasks and not entry.is_expired(now) for entry in writer.entries_of(spiffe_id)):
        return
    alone = [task for task in writer.tasks_of_agent(spiffe_id) if task.session is None]
    _end_tasks(writer, alone, Cause.ENTRY_DELETED, by, now)
