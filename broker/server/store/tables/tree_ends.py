"""How large trees end: one row for all their tasks at once, and afterwards, some at a time, the row of each.

To write ten thousand rows takes longer than an end may. So the end of a large tree is one row of ``tree_ends``, in the transaction
that ended its root. Whoever reads a task reads it through that row (``TASKS_AS_READ``, ``READ_…``); whoever looks for tasks that
live looks for ``LIVING``. What is read is what is written later, to the microsecond: nobody can tell when that was. Nothing
comes into a tree whose root has ended, so that what the row covers only becomes less.
"""

# ruff: noqa: S608 - the texts are put together from constants of this module only

from datetime import datetime
from typing import Final

from broker.server.store.sql import SqlTables, Value, micros
from broker.tasks.causes import Cause
from broker.tasks.task import State

WRITTEN_AT_ONCE: Final = 500
"""Most tasks below a root whose rows are written with its end: some milliseconds. Of more, one row tells first."""

LIVING: Final = "ended_at IS NULL AND root NOT IN (SELECT tree FROM tree_ends)"
"""That a task has no end, neither of its own nor with its tree."""
TASKS_AS_READ: Final = "FROM tasks LEFT JOIN tree_ends ON tree = root AND ended_at IS NULL"
"""Tasks beside the end that counts for them while their rows do not tell; ``READ_…`` are their columns."""
READ_STATE: Final = f"CASE WHEN tree IS NULL THEN state WHEN expires_at <= tree_ended_at THEN '{State.EXPIRED}' ELSE '{State.CASCADED}' END"
READ_CAUSE: Final = (
    f"CASE WHEN tree IS NULL THEN cause WHEN expires_at <= tree_ended_at THEN '{Cause.EXPIRED}' ELSE tree_cause END"
)
READ_ENDED_AT: Final = (
    "CASE WHEN tree IS NULL THEN ended_at WHEN expires_at <= tree_ended_at THEN expires_at"
    " WHEN created_at > tree_ended_at THEN created_at ELSE tree_ended_at END"
)
READ_VERSION: Final = "version + CASE WHEN ended_at IS NULL AND root IN (SELECT tree FROM tree_ends) THEN 1 ELSE 0 END"
"""Also without ``TASKS_AS_READ``."""

# The same cases as in tasks.task.end, for many rows in one statement.
_END: Final = (
    "UPDATE tasks SET version = version + 1,"
    " state = CASE WHEN expires_at <= ? THEN ? ELSE ? END,"
    " cause = CASE WHEN expires_at <= ? THEN ? ELSE ? END,"
    " ended_at = CASE WHEN expires_at <= ? THEN expires_at WHEN created_at > ? THEN created_at ELSE ? END"
)
WALK_DOWN: Final = (
    "WITH RECURSIVE below (id) AS (SELECT id FROM tasks WHERE id = ?"
    " UNION ALL SELECT t.id FROM tasks t JOIN below ON t.parent = below.id)"
)
"""The ids of a task and of all below it, as ``below``."""
_END_BELOW: Final = f"{_END} WHERE {LIVING} AND id <> ? AND id IN ({WALK_DOWN} SELECT id FROM below)"
_END_BELOW_ROOT: Final = f"{_END} WHERE {LIVING} AND id <> ? AND root = ?"
_END_SOME: Final = f"{_END} WHERE id IN (SELECT id FROM tasks WHERE root = ? AND ended_at IS NULL LIMIT ?)"
_ROOT: Final = "SELECT ended_at FROM tasks WHERE id = ? AND depth = 0"
_BELOW: Final = f"SELECT count(*) FROM tasks WHERE root = ? AND depth > 0 AND {LIVING}"
_ADD: Final = "INSERT INTO tree_ends (tree, tree_ended_at, tree_cause) VALUES (?, ?, ?)"
_WAITING: Final = "SELECT tree, tree_ended_at, tree_cause FROM tree_ends ORDER BY tree_ended_at, tree"
_DONE: Final = "DELETE FROM tree_ends WHERE tree = ?"


class TreeEnding(SqlTables):
    """Ends what is below a task."""

    def cascade(self, task_id: str, cause: Cause, at: datetime) -> int:
        """End all living descendants of a task (not itself) as ``cascaded``, or expired if overdue; give their number."""
        end = _end(cause, micros(at))
        root = self._sql.row(_ROOT, (task_id,))
        if root is None:
            return self._sql.run(_END_BELOW, (*end, task_id, task_id))
        below = self._sql.row(_BELOW, (task_id,))
        assert below is not None
        # Below a root that lives, another task may still begin: it is not for the tree's end to cover.
        if root[0] is not None and below[0] > WRITTEN_AT_ONCE:
            self._sql.run(_ADD, (task_id, micros(at), cause))
            return int(below[0])
        # What is below a root is its whole tree: no need to walk it.
        return self._sql.run(_END_BELOW_ROOT, (*end, task_id, task_id))

    def write_tree_ends(self, limit: int) -> int:
        """Write into up to ``limit`` rows what is read of them already; give their number."""
        left = limit
        for tree, at, cause in self._sql.rows(_WAITING):
            written = self._sql.run(_END_SOME, (*_end(Cause(cause), at), tree, left))
            if written < left:
                self._sql.run(_DONE, (tree,))
            left -= written
            if not left:
                break
        return limit - left


def _end(cause: Cause, at: int) -> tuple[Value, ...]:
    return (at, State.EXPIRED, State.CASCADED, at, Cause.EXPIRED, cause, at, at, at)
