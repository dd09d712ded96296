"""Rows of what ends by its user, beside the rules' own types (``Stop``, ``StandingDelegation``)."""

from dataclasses import dataclass
from datetime import datetime

from broker.spiffe import SpiffeId
from broker.tasks.standing import StandingDelegation
from broker.tasks.task import Task


@dataclass(frozen=True, slots=True)
class UserSession:
    """A session that a user came from. ``sid`` is empty where the issuer tells none; ``confirmed_at`` is the issuer's time."""

    issuer: str
    sid: str
    user: str
    confirmed_at: datetime
    seen_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class LivingTasks:
    """Which living tasks are looked for; what is empty does not narrow, but something must.

    ``given`` are members of the delegation, as name and text; ``location`` begins a location of the authority.
    """

    user: str = ""
    agent: SpiffeId | None = None
    given: tuple[tuple[str, str], ...] = ()
    location: str = ""


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
