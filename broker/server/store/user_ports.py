"""The port of the store for what ends by its user; composed in :mod:`broker.server.store.ports`."""

from collections.abc import Sequence
from datetime import datetime
from typing import Protocol

from broker.server.store.user_rows import DelegationPage, LivingPage, LivingTasks, UserLease, UserSession
from broker.tasks.causes import Cause
from broker.tasks.standing import StandingDelegation
from broker.tasks.stop import Stop, StopKind


class UserReads(Protocol):
    """Stops, users' sessions and standing delegations, read."""

    def stops(self, names: Sequence[tuple[StopKind, str]]) -> tuple[Stop, ...]:
        """Give the stops of these names, of every source."""
        ...

    def unfinished_stops(self, limit: int) -> tuple[Stop, ...]:
        """Give stops whose tasks may not all be written down as ended, the longest waiting first."""
        ...

    def user_sessions(self, issuer: str, sid: str) -> tuple[UserSession, ...]:
        """Give the sessions of this id: one, unless the issuer gave it to several users."""
        ...

    def user_session(self, issuer: str, sid: str, user: str) -> UserSession | None:
        """Give one session, or None."""
        ...

    def silent_user_sessions(self, issuer: str, until: datetime, limit: int) -> tuple[UserSession, ...]:
        """Give sessions that were last confirmed at ``until`` or before and are not written as lapsed, the longest silent first."""
        ...

    def returning_user_sessions(self, issuer: str, since: datetime, limit: int) -> tuple[UserSession, ...]:
        """Give sessions that are written as returning and were confirmed after ``since``."""
        ...

    def living_tasks(self, wanted: LivingTasks, *, after: str | None = None, limit: int) -> LivingPage:
        """Give a page of tasks that have not ended, oldest first; Invalid for a search without a limit."""
        ...

    def has_tasks(self, user: str, count: int) -> bool:
        """Tell whether at least so many tasks of a user live."""
        ...

    def delegation(self, delegation_id: str) -> StandingDelegation | None:
        """Give one standing delegation, or None."""
        ...

    def list_delegations(self, user: str | None, *, after: str | None = None, limit: int = 100) -> DelegationPage:
        """Give a page, of one user or of all, oldest first; Invalid(code="invalid_page_token") for a token not ours."""
        ...

    def standing_of(self, user: str) -> tuple[StandingDelegation, ...]:
        """Give those of one user that were not withdrawn."""
        ...


class UserWrites(UserReads, Protocol):
    """Stops, users' sessions and standing delegations, written."""

    def put_stop(self, stop: Stop) -> Stop:
        """Add, or add up with the one of the same kind, name and source (:meth:`Stop.after`); give what stands then."""
        ...

    def lift_stop(self, stop: Stop, at: datetime) -> Stop:
        """Take back that a stop disables; what was given before ``at`` still does not count. Give what stands then."""
        ...

    def finish_stop(self, stop: Stop) -> None:
        """Note that every task that the stop ends is written down."""
        ...

    def see_user_session(self, session: UserSession) -> None:
        """Note a session; its times only grow, and what is written of its lease stays."""
        ...

    def put_user_lease(self, session: UserSession, lease: UserLease) -> None:
        """Write what became of a session's tasks."""
        ...

    def end_tasks_of(self, user: str, cause: Cause, at: datetime, limit: int) -> int:
        """End up to ``limit`` living tasks of a user in one statement, as a cascade does; give their number.

        Roots end as ``revoked``, those below as ``cascaded``, overdue ones as ``expired``.
        """
        ...

    def add_delegation(self, delegation: StandingDelegation) -> None:
        """Add; Conflict(code="delegation_exists")."""
        ...

    def end_delegation(self, delegation_id: str, cause: Cause, at: datetime) -> StandingDelegation | None:
        """End and give it; None when it is unknown or had ended before."""
        ...
