"""Tasks and the epochs of their trees.

Every write names the version it expects, in the WHERE clause. Parents, roots, people and authority are written once. A task that
lives has no end, and one that has an end does not live: the table itself holds this. Of a task whose large tree has just ended
as a whole the tree's end tells (:mod:`broker.server.store.tables.tree_ends`): what may have ended is read with it.
"""

# ruff: noqa: S608 - the texts are put together from constants of this module only

from datetime import datetime
from typing import Final

from broker.errors import Conflict, NotFound
from broker.server.store.rows import TaskFilter, TaskPage
from broker.server.store.sql import (
    Dangling,
    Duplicate,
    Row,
    Sql,
    SqlTables,
    Value,
    micros,
    micros_or_none,
    moment,
    moment_or_none,
)
from broker.server.store.tables.known import Remembered
from broker.server.store.tables.places import place_after, place_of
from broker.server.store.tables.tree_ends import (
    LIVING,
    READ_CAUSE,
    READ_ENDED_AT,
    READ_STATE,
    READ_VERSION,
    TASKS_AS_READ,
    WALK_DOWN,
    TreeEnding,
)
from broker.spiffe import SpiffeId, strictjson
from broker.tasks.authority import Authority
from broker.tasks.causes import Cause
from broker.tasks.delegation import Delegation
from broker.tasks.task import State, Supervision, Task

MAX_PAGE: Final = 1_000
"""Most tasks of one page: some megabytes at most, whatever was asked for."""

_COLUMNS: Final = (
    "id, root, parent, depth, user_id, agent, session, purpose, authority, delegation, created_at, expires_at,"
    " supervision, state, version, epoch, cause, ended_at, supersedes, history"
)
SELECT_LIVING: Final = f"SELECT {_COLUMNS} FROM tasks WHERE {LIVING}"
"""For a search of another table's: its rows are read as tasks."""
_SELECT: Final = (
    "SELECT id, root, parent, depth, user_id, agent, session, purpose, authority, delegation, created_at, expires_at,"
    f" supervision, {READ_STATE}, {READ_VERSION}, epoch, {READ_CAUSE}, {READ_ENDED_AT}, supersedes, history {TASKS_AS_READ}"
)
_VERSION: Final = f"SELECT {READ_VERSION} FROM tasks WHERE id = ?"
_ONE: Final = f"{_SELECT} WHERE id = ?"
_UP: Final = (
    "WITH RECURSIVE line (id, parent) AS (SELECT id, parent FROM tasks WHERE id = ?"
    " UNION ALL SELECT t.id, t.parent FROM tasks t JOIN line ON t.id = line.parent)"
    f" {_SELECT} WHERE id IN (SELECT id FROM line) ORDER BY depth"
)
_DOWN: Final = f"{WALK_DOWN} {_SELECT} WHERE id IN (SELECT id FROM below) ORDER BY depth, created_at, id"
_OF_SESSION: Final = f"{SELECT_LIVING} AND session = ? ORDER BY created_at, id"
_EARLIEST: Final = f"SELECT expires_at FROM tasks WHERE {LIVING} ORDER BY expires_at LIMIT 1"
_OVERDUE: Final = f"{SELECT_LIVING} AND expires_at <= ? ORDER BY expires_at, id LIMIT ?"
_LIST: Final = f"{_SELECT} WHERE (created_at, id) > (?, ?)"
_IN_ORDER: Final = " ORDER BY created_at, id LIMIT ?"
_ADD: Final = f"INSERT INTO tasks ({_COLUMNS}) VALUES ({', '.join('?' * 20)})"
_REPLACE: Final = (
    "UPDATE tasks SET session = ?, expires_at = ?, supervision = ?, state = ?, version = ?, epoch = ?, cause = ?,"
    f" ended_at = ? WHERE id = ? AND {READ_VERSION} = ?"
)
_EPOCH: Final = "SELECT epoch FROM root_epochs WHERE root = ?"
_BUMP: Final = (
    "INSERT INTO root_epochs (root, epoch) VALUES (?, 1) ON CONFLICT (root) DO UPDATE SET epoch = root_epochs.epoch + 1"
)
KEPT_PARSED: Final = 4_096
"""Tasks, authorities and delegations kept parsed per connection: the busy ones are read again and again."""
NO_HISTORY: Final = "[]"


class TaskReading(SqlTables):
    """Reads tasks."""

    def __init__(self, sql: Sql) -> None:
        """Start with nothing parsed."""
        super().__init__(sql)
        self._known: dict[str, Task] = {}
        self._tasks: Remembered[Row, Task] = Remembered(self._read, KEPT_PARSED)
        self._authority: Remembered[str, Authority] = Remembered(Authority.parse, KEPT_PARSED)
        self._delegation: Remembered[str, Delegation] = Remembered(_read_delegation, KEPT_PARSED)

    def task(self, task_id: str) -> Task | None:
        """Give one task, or None."""
        # Every write raises the version, so that one version of one task has one content: parse it once.
        known = self._known.get(task_id)
        if known is not None and self._sql.row(_VERSION, (task_id,)) == (known.version,):
            return known
        row = self._sql.row(_ONE, (task_id,))
        if row is None:
            return None
        if len(self._known) >= KEPT_PARSED:
            self._known.clear()
        task = self._known[task_id] = self._read(row)
        return task

    def forget_parsed(self) -> None:
        """Forget parsed tasks: a rollback took a version back, and the next one of that number may be another."""
        self._known.clear()

    def lineage(self, task_id: str) -> tuple[Task, ...]:
        """Give the task and its ancestors, root first; empty when it is unknown."""
        rows = self._sql.ask(_ONE, (task_id,))
        if not rows:
            return ()
        task = self._tasks.read(rows[0])
        # A root has nobody above it, which most tasks are: the walk is dearer than the look.
        return (task,) if task.parent is None else tuple(map(self._tasks.read, self._sql.ask(_UP, (task_id,))))

    def subtree(self, task_id: str) -> tuple[Task, ...]:
        """Give the task and all its descendants, by depth; empty when it is unknown."""
        return tuple(self._read(row) for row in self._sql.rows(_DOWN, (task_id,)))

    def tasks_of_session(self, session_id: str) -> tuple[Task, ...]:
        """Give the tasks of a workload session that have not ended, oldest first."""
        return tuple(self._read(row) for row in self._sql.rows(_OF_SESSION, (session_id,)))

    def overdue_tasks(self, now: datetime, limit: int) -> tuple[Task, ...]:
        """Give up to ``limit`` tasks whose time is over and whose row does not say so yet, the longest overdue first."""
        return tuple(self._read(row) for row in self._sql.rows(_OVERDUE, (micros(now), limit)))

    def earliest_end(self) -> datetime | None:
        """Give when the time of a living task is over next (or was); None where none lives."""
        row = self._sql.row(_EARLIEST, ())
        return None if row is None else moment(row[0])

    def list_tasks(self, wanted: TaskFilter, *, after: str | None = None, limit: int = 100) -> TaskPage:
        """Give a page, oldest first; Invalid(code="invalid_page_token") for a token that is not ours."""
        size = max(1, min(limit, MAX_PAGE))
        text, values = _LIST, list[Value](place_after(after))
        for condition, value in _conditions(wanted):
            text += f" AND {condition}"
            values += value
        # One more than asked for tells whether there is a next page.
        rows = self._sql.rows(text + _IN_ORDER, (*values, size + 1))
        tasks = tuple(self._read(row) for row in rows[:size])
        return TaskPage(tasks, place_of(tasks[-1].created_at, tasks[-1].id) if len(rows) > size else None)

    def root_epoch(self, root: str) -> int:
        """Give the epoch of a task tree; 0 until the first end in it."""
        row = self._sql.row(_EPOCH, (root,))
        return 0 if row is None else int(row[0])

    def _read(self, row: Row) -> Task:
        return Task(
            id=row[0],
            root=row[1],
            parent=row[2],
            depth=row[3],
            user=row[4],
            agent=SpiffeId(row[5]),
            session=row[6],
            purpose=row[7],
            authority=self._authority.read(row[8]),
            delegation=self._delegation.read(row[9]),
            created_at=moment(row[10]),
            expires_at=moment(row[11]),
            supervision=Supervision(row[12]),
            state=State(row[13]),
            version=row[14],
            epoch=row[15],
            cause=None if row[16] is None else Cause(row[16]),
            ended_at=moment_or_none(row[17]),
            supersedes=row[18],
            history=() if row[19] == NO_HISTORY else _read_history(row[19]),
        )


class TaskWriting(TaskReading, TreeEnding):
    """Writes tasks."""

    def add_task(self, task: Task) -> None:
        """Add; Conflict(code="task_exists"), NotFound when its parent or root is unknown."""
        try:
            self._sql.attempt(_ADD, _values(task))
        except Duplicate:
            raise Conflict("a task with this id exists already", code="task_exists") from None
        except Dangling:
            raise NotFound("there is no such parent task") from None

    def replace_task(self, task: Task, expected_version: int) -> None:
        """Write what may change; NotFound, or Conflict(code="stale_version")."""
        if task.version <= expected_version:
            raise ValueError("a changed task has a higher version")
        values = (
            task.session,
            micros(task.expires_at),
            task.supervision,
            task.state,
            task.version,
            task.epoch,
            task.cause,
            micros_or_none(task.ended_at),
        )
        if self._sql.run(_REPLACE, (*values, task.id, expected_version)):
            return
        if self._sql.row(_ONE, (task.id,)) is None:
            raise NotFound("there is no such task")
        raise Conflict("the task has changed since it was read", code="stale_version", hint="read it again")

    def bump_epoch(self, root: str) -> int:
        """Raise a tree's epoch by one and give it."""
        try:
            self._sql.attempt(_BUMP, (root,))
        except Dangling:
            raise NotFound("there is no such task") from None
        return self.root_epoch(root)


def _conditions(wanted: TaskFilter) -> list[tuple[str, list[Value]]]:
    conditions: list[tuple[str, list[Value]]] = []
    if wanted.live:
        conditions.append((LIVING, []))
    if wanted.state is not None:
        conditions.append((f"{READ_STATE} = ?", [wanted.state]))
    if wanted.user is not None:
        conditions.append(("user_id = ?", [wanted.user]))
    if wanted.agent is not None:
        conditions.append(("agent = ?", [str(wanted.agent)]))
    if wanted.root is not None:
        conditions.append(("root = ?", [wanted.root]))
    if wanted.parent is not None:
        conditions.append(("parent = ?", [wanted.parent]))
    return conditions


def _values(task: Task) -> tuple[Value, ...]:
    return (
        task.id,
        task.root,
        task.parent,
        task.depth,
        task.user,
        str(task.agent),
        task.session,
        task.purpose,
        task.authority.text(),
        strictjson.canonical(task.delegation.to_json()).decode(),
        micros(task.created_at),
        micros(task.expires_at),
        task.supervision,
        task.state,
        task.version,
        task.epoch,
        task.cause,
        micros_or_none(task.ended_at),
        task.supersedes,
        strictjson.canonical([str(agent) for agent in task.history]).decode() if task.history else NO_HISTORY,
    )


def _read_history(stored: str) -> tuple[SpiffeId, ...]:
    value = strictjson.loads(stored.encode())
    assert isinstance(value, list)
    return tuple(SpiffeId(str(agent)) for agent in value)


def _read_delegation(stored: str) -> Delegation:
    return Delegation.parse(strictjson.loads(stored.encode()))
