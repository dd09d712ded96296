"""The port of the store for the life of tasks beyond their rows; composed in :mod:`broker.server.store.ports`."""

from datetime import datetime
from typing import Protocol

from broker.server.store.rows import ResumeRow


class LifeReads(Protocol):
    """Children and resumes, read."""

    def children_of(self, task_id: str) -> int:
        """Count the tasks that were started directly below one, living or not."""
        ...

    def open_children(self, task_id: str, agent: str) -> tuple[str, ...]:
        """Give the ids of a task's living children of one agent (its SPIFFE ID), oldest first."""
        ...

    def resumes_of(self, task_id: str, since: datetime | None = None) -> int:
        """Count how often a task was taken up again, at all or after ``since``."""
        ...


class LifeWrites(LifeReads, Protocol):
    """Children and resumes, written."""

    def add_resume(self, row: ResumeRow) -> None:
        """Note that a task was taken up again."""
        ...
