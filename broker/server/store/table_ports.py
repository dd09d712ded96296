"""The port of the store, table by table: small Protocols of what can be read (``…Reads``) and written (``…Writes``).

Composed in :mod:`broker.server.store.ports`, which is what use cases import. Writes hold or fail wholly; what the storage refuses
is ``Unavailable`` everywhere and not repeated here.
"""

from datetime import datetime
from typing import Protocol

from broker.audit.chain import ChainedRecord, ChainHead
from broker.audit.records import Record
from broker.registry.entry import Entry
from broker.server.store.rows import (
    AdoptedAuthority,
    AuthorityKind,
    AuthorityRow,
    Change,
    FrameRow,
    JoinToken,
    NewFrame,
    Node,
    Published,
    SessionRow,
    TaskFilter,
    TaskPage,
    TokenRow,
)
from broker.spiffe import Selector, SpiffeId
from broker.tasks.causes import Cause
from broker.tasks.task import Task


class TrailReads(Protocol):
    """The audit chain and the change log, read."""

    def chain_head(self) -> ChainHead:
        """Give the last link of the audit chain; ``GENESIS`` when it is empty."""
        ...

    def records(self, after: int, limit: int) -> tuple[ChainedRecord, ...]:
        """Give up to ``limit`` audit rows that follow the sequence number ``after``, in order."""
        ...

    def change_head(self) -> int:
        """Give the last change's number in this snapshot; 0 when there is none."""
        ...

    def changes_since(self, seq: int, limit: int) -> tuple[Change, ...] | None:
        """Give up to ``limit`` changes after ``seq``; None when the log does not reach back that far: take a snapshot."""
        ...


class TrailWrites(TrailReads, Protocol):
    """The audit chain and the change log, written."""

    def record(self, record: Record) -> int:
        """Append to the audit chain and give the row's sequence number."""
        ...

    def change(self, kind: str, key: str, body: str) -> int:
        """Append to the change log and give the number; subscribers get it after the commit."""
        ...


class EntryReads(Protocol):
    """Registration entries, read."""

    def entry(self, entry_id: str) -> Entry | None:
        """Give one entry, or None."""
        ...

    def similar_entry(self, spiffe_id: SpiffeId, parent_id: SpiffeId, selectors: frozenset[Selector]) -> Entry | None:
        """Give the entry with exactly this identity, parent and selectors, or None."""
        ...

    def entries(self) -> tuple[Entry, ...]:
        """Give all entries, oldest first (creation, then id)."""
        ...


class EntryWrites(EntryReads, Protocol):
    """Registration entries, written. Writes here are no changes of the log yet: the act says ``change`` itself."""

    def add_entry(self, entry: Entry) -> None:
        """Add; Conflict(code="entry_exists") when the id or a similar entry exists."""
        ...

    def replace_entry(self, entry: Entry) -> None:
        """Replace the entry whose revision is one lower; NotFound, or Conflict (stale_version, entry_exists)."""
        ...

    def remove_entry(self, entry_id: str) -> Entry | None:
        """Remove and give what was there, or None."""
        ...


class NodeReads(Protocol):
    """Node agents, read."""

    def node(self, agent_id: SpiffeId) -> Node | None:
        """Give one node, or None."""
        ...

    def nodes(self) -> tuple[Node, ...]:
        """Give all nodes by SPIFFE ID."""
        ...


class NodeWrites(NodeReads, Protocol):
    """Node agents and join tokens, written."""

    def put_node(self, node: Node) -> None:
        """Add, or replace the one of the same id."""
        ...

    def remove_node(self, agent_id: SpiffeId) -> Node | None:
        """Remove and give what was there, or None."""
        ...

    def add_join_token(self, token_hash: str, agent_id: SpiffeId | None, expires_at: datetime) -> None:
        """Add; Conflict(code="join_token_exists") when the hash is there."""
        ...

    def take_join_token(self, token_hash: str, now: datetime) -> JoinToken:
        """Use up; Refused(code="join_token_unknown") when it is not there, expired, or taken already."""
        ...


class AuthorityReads(Protocol):
    """Public halves of the authorities, read."""

    def authorities(self, kind: AuthorityKind | None = None) -> tuple[AuthorityRow, ...]:
        """Give all, or those of one kind, oldest first (not_before, then id)."""
        ...

    def bundle_sequence(self) -> int:
        """Give the sequence number of our own trust domain's bundle; 0 before the first."""
        ...

    def published(self) -> Published:
        """Give all that stands in our bundle, or signs: authorities, adopted ones, sequence number, replicas."""
        ...


class AuthorityWrites(AuthorityReads, Protocol):
    """Public halves of the authorities, written."""

    def put_authority(self, row: AuthorityRow) -> None:
        """Add, or replace the one of the same kind and id."""
        ...

    def remove_authority(self, kind: AuthorityKind, authority_id: str) -> AuthorityRow | None:
        """Remove and give what was there, or None."""
        ...

    def bump_bundle_sequence(self) -> int:
        """Raise the bundle's sequence number by one and give it."""
        ...

    def put_adopted(self, row: AdoptedAuthority) -> None:
        """Add, or replace the one of the same kind and id."""
        ...

    def remove_adopted(self, kind: AuthorityKind, authority_id: str) -> AdoptedAuthority | None:
        """Remove and give what was there, or None."""
        ...

    def see_replica(self, replica: str, now: datetime, silent_since: datetime) -> None:
        """Note that a replica lives, and forget those that were last heard before ``silent_since``."""
        ...


class SessionReads(Protocol):
    """Workload sessions, read."""

    def session(self, session_id: str) -> SessionRow | None:
        """Give one session, living or ended, or None."""
        ...

    def session_by_x5t(self, x5t: str) -> SessionRow | None:
        """Give the session that holds this leaf, or held it before it was rotated: a living one before an ended one, the youngest first; or None."""
        ...

    def sessions_of_agent(self, agent: SpiffeId) -> tuple[SessionRow, ...]:
        """Give the living sessions of a node agent, oldest first."""
        ...

    def sessions_of_entry(self, entry_id: str) -> tuple[SessionRow, ...]:
        """Give the living sessions of an entry, oldest first."""
        ...


class SessionWrites(SessionReads, Protocol):
    """Workload sessions, written."""

    def put_session(self, row: SessionRow) -> None:
        """Add, or renew the leaf of the same session.

        Conflict(code="session_ended") when it has ended, Conflict(code="session_taken") when the id is another agent's, entry's
        or identity's. A renewal keeps ``started_at``.
        """
        ...

    def end_session(self, session_id: str, at: datetime) -> SessionRow | None:
        """End and give the session; None when it is unknown or had ended before."""
        ...


class TaskReads(Protocol):
    """Tasks, read. States are as written: judge them with ``effective_state``."""

    def task(self, task_id: str) -> Task | None:
        """Give one task, or None."""
        ...

    def lineage(self, task_id: str) -> tuple[Task, ...]:
        """Give the task and its ancestors, root first; empty when it is unknown."""
        ...

    def subtree(self, task_id: str) -> tuple[Task, ...]:
        """Give the task and all its descendants, by depth; empty when it is unknown."""
        ...

    def tasks_of_session(self, session_id: str) -> tuple[Task, ...]:
        """Give the tasks of a workload session that have not ended, oldest first."""
        ...

    def overdue_tasks(self, now: datetime, limit: int) -> tuple[Task, ...]:
        """Give up to ``limit`` tasks whose time is over and whose row does not say so yet, the longest overdue first."""
        ...

    def earliest_end(self) -> datetime | None:
        """Give when the time of a living task is over next (or was); None where none lives."""
        ...

    def list_tasks(self, wanted: TaskFilter, *, after: str | None = None, limit: int = 100) -> TaskPage:
        """Give a page, oldest first; Invalid(code="invalid_page_token") for a token that is not ours."""
        ...

    def root_epoch(self, root: str) -> int:
        """Give the epoch of a task tree; 0 until the first end in it."""
        ...


class TaskWrites(TaskReads, Protocol):
    """Tasks, written."""

    def add_task(self, task: Task) -> None:
        """Add; Conflict(code="task_exists"), NotFound when its parent or root is unknown."""
        ...

    def replace_task(self, task: Task, expected_version: int) -> None:
        """Write what may change (state, version, cause, end, expiry, session, epoch, supervision).

        NotFound, or Conflict(code="stale_version") when the row's version is not the expected one. The task's own version must be
        higher. Who, for whom, under which parent and with what authority never changes.
        """
        ...

    def cascade(self, task_id: str, cause: Cause, at: datetime) -> int:
        """End all living descendants of a task (not itself) as ``cascaded``, or ``expired`` if overdue; give their number.

        Whoever reads them finds them ended. Of a large tree whose root has ended the rows are for :meth:`write_tree_ends`.
        """
        ...

    def write_tree_ends(self, limit: int) -> int:
        """Write up to ``limit`` rows of tasks that ended with their large tree; give their number. No answer changes by it."""
        ...

    def bump_epoch(self, root: str) -> int:
        """Raise a tree's epoch by one and give it: higher than that of any token issued in the tree so far."""
        ...


class TokenReads(Protocol):
    """Issued task tokens, read."""

    def token(self, jti: str) -> TokenRow | None:
        """Give one token's row, or None."""
        ...

    def tokens_issued(self, task_id: str) -> int:
        """Count the tokens of one task."""
        ...

    def living_tokens(self, task_id: str, now: datetime, *, after: str = "", limit: int) -> tuple[TokenRow, ...]:
        """Give up to ``limit`` tokens of one task that have neither expired nor been revoked, by jti, those after ``after``."""
        ...


class TokenWrites(TokenReads, Protocol):
    """Issued task tokens, written."""

    def add_token(self, row: TokenRow) -> None:
        """Add; Conflict(code="token_exists"), NotFound when its task is unknown."""
        ...

    def revoke_token(self, jti: str, at: datetime) -> TokenRow | None:
        """Revoke and give the token's row; None when it is unknown or was revoked before."""
        ...


class FrameReads(Protocol):
    """Frames of the revocation feed, read."""

    def frames_since(self, seq: int) -> tuple[FrameRow, ...]:
        """Give all kept frames after ``seq``, in order."""
        ...

    def live_frames(self, now: datetime) -> tuple[FrameRow, ...]:
        """Give all frames that a living token may still meet, in order: the feed's snapshot."""
        ...


class FrameWrites(FrameReads, Protocol):
    """Frames of the revocation feed, written."""

    def add_frame(self, frame: NewFrame) -> int:
        """Append a frame and its change (kind "frame", body = the frame as JSON); give their one number."""
        ...


class IdempotencyWrites(Protocol):
    """Answers kept for repeated requests: ids and facts to rebuild an answer from, never a token."""

    def recall(self, owner: str, key: str, digest: str) -> str | None:
        """Give the kept answer, or None; Conflict(code="idempotency_mismatch") when the request was another one."""
        ...

    def remember(self, owner: str, key: str, digest: str, result: str, expires_at: datetime) -> None:
        """Keep an answer; Conflict(code="idempotency_mismatch") when the key is in use."""
        ...


class Housekeeping(Protocol):
    """Forgetting what nobody can ask for any more, a bounded number of rows at a time."""

    def sweep(self, now: datetime, limit: int) -> int:
        """Forget up to ``limit`` rows of each kind that are past their time; give how many rows went."""
        ...
