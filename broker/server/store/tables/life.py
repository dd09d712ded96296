"""The life of tasks beyond their rows: how many children each has, and how often each was taken up again."""

# ruff: noqa: S608 - the texts are put together from constants only

from datetime import datetime
from typing import Final

from broker.server.store.rows import ResumeRow
from broker.server.store.sql import SqlTables, micros
from broker.server.store.tables.tree_ends import LIVING

_CHILDREN: Final = "SELECT count(*) FROM tasks WHERE parent = ?"
_OPEN_CHILDREN: Final = f"SELECT id FROM tasks WHERE parent = ? AND agent = ? AND {LIVING} ORDER BY created_at, id"
_RESUMES: Final = "SELECT count(*) FROM task_resumes WHERE task_id = ?"
_RESUMES_SINCE: Final = "SELECT count(*) FROM task_resumes WHERE task_id = ? AND at > ?"
_ADD: Final = (
    "INSERT INTO task_resumes (task_id, number, at, session, resumed_from)"
    " SELECT ?, coalesce(max(number), 0) + 1, ?, ?, ? FROM task_resumes WHERE task_id = ?"
)


class LifeReading(SqlTables):
    """Reads them."""

    def children_of(self, task_id: str) -> int:
        """Count the tasks that were started directly below one, living or not."""
        return self._count(_CHILDREN, task_id)

    def open_children(self, task_id: str, agent: str) -> tuple[str, ...]:
        """Give the ids of a task's living children of one agent, oldest first."""
        return tuple(row[0] for row in self._sql.rows(_OPEN_CHILDREN, (task_id, agent)))

    def resumes_of(self, task_id: str, since: datetime | None = None) -> int:
        """Count how often a task was taken up again, at all or after ``since``."""
        if since is None:
            return self._count(_RESUMES, task_id)
        return self._count(_RESUMES_SINCE, task_id, micros(since))

    def _count(self, text: str, *values: str | int) -> int:
        row = self._sql.row(text, values)
        assert row is not None
        return int(row[0])


class LifeWriting(LifeReading):
    """Writes them."""

    def add_resume(self, row: ResumeRow) -> None:
        """Note that a task was taken up again."""
        self._sql.run(_ADD, (row.task_id, micros(row.at), row.session, row.resumed_from, row.task_id))
