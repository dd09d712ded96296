"""A task and its states. Responsible for which state follows which, and what a state allows; stores and tells nobody.

Invariants: only ``active`` derives or acts. ``completed revoked expired superseded cascaded`` are final. The clock is
asked before the stored state: past its deadline a task is expired, whatever was written. Every change raises the
version by one. Parent, root, depth, agent, user, authority and what it superseded never change.
"""

from dataclasses import dataclass, replace
from datetime import datetime
from enum import StrEnum
from typing import Final

from broker.errors import Conflict, Invalid, Refused
from broker.spiffe import SpiffeId
from broker.tasks.authority import Authority
from broker.tasks.causes import Cause
from broker.tasks.delegation import Delegation
from broker.tasks.texts import check_id, check_name, check_purpose

MAX_ACT_DEPTH: Final = 8
"""Most agents in one chain, and so in one token's ``act``; the server's own limit may be lower."""


class State(StrEnum):
    """Where a task stands."""

    PENDING = "pending"
    ACTIVE = "active"
    SUSPENDED = "suspended"
    COMPLETED = "completed"
    REVOKED = "revoked"
    EXPIRED = "expired"
    SUPERSEDED = "superseded"
    CASCADED = "cascaded"

    @property
    def is_terminal(self) -> bool:
        """Tell whether nothing follows."""
        return self in TERMINAL


class Supervision(StrEnum):
    """What keeps a task alive besides its deadline."""

    ATTACHED = "attached"
    """The process that started it."""
    LEASE = "lease"
    """A heartbeat, wherever it comes from: who asks for it, and for how long one may be missed, is the server's to say."""
    NONE = "none"
    """Nothing; only where policy allows it."""


TERMINAL: Final = frozenset({State.COMPLETED, State.REVOKED, State.EXPIRED, State.SUPERSEDED, State.CASCADED})

_BEFORE: Final = {
    State.ACTIVE: frozenset({State.PENDING, State.SUSPENDED}),
    State.SUSPENDED: frozenset({State.ACTIVE}),
    State.COMPLETED: frozenset({State.ACTIVE, State.SUSPENDED}),
    State.SUPERSEDED: frozenset({State.ACTIVE, State.SUSPENDED}),
    State.REVOKED: frozenset({State.PENDING, State.ACTIVE, State.SUSPENDED}),
    State.CASCADED: frozenset({State.PENDING, State.ACTIVE, State.SUSPENDED}),
}
"""From where a state may be reached. ``expired`` is not here: only the clock leads to it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One task of one agent for one user; raises Invalid. ``depth`` is 0 for a root, whose ``root`` is its own id.

    ``session`` is the workload session that it is attached to, None where nobody supervises it or nobody has taken it up yet.
    ``epoch``: a token of the task, or of one below it, that bears a lower epoch is dead. It is raised each time the task is
    suspended, from one counter for the whole tree. ``supersedes`` is the task that was handed off to this one, ``history`` the
    agents that held the work before, the latest first.
    """

    id: str
    root: str
    parent: str | None
    depth: int
    user: str
    agent: SpiffeId
    session: str | None
    purpose: str
    authority: Authority
    delegation: Delegation
    created_at: datetime
    expires_at: datetime
    supervision: Supervision = Supervision.ATTACHED
    state: State = State.ACTIVE
    version: int = 1
    epoch: int = 0
    cause: Cause | None = None
    ended_at: datetime | None = None
    supersedes: str | None = None
    history: tuple[SpiffeId, ...] = ()

    def __post_init__(self) -> None:
        check_id(self.id, "task id")
        check_id(self.root, "root task id")
        check_name(self.user, "user")
        check_purpose(self.purpose)
        if self.parent is not None:
            check_id(self.parent, "parent task id")
        if self.session is not None:
            check_id(self.session, "workload session id")
        if not 0 <= self.depth < MAX_ACT_DEPTH or self.version < 1 or self.epoch < 0:
            raise Invalid("the task's depth, version or epoch is out of range", code="invalid_task")
        self._check_place()
        self._check_times()

    def _check_place(self) -> None:
        is_root = self.depth == 0
        if is_root != (self.parent is None) or is_root != (self.root == self.id) or self.parent == self.id:
            raise Invalid("the task's parent, root and depth do not fit each other", code="invalid_task")
        if self.user != self.delegation.user:
            raise Invalid("the task's user is not its delegation's", code="invalid_task")
        if not self.agent.path:
            raise Invalid("the task's agent is a trust domain, not a workload", code="invalid_task")
        if (self.supersedes is None) != (not self.history) or len(self.history) >= MAX_ACT_DEPTH:
            raise Invalid("what the task superseded and who held it do not fit each other", code="invalid_task")

    def _check_times(self) -> None:
        if any(time is not None and time.tzinfo is None for time in (self.created_at, self.expires_at, self.ended_at)):
            raise Invalid("a time of the task has no time zone", code="invalid_task")
        if self.expires_at <= self.created_at or self.expires_at > self.delegation.expires_at:
            raise Invalid("the task does not end after its start and with its delegation", code="invalid_task")
        is_over = self.state.is_terminal
        if is_over != (self.ended_at is not None) or (is_over and self.cause is None):
            raise Invalid("the task's state, end and cause do not fit each other", code="invalid_task")


def effective_state(task: Task, now: datetime) -> State:
    """Give the state that counts: a task past its deadline is expired, swept or not."""
    if not task.state.is_terminal and now >= task.expires_at:
        return State.EXPIRED
    return task.state


def require_active(task: Task, now: datetime) -> None:
    """Refuse unless the task is active at this moment; raises Refused (``task_ended``, ``task_suspended``, …)."""
    state = effective_state(task, now)
    if state is State.ACTIVE:
        return
    code = "task_ended" if state.is_terminal else f"task_{state.value}"
    # The one who asks holds the task: why it is over is theirs to know.
    why = "" if task.cause is None or task.cause.value == state.value else f" ({task.cause.value})"
    raise Refused(f"the task is {state.value}{why}", code=code, hint=_hint(state, task.cause))


def _hint(state: State, cause: Cause | None) -> str:
    if state.is_terminal:
        return "start a new task"
    if cause is Cause.USER_UNCONFIRMED:
        return "show a user token of the same session that its issuer gave lately"
    return ""


def end(task: Task, state: State, cause: Cause, now: datetime, expected_version: int | None = None) -> Task:
    """End a task in a final state; the same task when it stands there already, or ended together with one above it.

    A task past its deadline ends as expired, whatever is asked for. Raises Conflict (``conflict`` when it ended
    otherwise, ``stale_version``), and Invalid for a state that is not final.
    """
    if not state.is_terminal:
        raise Invalid("a task ends in a final state only", code="invalid_task")
    # Whoever ends a tree from several places at once ends each task once, and is not told of a conflict with itself.
    if task.state in {state, State.CASCADED}:
        return task
    _require_open(task, expected_version)
    if now >= task.expires_at:
        return _moved(task, State.EXPIRED, Cause.EXPIRED, task.expires_at)
    if task.state not in _BEFORE.get(state, frozenset()):
        raise _conflict(task)
    # A stepped clock must not let a task end before it began.
    return _moved(task, state, cause, max(now, task.created_at))


def activate(task: Task, cause: Cause | None, now: datetime, expected_version: int | None = None) -> Task:
    """Let a pending or suspended task go on; raises Conflict, also when it is active already."""
    _require_open(task, expected_version)
    return _transition(task, State.ACTIVE, cause, now)


def suspend(task: Task, cause: Cause, now: datetime, expected_version: int | None = None) -> Task:
    """Stop an active task for a while; the same task when it is suspended already. Raises Conflict.

    An operator's word counts over every other: what stood still for another cause waits for an operator from then on.
    """
    if task.state is State.SUSPENDED and effective_state(task, now) is State.SUSPENDED:
        if cause is not Cause.OPERATOR or task.cause is Cause.OPERATOR:
            return task
        _require_open(task, expected_version)
        return replace(task, cause=cause, version=task.version + 1)
    _require_open(task, expected_version)
    return _transition(task, State.SUSPENDED, cause, now)


def _transition(task: Task, state: State, cause: Cause | None, now: datetime) -> Task:
    if effective_state(task, now) not in _BEFORE[state]:
        raise _conflict(task)
    return replace(task, state=state, cause=cause, version=task.version + 1)


def _moved(task: Task, state: State, cause: Cause, ended_at: datetime) -> Task:
    return replace(task, state=state, cause=cause, ended_at=ended_at, version=task.version + 1)


def _require_open(task: Task, expected_version: int | None) -> None:
    if task.state.is_terminal:
        raise _conflict(task)
    if expected_version is not None and expected_version != task.version:
        raise Conflict(
            f"the task is at version {task.version}, not {expected_version}",
            code="stale_version",
            hint="read the task again and decide anew",
        )


def _conflict(task: Task) -> Conflict:
    return Conflict(f"the task is {task.state.value}: that does not follow", code="conflict")
