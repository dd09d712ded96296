"""A stop: from some moment on, what was given before counts no more. Of several stops the most restrictive counts.

Responsible for what a stop forbids, and for how stops add up: no later word of one source takes back another's, and a stop
never moves back in time. What was given is judged by the clock of who gave it (the identity provider's, in ``not_before``),
our own tokens by ours (``tokens_from``). Stores and tells nobody.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import datetime
from enum import StrEnum
from typing import Final

from broker.errors import Invalid, Refused, Unavailable
from broker.tasks.causes import Cause
from broker.tasks.delegation import Delegation

MAX_NAME: Final = 4096
"""Longest name of what is stopped, in characters: an issuer and a session, or a SPIFFE ID."""


class StopKind(StrEnum):
    """What a stop is of; its ``name`` says which. The value is stable."""

    USER = "user"
    """A user, whole: every word of theirs, standing delegations too."""
    SESSIONS = "sessions"
    """The sessions that a user had until then."""
    SESSIONLESS = "sessionless"
    """What a user gave until then in tokens that name no session: which of them was meant cannot be told."""
    SESSION = "session"
    """One session of a user (:func:`session_name`)."""
    DELEGATION = "delegation"
    """One standing delegation."""
    AGENT = "agent"
    """What one workload (SPIFFE ID) does now."""
    AUDIENCE = "audience"
    """What is done now at one service."""


OPERATOR: Final = "operator"
"""The source of a stop that a person of the platform team set; others are issuers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    """One stop of one source; raises Invalid.

    ``not_before``: what users gave before does not count. ``tokens_from`` (seconds since 1970): a task token that was issued
    before is dead; 0 where none is. ``disabled``: nothing counts, whenever it was given. ``unfinished``: tasks that it ends
    may not be written down yet.
    """

    kind: StopKind
    name: str
    source: str
    not_before: datetime
    cause: Cause
    changed_at: datetime
    tokens_from: int = 0
    disabled: bool = False
    unfinished: bool = False

    def __post_init__(self) -> None:
        """Check each field."""
        if not self.name or len(self.name) > MAX_NAME or not self.source:
            raise Invalid("a stop has no name or source, or too long a one", code="invalid_stop")
        if self.not_before.tzinfo is None or self.changed_at.tzinfo is None:
            raise Invalid("a time of the stop has no time zone", code="invalid_stop")

    def after(self, before: "Stop | None") -> "Stop":
        """Give what stands once this was set over an earlier stop of the same source: times only grow."""
        if before is None:
            return self
        return replace(
            self,
            not_before=max(self.not_before, before.not_before),
            tokens_from=max(self.tokens_from, before.tokens_from),
            disabled=self.disabled or before.disabled,
            unfinished=self.unfinished or before.unfinished,
        )


def session_name(issuer: str, session: str) -> str:
    """Name a user's session: sessions of two issuers are never the same. An issuer has no space in it."""
    return f"{issuer} {session}"


def names_of(delegation: Delegation) -> tuple[tuple[StopKind, str], ...]:
    """Give the stops that can concern a delegation."""
    names = [(StopKind.USER, delegation.user)]
    if delegation.standing is not None:
        return (*names, (StopKind.DELEGATION, delegation.standing))
    names.append((StopKind.SESSIONS, delegation.user))
    if delegation.session is not None:
        names.append((StopKind.SESSION, session_name(delegation.issuer, delegation.session)))
    else:
        names.append((StopKind.SESSIONLESS, delegation.user))
    return tuple(names)


def require_going(stops: Iterable[Stop], delegation: Delegation, now: datetime) -> None:
    """Refuse what a stop forbids: to act on this delegation, or to issue a token that would be dead at once.

    ``stops`` are those of the delegation's names, and of the agent and audience concerned. Raises Refused (``user_disabled``,
    ``user_ended``, ``user_session_ended``, ``delegation_withdrawn``), Unavailable (``stopped_just_now``).
    """
    seconds = int(now.timestamp())
    for stop in stops:
        if _forbids(stop, delegation):
            raise _refusal(stop)
        if seconds < stop.tokens_from:
            raise Unavailable(
                "what was issued until now was stopped a moment ago",
                code="stopped_just_now",
                hint="ask again in a second",
            )


def concerns(stop: Stop, delegation: Delegation) -> bool:
    """Tell whether a task of this delegation ends by the stop. Agents and audiences are not the delegation's matter."""
    match stop.kind:
        case StopKind.AGENT | StopKind.AUDIENCE:
            return True
        case StopKind.USER:
            # Whole: also what was started on a word of the last second, by an issuer whose clock is ahead.
            return stop.name == delegation.user
        case _:
            return (stop.kind, stop.name) in names_of(delegation) and _forbids(stop, delegation)


def _forbids(stop: Stop, delegation: Delegation) -> bool:
    match stop.kind:
        case StopKind.SESSION | StopKind.DELEGATION:
            return True
        case StopKind.USER | StopKind.SESSIONS | StopKind.SESSIONLESS:
            # A word whose time is not known was given before everything.
            return stop.disabled or delegation.given_at is None or delegation.given_at < stop.not_before
        case StopKind.AGENT | StopKind.AUDIENCE:
            return False


def _refusal(stop: Stop) -> Refused:
    if stop.kind is StopKind.DELEGATION:
        return Refused("the delegation was withdrawn", code="delegation_withdrawn", hint="ask the user for a new one")
    if stop.disabled:
        return Refused(
            "the user is disabled", code="user_disabled", hint="an operator or the issuer enables them again"
        )
    if stop.kind is StopKind.USER:
        return Refused("the user's word was ended", code="user_ended", hint="the user signs in anew")
    return Refused("the user's session has ended", code="user_session_ended", hint="the user signs in anew")
