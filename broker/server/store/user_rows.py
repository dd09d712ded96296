"""Rows of what ends by its user, beside the rules' own types (``Stop``, ``StandingDelegation``)."""

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from broker.spiffe import SpiffeId
from broker.tasks.causes import Cause
from broker.tasks.standing import StandingDelegation
from broker.tasks.task import State, Task


class UserLease(StrEnum):
    """What became of the tasks of a session whose issuer's silence counts."""

    HELD = "held"
    LAPSED = "lapsed"
    """They are suspended: nothing was heard of the session for too long."""
    RETURNING = "returning"
    """It was heard of again: they are being let go on."""


@dataclass(frozen=True, slots=True)
class UserSession:
    """A session that a user came from. ``sid`` is empty where the issuer tells none; ``confirmed_at`` is the issuer's time."""

    issuer: str
    sid: str
    user: str
    confirmed_at: datetime
    seen_at: datetime
    lease: UserLease = UserLease.HELD


@dataclass(frozen=True, slots=True, kw_only=True)
class LivingTasks:
    """Which living tasks are looked for; what is empty does not narrow, but something must.

    ``given`` are members of the delegation, as name and text; ``location`` begins a location of the authority; ``roots`` leaves
    out what was started below another task. State and cause are as written.
    """

    user: str = ""
    agent: SpiffeId | None = None
    given: tuple[tuple[str, str], ...] = ()
    location: str = ""
    state: State | None = None
    cause: Cause | None = None
    roots: bool = False


@dataclass(frozen=True, slots=True)
class LivingPage:
    """Tasks that have not ended, oldest first; ``next`` is where the following page begins, None at the end."""

    tasks: tuple[Task, ...]
    next: str | None


@dataclass(frozen=True, slots=True)
class DelegationPage:
    """Standing delegations, oldest first; ``next`` is the token of the following page, None at the end."""

    delegations: tuple[StandingDelegation, ...]
    next: str | None
