"""A delegation: that a user let an agent act, as judged from the user's own token.

Responsible for keeping what was verified, and for its end. How a user's token is verified is not known here; the token
itself is never kept, only its hash. A bare user id is never a delegation.
"""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Self

from broker.errors import Invalid, Refused
from broker.spiffe.strictjson import JsonValue
from broker.tasks.texts import check_digest, check_id, check_issuer, check_name


@dataclass(frozen=True, slots=True, kw_only=True)
class Delegation:
    """A user's grant, from a verified token; raises Invalid. ``client`` is its ``azp``, ``session`` its ``sid``.

    ``standing`` is the id of the standing delegation that it comes from, whose token is long over; ``max_hops`` is the most
    agents in one chain that it permits.
    """

    issuer: str
    user: str
    expires_at: datetime
    token_hash: str
    client: str | None = None
    session: str | None = None
    acr: str | None = None
    auth_time: datetime | None = None
    issued_at: datetime | None = None
    standing: str | None = None
    max_hops: int | None = None

    def __post_init__(self) -> None:
        check_issuer(self.issuer, "delegation's issuer")
        check_name(self.user, "user")
        check_digest(self.token_hash, "delegation's token hash")
        for what, text in (("client", self.client), ("user's session", self.session), ("acr", self.acr)):
            if text is not None:
                check_name(text, what)
        if any(time is not None and time.tzinfo is None for time in (self.expires_at, self.auth_time, self.issued_at)):
            raise Invalid("a time of the delegation has no time zone")
        if self.standing is not None:
            check_id(self.standing, "standing delegation's id")
        if self.max_hops is not None and self.max_hops < 1:
            raise Invalid("the delegation permits no agent at all")

    @property
    def given_at(self) -> datetime | None:
        """When the user gave the word: the sign-in if the issuer tells it, else the token's issue; None: not known."""
        return self.auth_time or self.issued_at

    def require_live(self, now: datetime) -> None:
        """Refuse when the delegation's time is over; raises Refused (``delegation_expired``)."""
        if now >= self.expires_at:
            raise Refused("the user's delegation has expired", code="delegation_expired", hint="ask the user again")

    def to_json(self) -> dict[str, JsonValue]:
        """Give all members for the store; times are whole microseconds since 1970."""
        later = {
            "issued_at": None if self.issued_at is None else _micros(self.issued_at),
            "standing": self.standing,
            "max_hops": self.max_hops,
        }
        return {
            "issuer": self.issuer,
            "user": self.user,
            "expires_at": _micros(self.expires_at),
            "token_hash": self.token_hash,
            "client": self.client,
            "session": self.session,
            "acr": self.acr,
            "auth_time": None if self.auth_time is None else _micros(self.auth_time),
            **{name: value for name, value in later.items() if value is not None},
        }

    @classmethod
    def parse(cls, value: JsonValue) -> Self:
        """Read what :meth:`to_json` wrote; raises Invalid."""
        if not isinstance(value, dict) or not _NAMES <= value.keys() <= _NAMES | _LATER:
            raise Invalid("the delegation does not have exactly its members")
        auth_time, issued_at, max_hops = value["auth_time"], value.get("issued_at"), value.get("max_hops")
        if max_hops is not None and (not isinstance(max_hops, int) or isinstance(max_hops, bool)):
            raise Invalid("the most hops of the delegation are not a whole number")
        return cls(
            issuer=_text(value["issuer"]),
            user=_text(value["user"]),
            expires_at=_time(value["expires_at"]),
            token_hash=_text(value["token_hash"]),
            client=_optional(value["client"]),
            session=_optional(value["session"]),
            acr=_optional(value["acr"]),
            auth_time=None if auth_time is None else _time(auth_time),
            issued_at=None if issued_at is None else _time(issued_at),
            standing=_optional(value.get("standing")),
            max_hops=max_hops,
        )


_NAMES = frozenset({"issuer", "user", "expires_at", "token_hash", "client", "session", "acr", "auth_time"})
_LATER = frozenset({"issued_at", "standing", "max_hops"})
"""Members that older rows lack, and that are left out where they say nothing."""
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
