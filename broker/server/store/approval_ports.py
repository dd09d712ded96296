"""The port of the store for approvals; composed in :mod:`broker.server.store.ports`."""

from dataclasses import dataclass
from datetime import datetime
from typing import Protocol

from broker.tasks.approval import Approval, ApprovalState


@dataclass(frozen=True, slots=True, kw_only=True)
class ApprovalFilter:
    """Which approvals are looked for; what is empty does not narrow.

    ``state`` is the one that counts at ``now``, so that ``pending`` leaves out what nobody decided in time.
    """

    now: datetime
    state: ApprovalState | None = None
    user: str = ""
    task: str = ""


@dataclass(frozen=True, slots=True)
class ApprovalPage:
    """Approvals, oldest first; ``next`` is the token of the following page, None at the end."""

    approvals: tuple[Approval, ...]
    next: str | None


class ApprovalReads(Protocol):
    """Approvals, read."""

    def approval(self, approval_id: str) -> Approval | None:
        """Give one, or None."""
        ...

    def latest_approval(self, task: str, digest: str) -> Approval | None:
        """Give the one that a task asked for last of just this, or None."""
        ...

    def approval_of_token(self, jti: str) -> Approval | None:
        """Give the one that a token was issued on, or None."""
        ...

    def count_approvals(self, task: str) -> int:
        """Tell how many a task ever asked for."""
        ...

    def list_approvals(self, wanted: ApprovalFilter, *, after: str | None = None, limit: int = 100) -> ApprovalPage:
        """Give a page, oldest first; Invalid(code="invalid_page_token") for a token not ours."""
        ...


class ApprovalWrites(ApprovalReads, Protocol):
    """Approvals, written."""

    def add_approval(self, approval: Approval) -> None:
        """Add; Conflict(code="approval_exists") where one of its id, or an open one for the same, is there."""
        ...

    def replace_approval(self, approval: Approval, *, was: ApprovalState) -> None:
        """Write what became of one; Conflict(code="conflict") where it does not stand as it ``was``."""
        ...
