"""A delegation: that a user let an agent act, as judged from the user's own token.

Responsible for keeping what was verified, and for its end. How a user's token is verified is not known here; the token
itself is never kept, only its hash. A bare user id is never a delegation.
"""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Self

from broker.errors import Invalid, Refused
from broker.spiffe.strictjson import JsonValue
from broker.tasks.texts import check_digest, check_issuer, check_name


@dataclass(frozen=True, slots=True, kw_only=True)
class Delegation:
    """A user's grant, from a verified token; raises Invalid. ``client`` is its ``azp``, ``session`` its ``sid``."""

    issuer: str
    user: str
    expires_at: datetime
    token_hash: str
    client: str | None = None
    session: str | None = None
    acr: str | None = None
    auth_time: datetime | None = None

    def __post_init__(self) -> None:
        check_issuer(self.issuer, "delegation's issuer")
        check_name(self.user, "user")
        check_digest(self.token_hash, "delegation's token hash")
        for what, text in (("client", self.client), ("user's session", self.session), ("acr", self.acr)):
            if text is not None:
                check_name(text, what)
        if self.expires_at.tzinfo is None or (self.auth_time is not None and self.auth_time.tzinfo is None):
            raise Invalid("a time of the delegation has no time zone")

    def require_live(self, now: datetime) -> None:
        """Refuse when the delegation's time is over; raises Refused (``delegation_expired``)."""
        if now >= self.expires_at:
            raise Refused("the user's delegation has expired", code="delegation_expired", hint="ask the user again")

    def to_json(self) -> dict[str, JsonValue]:
        """Give all members for the store; times are whole microseconds since 1970."""
        return {
            "issuer": self.issuer,
            "user": self.user,
            "expires_at": _micros(self.expires_at),
            "token_hash": self.token_hash,
            "client": self.client,
            "session": self.session,
            "acr": self.acr,
            "auth_time": None if self.auth_time is None else _micros(self.auth_time),
        }

    @classmethod
    def parse(cls, value: JsonValue) -> Self:
        """Read what :meth:`to_json` wrote; raises Invalid."""
        if not isinstance(value, dict) or value.keys() != _NAMES:
            raise Invalid("the delegation does not have exactly its members")
        auth_time = value["auth_time"]
        return cls(
            issuer=_text(value["issuer"]),
            user=_text(value["user"]),
            expires_at=_time(value["expires_at"]),
            token_hash=_text(value["token_hash"]),
            client=_optional(value["client"]),
            session=_optional(value["session"]),
            acr=_optional(value["acr"]),
            auth_time=None if auth_time is None else _time(auth_time),
        )


_NAMES = frozenset({"issuer", "user", "expires_at", "token_hash", "client", "session", "acr", "auth_time"})
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def _micros(time: datetime) -> int:
    # In integers: a float of seconds would move the time by a rounding.
    passed = time - _EPOCH
    return (passed.days * 86_400 + passed.seconds) * 1_000_000 + passed.microseconds


def _time(value: JsonValue) -> datetime:
    if not isinstance(value, int) or isinstance(value, bool):
        raise Invalid("a time of the delegation is not a whole number")
    try:
        return _EPOCH + timedelta(microseconds=value)
    except OverflowError:
        raise Invalid("a time of the delegation is out of range") from None


def _text(value: JsonValue) -> str:
    if not isinstance(value, str):
        raise Invalid("a member of the delegation is not text")
    return value


def _optional(value: JsonValue) -> str | None:
    return None if value is None else _text(value)
