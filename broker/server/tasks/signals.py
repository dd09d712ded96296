"""Signals: what identity providers say of their users, beside tokens. Judged strictly, taken in once, in one transaction.

A logout token (OpenID Connect Back-Channel Logout 1.0 §2.4, §2.6) and a security event token (RFC 8417, profile of SSF 1.0)
are kinds of their own: each is known by its ``typ`` and ``events``, and neither is ever a user's token. An issuer speaks of its
own users only. The same signal, told again, changes nothing, whichever server hears it.
"""

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final

from broker.clock import Clock
from broker.errors import BrokerError, InvalidToken, Unavailable
from broker.server.store.ports import Store, Writer
from broker.server.tasks import user_records
from broker.server.tasks.config import SubjectIssuer, Transmitter
from broker.server.tasks.issuer_keys import IssuerKeys
from broker.server.tasks.refusals import Refusals
from broker.server.tasks.signal_subjects import Named, read_subject, short
from broker.server.tasks.stops import Stops
from broker.server.tasks.subjects import LEEWAY, MAX_AUDIENCES, Subjects
from broker.server.tasks.users import Act, Effect, Outcome, Word, take
from broker.spiffe import jose
from broker.spiffe.jose import UnverifiedJws
from broker.spiffe.strictjson import JsonValue

LOGOUT_TYPE: Final = "logout+jwt"
LOGOUT_EVENT: Final = "http://schemas.openid.net/event/backchannel-logout"
SET_TYPE: Final = "secevent+jwt"
MAX_LOGOUT_LIFE: Final = 3600
"""Seconds that a logout token may be good for: the standard advises two minutes, and its ``jti`` is kept for so long."""
MAX_SET_AGE: Final = 7 * 86400
"""Seconds after which a security event is no longer taken in: a transmitter that was away for a week starts anew."""

MAX_KIND: Final = 512
"""Longest name of an event, in characters: they are addresses."""

_CAEP: Final = "https://schemas.openid.net/secevent/caep/event-type/"
_RISC: Final = "https://schemas.openid.net/secevent/risc/event-type/"
_SSF: Final = "https://schemas.openid.net/secevent/ssf/event-type/"
VERIFICATION: Final = _SSF + "verification"
ASSURANCE: Final = _CAEP + "assurance-level-change"
ACTS: Final[Mapping[str, Act]] = {
    _CAEP + "session-revoked": Act.LOGOUT,
    _CAEP + "credential-change": Act.CHANGED,
    _CAEP + "token-claims-change": Act.CHANGED,
    ASSURANCE: Act.CHANGED,
    _RISC + "credential-compromise": Act.CHANGED,
    _RISC + "sessions-revoked": Act.LOGOUT,
    _RISC + "account-disabled": Act.DISABLED,
    _RISC + "account-purged": Act.PURGED,
    _RISC + "account-enabled": Act.ENABLED,
}
"""The events that do something here; others are acknowledged."""

# A sign-in in the very second of the event may have come before it.
_SECOND: Final = timedelta(seconds=1)
_DONE: Final = "done"


@dataclass(frozen=True, slots=True)
class Signal:
    """A signal whose signature and form hold: who says it, its ``jti``, until when that is kept, and the word, if any."""

    source: str
    kind: str
    jti: str
    forget_at: datetime
    word: Word | None


class LogoutTokens:
    """Judges logout tokens of the issuers whose users we know."""

    def __init__(self, subjects: Subjects, clock: Clock) -> None:
        self._subjects = subjects
        self._clock = clock

    async def verify(self, token: str) -> Signal:
        """Judge one; raises InvalidToken, Unavailable. May ask the issuer for its keys."""
        jws = jose.parse_compact(token)
        _require_type(jws, LOGOUT_TYPE)
        name = jws.payload.get("iss")
        issuer = self._subjects.issuer(name) if isinstance(name, str) else None
        if issuer is None:
            raise _invalid("its issuer is not trusted here", "signal_issuer")
        key = await self._subjects.find_key(issuer.issuer, jws.kid)
        jose.verify_signature(jws, key.key, key.algorithm)
        return _judge_logout(jws.payload, issuer, int(self._clock.now().timestamp()))


def _judge_logout(payload: Mapping[str, JsonValue], issuer: SubjectIssuer, now: int) -> Signal:
    _require_audience(payload, issuer.audiences | issuer.clients)
    issued_at = jose.numeric_date(payload, "iat", required=True)
    expires_at = jose.numeric_date(payload, "exp", required=True)
    if not issued_at <= now + LEEWAY or not issued_at < expires_at <= issued_at + MAX_LOGOUT_LIFE:
        raise _invalid("its times do not fit", "signal_times")
    if now > expires_at + LEEWAY:
        raise _invalid("it has expired", "signal_expired")
    if "nonce" in payload:
        raise _invalid("it has a nonce, as an ID token has", "signal_claims")
    events = payload.get("events")
    # Back-Channel Logout §2.4: the event's object should be empty, and need not be. A second event would be passed over: refused.
    if not isinstance(events, dict) or events.keys() != {LOGOUT_EVENT} or not isinstance(events[LOGOUT_EVENT], dict):
        raise _invalid("its events are not exactly the logout", "signal_event")
    sub, sid = short(payload, "sub"), short(payload, "sid")
    if sub is None and sid is None:
        raise _invalid("it names neither a user nor a session", "signal_subject")
    user = "" if sub is None else issuer.namespace + sub
    at = datetime.fromtimestamp(issued_at, UTC) + _SECOND
    word = Word(Act.LOGOUT, issuer.issuer, issuer.issuer, user, sid or "", at)
    forget_at = datetime.fromtimestamp(expires_at + 2 * LEEWAY, UTC)
    return Signal(issuer.issuer, "logout", _jti(payload), forget_at, word)


class SecurityEvents:
    """Judges security event tokens of the configured transmitters. Close it with :meth:`aclose`."""

    def __init__(self, transmitters: Iterable[Transmitter], subjects: Subjects, clock: Clock) -> None:
        """Prepare one guarded client for each transmitter; raises Misconfigured."""
        self._subjects = subjects
        self._clock = clock
        self._known = {
            one.issuer: (one, IssuerKeys(one, clock, discovery=one.discovery, address=one.jwks_url))
            for one in transmitters
        }

    @property
    def transmitters(self) -> tuple[Transmitter, ...]:
        """All that are configured."""
        return tuple(one for one, _ in self._known.values())

    async def aclose(self) -> None:
        """Close the connections to the transmitters."""
        for _, keys in self._known.values():
            await keys.aclose()

    async def verify(self, token: str, *, only: str = "") -> Signal:
        """Judge one, of one transmitter only where it was fetched there; raises InvalidToken, Unavailable."""
        jws = jose.parse_compact(token)
        _require_type(jws, SET_TYPE)
        name = jws.payload.get("iss")
        known = self._known.get(name) if isinstance(name, str) else None
        if known is None or (only and name != only):
            raise _invalid("its issuer is not a transmitter that is heard here", "signal_issuer")
        transmitter, keys = known
        try:
            key = await keys.find(jws.kid)
            jose.verify_signature(jws, key.key, key.algorithm)
        except InvalidToken:
            raise _invalid("no key of its issuer has signed it", "signal_key") from None
        return self._judge(jws.payload, transmitter)

    def _judge(self, payload: Mapping[str, JsonValue], transmitter: Transmitter) -> Signal:
        now = int(self._clock.now().timestamp())
        _require_audience(payload, transmitter.audiences)
        if "sub" in payload or "exp" in payload:
            # SSF 1.0 §9.1, §9.2: what an ID token must have, a security event must not.
            raise _invalid("it has a claim sub or exp", "signal_claims")
        issued_at = jose.numeric_date(payload, "iat", required=True)
        if not now - MAX_SET_AGE <= issued_at <= now + LEEWAY:
            raise _invalid("it is too old, or of the future", "signal_times")
        events = payload.get("events")
        if not isinstance(events, dict) or len(events) != 1:
            raise _invalid("it does not hold exactly one event", "signal_event")
        ((kind, event),) = events.items()
        if not isinstance(event, dict) or len(kind) > MAX_KIND:
            raise _invalid("its event is not an object", "signal_event")
        forget_at = datetime.fromtimestamp(issued_at + MAX_SET_AGE + 2 * LEEWAY, UTC)
        # CAEP 1.0 §3.4: what was given on less still counts when the level rises.
        act = None if event.get("change_direction") == "increase" and kind == ASSURANCE else ACTS.get(kind)
        word = None if act is None else self._word(act, payload, event, transmitter, issued_at)
        return Signal(transmitter.issuer, kind.rpartition("/")[2] or kind, _jti(payload), forget_at, word)

    def _word(
        self,
        act: Act,
        payload: Mapping[str, JsonValue],
        event: Mapping[str, JsonValue],
        transmitter: Transmitter,
        issued_at: int,
    ) -> Word:
        issuer = self._subjects.issuer(transmitter.subject_issuer)
        if issuer is None:
            raise _invalid("its issuer speaks of nobody who is known here", "signal_subject")
        named: Named = read_subject(payload.get("sub_id"), issuer.issuer)
        happened = jose.numeric_date(event, "event_timestamp", required=False)
        if happened is not None and happened > issued_at + LEEWAY:
            raise _invalid("its event happens later than it is told", "signal_times")
        if act not in (Act.LOGOUT, Act.CHANGED) and not named.user:
            raise _invalid("it is of an account and names no user", "signal_subject")
        at = datetime.fromtimestamp(issued_at if happened is None else happened, UTC)
        if act is not Act.ENABLED:
            at += _SECOND
        user = issuer.namespace + named.user if named.user else ""
        return Word(act, transmitter.issuer, issuer.issuer, user, named.session, at)


class Signals:
    """Takes verified signals in, once each."""

    def __init__(self, store: Store, clock: Clock, stops: Stops, refusals: Refusals) -> None:
        self._store = store
        self._clock = clock
        self._stops = stops
        self._refusals = refusals

    async def take(self, signal: Signal) -> Outcome:
        """Take one in; InvalidToken(code="signal_replayed") when it was taken in before, here or elsewhere."""

        def act(writer: Writer, now: datetime) -> Outcome:
            owner, key = f"signal {signal.source}", hashlib.sha256(signal.jti.encode()).hexdigest()
            if writer.recall(owner, key, _DONE) is not None:
                raise _invalid("it was taken in before", "signal_replayed")
            writer.remember(owner, key, _DONE, "", signal.forget_at)
            word = signal.word
            outcome = Outcome(Effect.NONE) if word is None else take(writer, word, now)
            user, session = ("", "") if word is None else (word.user, word.session)
            taken = user_records.signal_received(
                signal.source,
                signal.kind,
                signal.jti,
                user=user,
                session=session,
                effect=outcome.effect.value,
                at=now,
            )
            writer.record(taken)
            return outcome

        outcome = await self._store.write(lambda writer: act(writer, self._clock.now()))
        if outcome.stopped:
            await self._stops.finished(*outcome.stopped)
        return outcome

    async def refused(self, door: str, error: BrokerError, issuer: str = "") -> None:
        """Record that a signal was refused, at a bounded rate."""
        if isinstance(error, Unavailable):
            return
        now = self._clock.now()
        await self._refusals.note(
            lambda left_out: user_records.signal_refused(door, error.reason, issuer, left_out, now)
        )


def _require_type(jws: UnverifiedJws, wanted: str) -> None:
    typ = jws.typ
    # RFC 8725 §3.11: a type without a slash stands for application/….
    if typ is None or not typ.isascii() or typ.lower().removeprefix("application/") != wanted:
        raise _invalid(f"its type is not {wanted}", "signal_type")


def _require_audience(payload: Mapping[str, JsonValue], ours: frozenset[str]) -> None:
    aud = payload.get("aud")
    audiences = [aud] if isinstance(aud, str) else aud
    if not isinstance(audiences, list) or not 0 < len(audiences) <= MAX_AUDIENCES:
        raise _invalid("it has no audience", "signal_audience")
    if not any(isinstance(one, str) and one in ours for one in audiences):
        raise _invalid("it is not meant for this broker", "signal_audience")


def _jti(payload: Mapping[str, JsonValue]) -> str:
    jti = short(payload, "jti")
    if jti is None:
        raise _invalid("it has no jti", "signal_jti")
    return jti


def _invalid(why: str, code: str) -> InvalidToken:
    return InvalidToken(f"the signal is refused: {why}", code=code)
