"""The port of the store for actions that are done once, and tokens for one use; composed in :mod:`broker.server.store.ports`."""

from datetime import datetime
from typing import Protocol

from broker.tasks.action import ActionRecord
from broker.tasks.resource import Resource


class ActionReads(Protocol):
    """Actions, read. States are as written: judge them with ``effective_action_state``."""

    def action(self, action_id: str) -> ActionRecord | None:
        """Give one action by the id of its claim, or None."""
        ...

    def action_at(self, task_id: str, audience: Resource, step: str) -> ActionRecord | None:
        """Give what is known of a step of a task at an audience, or None."""
        ...

    def actions_of(self, task_id: str) -> int:
        """Count the steps of a task that were claimed at all."""
        ...


class ActionWrites(ActionReads, Protocol):
    """Actions, written. Each write holds for all replicas: by constraint, not by memory."""

    def add_action(self, record: ActionRecord) -> None:
        """Add; Conflict(code="action_exists") when the id or the step is there, NotFound when its task is unknown."""
        ...

    def replace_action(self, record: ActionRecord, before: ActionRecord) -> None:
        """Write what became of an action, or who claims its step anew; Conflict(code="stale_action") when it is not as before.

        Which step of which task it is, and what that stands for, never changes.
        """
        ...

    def use_token(self, jti: str, task_id: str, at: datetime) -> None:
        """Use a token up that serves once; Refused(code="token_used") when it was used, NotFound when its task is unknown."""
        ...
