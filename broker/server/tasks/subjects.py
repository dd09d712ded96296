"""The user's word: tokens of trusted OpenID issuers, judged strictly, before anything is decided by them.

Invariants: the algorithm is one that this issuer's key is bound to, never the token's choice; the issuer is compared byte by
byte; the token must be meant for us; a delegated token (``act``, ``may_act``) is never taken for the user's own
(RFC 8693 §4.1, §4.4); a token that is bound to a key, or that is no access or ID token by its type, is refused. What the
user permits beyond that, and what an agent may do with it, is decided elsewhere.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from typing import Final, overload

from broker.clock import Clock
from broker.errors import Invalid, InvalidSpiffeId, InvalidToken
from broker.server.tasks.config import SubjectIssuer, check_issuers
from broker.server.tasks.issuer_keys import IssuerKey, IssuerKeys
from broker.spiffe import SpiffeId, jose
from broker.spiffe.strictjson import JsonValue
from broker.tasks import Authority, Delegation
from broker.tasks.texts import NAME

LEEWAY: Final = 30
"""Seconds by which the issuer's clock and ours may differ. Nothing is issued beyond ``exp`` itself."""
MAX_AUDIENCES: Final = 16
"""Audiences in one token: more is a list, not an address."""

# Names of the signing certificate that some issuers put beside kid. They are never looked at.
SUBJECT_HEADERS: Final = jose.DEFAULT_HEADERS | {"x5t", "x5t#S256"}
_ACCESS: Final = frozenset({"at+jwt"})
_PLAIN: Final = frozenset({"jwt", None})
_SUBJECT: Final = re.compile(r"[\x21-\x7e]{1,255}")
_SHORT: Final = NAME

_VERIFIED: Final = object()
TOKENS_KEPT: Final = 4_096
"""Tokens not read and not checked twice under the same key, 1 KiB each or so: an agent shows its user's with every exchange."""


class SubjectKind(StrEnum):
    """What the caller says the token is; its content must agree (RFC 8693 §3)."""

    ANY = "jwt"
    ACCESS = "access_token"
    ID = "id_token"


@dataclass(frozen=True, slots=True)
class Subject:
    """A user and the word they gave, verified. Only :class:`Subjects` makes one.

    ``user`` is the issuer's namespace and ``sub``; ``ceiling`` is what the token itself limits the delegation to (its own
    ``authorization_details``), if it does; ``scopes`` limit the families of actions that they name; ``party`` is the client that the token was given to: the one that it names, else
    its only audience; ``may_act`` is the one workload that may act on it, if it names one.
    """

    user: str
    issuer: str
    client: str | None
    session: str | None
    acr: str | None
    auth_time: datetime | None
    expires_at: datetime
    token_hash: str
    ceiling: Authority | None
    issued_at: datetime
    party: str
    may_act: SpiffeId | None
    scopes: tuple[str, ...]
    _made_by: object = field(repr=False, compare=False)
    _delegation: Delegation = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Refuse any other maker, and what makes no delegation (Invalid)."""
        if self._made_by is not _VERIFIED:
            raise TypeError("a Subject comes from Subjects.verify only")
        delegation = Delegation(
            issuer=self.issuer,
            user=self.user,
            client=self.client,
            session=self.session,
            acr=self.acr,
            auth_time=self.auth_time,
            expires_at=self.expires_at,
            token_hash=self.token_hash,
            issued_at=self.issued_at,
        )
        object.__setattr__(self, "_delegation", delegation)

    @property
    def max_task_ttl(self) -> None:
        """No limit of a task's life but its own end."""
        return

    def narrow(self, wanted: Authority) -> Authority:
        """Give what is wanted, if the token permits all of it; raises PolicyDenied."""
        granted = wanted if self.ceiling is None else self.ceiling.narrow(wanted)
        granted.require_within(self.scopes)
        return granted

    def delegation(self) -> Delegation:
        """Give the delegation that this token is."""
        return self._delegation


@dataclass(frozen=True, slots=True)
class _Dates:
    """When a token counts, in seconds since 1970: the one thing about it that changes with the clock."""

    issued_at: int
    expires_at: int
    not_before: int | None

    def check(self, now: int) -> None:
        """Raise InvalidToken outside of them."""
        if now > self.expires_at + LEEWAY:
            raise InvalidToken(
                "the user token has expired", code="subject_expired", hint="get a new one from the issuer"
            )
        if self.issued_at > now + LEEWAY or (self.not_before is not None and self.not_before > now + LEEWAY):
            raise InvalidToken("the user token is not valid yet", code="subject_not_yet", hint="compare the clocks")


@dataclass(frozen=True, slots=True)
class _Known:
    """A token that was read, checked under a key and judged before: what of it is asked again each time."""

    typ: str | None
    kid: str | None
    key: IssuerKey
    dates: _Dates
    subject: Subject


class Subjects:
    """The trusted issuers and their keys. Close it with :meth:`aclose`."""

    def __init__(self, issuers: Iterable[SubjectIssuer], clock: Clock) -> None:
        """Prepare one guarded client for each issuer; raises Misconfigured."""
        self._clock = clock
        self._issuers = {
            one.issuer: (one, IssuerKeys(one, clock, address=one.jwks_url)) for one in check_issuers(issuers)
        }
        self._known: dict[bytes, _Known] = {}

    async def aclose(self) -> None:
        """Close the connections to the issuers."""
        for _, keys in self._issuers.values():
            await keys.aclose()

    def issuer(self, name: str) -> SubjectIssuer | None:
        """Give what is set for an issuer, None for one that is not trusted."""
        known = self._issuers.get(name)
        return None if known is None else known[0]

    async def find_key(self, issuer: str, kid: str | None) -> IssuerKey:
        """Give a key of a trusted issuer, for another kind of document of it; raises InvalidToken, Unavailable."""
        return await self._issuers[issuer][1].find(kid)

    async def verify(self, token: str, kind: SubjectKind = SubjectKind.ANY) -> Subject:
        """Judge a user's token. May ask the issuer for its keys: never call it within a transaction.

        Raises:
            Invalid: the token is delegated already, or not of the kind that was said.
            InvalidToken: it is not a trusted issuer's valid token for us.
            Unavailable: the issuer's keys cannot be had now.
        """
        known = self._known.get(digest_of_token(token))
        if known is not None:
            # What these very bytes say, and what is set for their issuer, is the same for ever. Their kind is what the caller
            # says now, the issuer's keys and the time are those of now.
            _check_type(known.typ, kind)
            key = await self._issuers[known.subject.issuer][1].find(known.kid)
            if key is known.key:
                known.dates.check(int(self._clock.now().timestamp()))
                return known.subject
        return await self._read(token, kind)

    async def _read(self, token: str, kind: SubjectKind) -> Subject:
        jws = jose.parse_compact(token, allowed_headers=SUBJECT_HEADERS)
        _check_type(jws.typ, kind)
        trusted = self._issuers.get(_text(jws.payload, "iss", _SHORT))
        if trusted is None:
            raise InvalidToken(
                "the user token's issuer is not trusted here",
                code="subject_issuer",
                hint="an operator adds it under [[server.subjects]]",
            )
        issuer, keys = trusted
        key = await keys.find(jws.kid)
        jose.verify_signature(jws, key.key, key.algorithm)
        _refuse_foreign_kinds(jws.payload)
        dates = _dates(jws.payload)
        subject = _judge(jws.payload, issuer, dates, now=int(self._clock.now().timestamp()), token=token)
        if len(self._known) >= TOKENS_KEPT:
            self._known.clear()
        self._known[digest_of_token(token)] = _Known(jws.typ, jws.kid, key, dates, subject)
        return subject


def digest_of_token(token: str) -> bytes:
    """Give what a token is remembered by."""
    # Text that is no token's is refused where it is read.
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).digest()


def _check_type(typ: str | None, kind: SubjectKind) -> None:
    if typ is not None:
        if not typ.isascii():
            raise InvalidToken("the user token's type is not accepted", code="token_type")
        # RFC 8725 §3.11: a type without a slash stands for application/….
        typ = typ.lower().removeprefix("application/")
    wanted = _PLAIN if kind is SubjectKind.ID else _PLAIN | _ACCESS
    if typ not in wanted:
        raise InvalidToken(
            "the user token's type is not accepted", code="token_type", hint="send an access token or an ID token"
        )


def _judge(payload: Mapping[str, JsonValue], issuer: SubjectIssuer, dates: _Dates, *, now: int, token: str) -> Subject:
    dates.check(now)
    client, party = _check_audience(payload, issuer)
    for name, wanted in issuer.required_claims:
        if payload.get(name) != wanted:
            raise InvalidToken(f"the user token's claim {name} is not the required one", code="subject_claim")
    sub = _text(payload, "sub", _SUBJECT)
    if sub.startswith("spiffe://") or sub == issuer.issuer:
        raise InvalidToken("the user token's subject is not a user", code="subject_not_user")
    details = payload.get("authorization_details")
    return Subject(
        user=issuer.namespace + sub,
        issuer=issuer.issuer,
        client=client,
        session=_optional(payload, "sid"),
        acr=_optional(payload, "acr"),
        auth_time=_moment(jose.numeric_date(payload, "auth_time", required=False)),
        expires_at=_moment(dates.expires_at),
        token_hash="sha-256:" + jose.b64url_encode(hashlib.sha256(token.encode("ascii")).digest()),
        # What we cannot read does not limit less: an unknown type refuses the token.
        ceiling=None if details is None else Authority.parse(details),
        issued_at=_moment(dates.issued_at),
        party=party,
        may_act=_may_act(payload["may_act"]) if "may_act" in payload else None,
        scopes=_scopes(payload.get("scope")),
        _made_by=_VERIFIED,
    )


def _refuse_foreign_kinds(payload: Mapping[str, JsonValue]) -> None:
    # NOTE(security): judged by content. Taking such a token without its actor would turn delegation into impersonation.
    if "act" in payload:
        raise Invalid(
            "the subject token was delegated by another issuer",
            code="subject_delegated",
            hint="send the user's own token: whom another issuer let act is not in our records",
        )
    if "cnf" in payload:
        raise InvalidToken("the user token is bound to another key", code="subject_bound")
    if "events" in payload:
        raise InvalidToken("a security event is not a user token", code="token_type")


def _scopes(value: JsonValue) -> tuple[str, ...]:
    """Read ``scope`` (RFC 8693 §4.2), or the list that some issuers make of it; no such claim names nothing."""
    if value is None:
        return ()
    listed = value.split(" ") if isinstance(value, str) else value
    if not isinstance(listed, list):
        raise InvalidToken("the user token's scope is neither text nor a list", code="token_claim_invalid")
    # NOTE(security): what we could not compare would limit nothing.
    if not all(isinstance(scope, str) for scope in listed):
        raise InvalidToken("a scope of the user token is not text", code="token_claim_invalid")
    return tuple(str(scope) for scope in listed)


def _may_act(value: JsonValue) -> SpiffeId:
    """Read whom the user named as the actor (RFC 8693 §4.4): a workload of ours, and nothing that we could not judge."""
    if not isinstance(value, dict) or value.keys() != {"sub"} or not isinstance(value["sub"], str):
        raise Invalid("may_act does not name exactly one sub", code="may_act_unknown")
    try:
        return SpiffeId(value["sub"])
    except InvalidSpiffeId:
        raise Invalid("may_act does not name a workload", code="may_act_unknown") from None


def _dates(payload: Mapping[str, JsonValue]) -> _Dates:
    expires_at = jose.numeric_date(payload, "exp", required=True)
    issued_at = jose.numeric_date(payload, "iat", required=True)
    not_before = jose.numeric_date(payload, "nbf", required=False)
    if expires_at <= issued_at:
        raise InvalidToken("the user token ends before it starts", code="token_claim_invalid")
    return _Dates(issued_at, expires_at, not_before)


def _check_audience(payload: Mapping[str, JsonValue], issuer: SubjectIssuer) -> tuple[str | None, str]:
    """Refuse a token that is not for us, or was given to a client we do not know (OpenID Connect Core §3.1.3.7).

    Gives the client that it names, if any, and the one that it was given to.
    """
    aud = payload.get("aud")
    audiences = [aud] if isinstance(aud, str) else aud
    if not isinstance(audiences, list) or not 0 < len(audiences) <= MAX_AUDIENCES:
        raise InvalidToken("the user token has no audience", code="subject_audience")
    if not any(isinstance(one, str) and one in issuer.audiences for one in audiences):
        raise InvalidToken(
            "the user token is not meant for this broker",
            code="subject_audience",
            hint="the application must ask its issuer for a token with the broker as its audience",
        )
    party, client_id = _optional(payload, "azp"), _optional(payload, "client_id")
    if party is not None and client_id is not None and party != client_id:
        raise InvalidToken("the user token names two clients", code="subject_client")
    client = party or client_id
    if client is None and len(audiences) > 1:
        raise InvalidToken("the user token has several audiences and names no client", code="subject_client")
    if client is not None and client not in issuer.audiences | issuer.clients:
        raise InvalidToken(
            "the user token was given to a client that is not accepted here",
            code="subject_client",
            hint="an operator adds it to clients under [[server.subjects]]",
        )
    return client, client or str(audiences[0])


@overload
def _moment(seconds: int) -> datetime: ...
@overload
def _moment(seconds: int | None) -> datetime | None: ...
def _moment(seconds: int | None) -> datetime | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC)


def _text(payload: Mapping[str, JsonValue], name: str, shape: re.Pattern[str]) -> str:
    value = payload.get(name)
    if not isinstance(value, str) or shape.fullmatch(value) is None:
        raise InvalidToken(f"the user token's claim {name} is missing or not short text", code="token_claim_invalid")
    return value


def _optional(payload: Mapping[str, JsonValue], name: str) -> str | None:
    return None if payload.get(name) is None else _text(payload, name, _SHORT)
