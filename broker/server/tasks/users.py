"""Users, as operators and identity providers end them: disabled, enabled, signed out; and the operators' kill switches.

Each is one stop, set in one transaction (:mod:`broker.server.tasks.stops`). A source takes back only what it set itself, and
only by a newer word. A user who is disabled has no standing delegation that outlives it where the account is gone.
"""

from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from enum import StrEnum

from broker.clock import Clock
from broker.errors import Invalid
from broker.server.store.ports import Store, Writer
from broker.server.tasks import user_records
from broker.server.tasks.stops import Stopped, Stops, stop
from broker.server.tasks.subjects import LEEWAY
from broker.spiffe import SpiffeId
from broker.tasks import Cause, Resource
from broker.tasks.stop import OPERATOR, Stop, StopKind, session_name
from broker.tasks.texts import check_name, check_purpose


class Act(StrEnum):
    """What an identity provider says of one of its users. The value is stable: it stands in the audit log."""

    LOGOUT = "logout"
    DISABLED = "disabled"
    PURGED = "purged"
    ENABLED = "enabled"
    CHANGED = "changed"
    """Credentials or claims: the word given before does not count."""


class Effect(StrEnum):
    """What a signal did. The value is stable."""

    DONE = "done"
    STALE = "stale"
    """A newer word of the same source stands."""
    NONE = "none"
    """It asks for nothing."""


@dataclass(frozen=True, slots=True)
class Word:
    """What one source says of a user, or of one session: ``user`` is in our own namespace, ``at`` by the source's clock."""

    act: Act
    source: str
    issuer: str
    user: str
    session: str
    at: datetime


@dataclass(frozen=True, slots=True)
class Outcome:
    """What it did: the effect, and the stops that it set."""

    effect: Effect
    stopped: tuple[Stopped, ...] = ()


_CAUSES = {
    Act.LOGOUT: Cause.USER_LOGOUT,
    Act.DISABLED: Cause.USER_DISABLED,
    Act.PURGED: Cause.USER_DISABLED,
    Act.CHANGED: Cause.USER_CHANGED,
}


def take(writer: Writer, word: Word, now: datetime) -> Outcome:
    """Take one word in, within the caller's transaction."""
    if word.act is Act.ENABLED:
        return _enable(writer, word.user, word.source, word.at, by=word.source, now=now)
    if word.act in (Act.DISABLED, Act.PURGED):
        known = [each for each in writer.stops([(StopKind.USER, word.user)]) if each.source == word.source]
        if any(word.at < each.not_before and not each.disabled for each in known):
            # It was enabled again later: words come late, and never in the wrong order twice.
            return Outcome(Effect.STALE)
    if word.act is Act.PURGED:
        _end_delegations(writer, word.user, Cause.USER_DISABLED, by=word.source, now=now)
    wanted = [_stop_of(word, now)]
    if wanted[0].kind is StopKind.SESSION and word.user:
        # NOTE(security): a token without ``sid`` may be of that session, and nothing else would ever end what was given in it.
        wanted.append(replace(wanted[0], kind=StopKind.SESSIONLESS, name=word.user))
    return Outcome(Effect.DONE, tuple(stop(writer, each, by=word.source, now=now) for each in wanted))


def _stop_of(word: Word, now: datetime) -> Stop:
    if word.act in (Act.DISABLED, Act.PURGED):
        kind, name = StopKind.USER, word.user
    elif word.session:
        kind, name = StopKind.SESSION, session_name(word.issuer, word.session)
    else:
        kind, name = StopKind.SESSIONS, word.user
    return Stop(
        kind=kind,
        name=name,
        source=word.source,
        not_before=word.at,
        cause=_CAUSES[word.act],
        changed_at=now,
        disabled=kind is StopKind.USER,
    )


def _enable(
    writer: Writer, user: str, source: str, at: datetime, *, by: str, now: datetime, reason: str = ""
) -> Outcome:
    known = [each for each in writer.stops([(StopKind.USER, user)]) if each.source == source]
    if not known or not known[0].disabled:
        return Outcome(Effect.NONE)
    if source != OPERATOR and at < known[0].not_before:
        return Outcome(Effect.STALE)
    lifted = writer.lift_stop(known[0], at)
    writer.record(user_records.user_enabled(lifted, by, now, reason))
    return Outcome(Effect.DONE)


def _end_delegations(writer: Writer, user: str, cause: Cause, *, by: str, now: datetime, reason: str = "") -> int:
    ended = 0
    for each in writer.standing_of(user):
        over = writer.end_delegation(each.id, cause, now)
        if over is not None:
            writer.record(user_records.delegation_ended(over, by, now, reason))
            ended += 1
    return ended


class Users:
    """The operators' way: each names who says so, and why."""

    def __init__(self, store: Store, clock: Clock, stops: Stops) -> None:
        self._store = store
        self._clock = clock
        self._stops = stops

    async def disable(self, user: str, *, by: str, reason: str = "") -> Stopped:
        """Refuse everything that this user gave or gives, and end their tasks and standing delegations.

        Raises Invalid, Unavailable.
        """
        _check(user, reason)

        def act(writer: Writer, now: datetime) -> Stopped:
            _end_delegations(writer, user, Cause.USER_DISABLED, by=by, now=now, reason=reason)
            wanted = _by_operator(StopKind.USER, user, Cause.USER_DISABLED, now, disabled=True)
            return stop(writer, wanted, by=by, now=now, reason=reason)

        return await self._stops.run(act)

    async def enable(self, user: str, *, by: str, reason: str = "") -> Outcome:
        """Take back that an operator disabled the user. What an issuer disabled stays so; the user signs in anew."""
        _check(user, reason)

        def act(writer: Writer) -> Outcome:
            now = self._clock.now()
            return _enable(writer, user, OPERATOR, now, by=by, now=now, reason=reason)

        return await self._store.write(act)

    async def stop_user(self, user: str, *, by: str, reason: str = "") -> Stopped:
        """End all that a user gave until now: tasks, tokens, standing delegations. The user may sign in and give anew."""
        _check(user, reason)

        def act(writer: Writer, now: datetime) -> Stopped:
            _end_delegations(writer, user, Cause.OPERATOR, by=by, now=now, reason=reason)
            wanted = _by_operator(StopKind.USER, user, Cause.OPERATOR, now)
            return stop(writer, wanted, by=by, now=now, reason=reason)

        return await self._stops.run(act)

    async def stop_agent(self, agent: SpiffeId, *, by: str, reason: str = "") -> Stopped:
        """End all tasks and tokens of one workload. It may start new ones for as long as its entry says so."""
        _check(str(agent), reason, "agent")
        return await self._kill(StopKind.AGENT, str(agent), by=by, reason=reason)

    async def stop_audience(self, audience: Resource, *, by: str, reason: str = "") -> Stopped:
        """End every token for one service, and every task that may act there."""
        _check(audience.text, reason, "audience")
        return await self._kill(StopKind.AUDIENCE, audience.text, by=by, reason=reason)

    async def _kill(self, kind: StopKind, name: str, *, by: str, reason: str) -> Stopped:
        def act(writer: Writer, now: datetime) -> Stopped:
            return stop(writer, _by_operator(kind, name, Cause.OPERATOR, now), by=by, now=now, reason=reason)

        return await self._stops.run(act)


_AHEAD = timedelta(seconds=LEEWAY)
"""By which an issuer's clock may be ahead of ours: an operator's moment is later by it, so that no word slips through."""


def _by_operator(kind: StopKind, name: str, cause: Cause, now: datetime, *, disabled: bool = False) -> Stop:
    not_before = now + _AHEAD if kind is StopKind.USER else now
    return Stop(
        kind=kind,
        name=name,
        source=OPERATOR,
        not_before=not_before,
        cause=cause,
        changed_at=now,
        disabled=disabled,
    )


def _check(name: str, reason: str, what: str = "user") -> None:
    if not name:
        raise Invalid(f"the {what} is missing", code=f"{what}_missing")
    if what == "user":
        check_name(name, "user")
    if reason:
        check_purpose(reason)
