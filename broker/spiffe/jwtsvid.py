"""JWT-SVIDs: the verdict over one token (JWT-SVID §2-§5).

Stricter than the reference libraries where the standard is: no header but alg, kid and typ, whole-number dates, a path
in ``sub``. Keys come only from the bundle of the trust domain that ``sub`` names. Does no I/O and reads no clock.
"""

from collections.abc import Mapping
from dataclasses import InitVar, dataclass, field
from datetime import UTC, datetime, timedelta
from types import MappingProxyType
from typing import Final

from broker.errors import InvalidSpiffeId, InvalidSvid, InvalidToken
from broker.spiffe import jose
from broker.spiffe.bundles import BundleSet
from broker.spiffe.ids import SpiffeId
from broker.spiffe.jose import PublicKey, UnverifiedJws
from broker.spiffe.strictjson import JsonValue

LEEWAY: Final = timedelta(seconds=30)
"""How far clocks may differ: go-spiffe allows a minute, py-spiffe nothing; nodes with NTP need seconds."""
MAX_AUDIENCES: Final = 64
"""Most audiences of one token: the standard recommends one."""
TYPES: Final = frozenset({"JWT", "JOSE"})
"""Accepted ``typ``; anything else is another kind of token (JWT-SVID §2.3)."""

_SEAL: Final = object()


@dataclass(frozen=True, slots=True)
class JwtSvid:
    """A verified JWT-SVID. Only :func:`verify_jwt_svid` makes one. Times are aware and in UTC."""

    id: SpiffeId
    audience: tuple[str, ...]
    expires_at: datetime
    issued_at: datetime | None
    claims: Mapping[str, JsonValue] = field(repr=False, hash=False)
    token: str = field(repr=False)
    seal: InitVar[object]

    def __post_init__(self, seal: object) -> None:
        if seal is not _SEAL:
            raise TypeError("a JwtSvid comes from verify_jwt_svid only")


def verify_jwt_svid(
    token: str, bundles: BundleSet, *, audience: str, now: datetime, leeway: timedelta = LEEWAY
) -> JwtSvid:
    """Verify a JWT-SVID that is meant for this audience, at an aware time; raises InvalidSvid (JWT-SVID §5)."""
    if now.tzinfo is None:
        raise ValueError("now must be an aware datetime")
    if not audience:
        # None must not come to mean any audience, whatever a caller's types promise.
        raise InvalidSvid("an audience is required", code="svid_audience", hint="name the service that was called")
    try:
        jws = jose.parse_compact(token)
        spiffe_id = _subject(jws)
        key = _key(jws, spiffe_id, bundles)
        jose.verify_signature(jws, key, jws.alg)
        audiences = _audiences(jws.payload)
        issued, expires = _times(jws.payload, now.timestamp(), leeway.total_seconds())
    except InvalidToken as error:
        raise InvalidSvid(error.message, code=error.reason, hint=error.hint) from None
    if audience not in audiences:
        raise InvalidSvid("the token is for another audience", code="svid_audience")
    return JwtSvid(
        id=spiffe_id,
        audience=audiences,
        expires_at=_utc(expires),
        issued_at=None if issued is None else _utc(issued),
        claims=MappingProxyType(dict(jws.payload)),
        token=token,
        seal=_SEAL,
    )


def _subject(jws: UnverifiedJws) -> SpiffeId:
    if jws.typ is not None and jws.typ not in TYPES:
        raise InvalidSvid("the token is of another type", code="svid_type")
    try:
        spiffe_id = SpiffeId(jws.payload.get("sub"))  # type: ignore[arg-type]  # refuses what is not text
    except InvalidSpiffeId as error:
        raise InvalidSvid(f"the subject: {error.message}", code=error.reason, hint=error.hint) from None
    if not spiffe_id.path:
        raise InvalidSvid("the subject has no path", code="svid_root_path")
    return spiffe_id


def _key(jws: UnverifiedJws, spiffe_id: SpiffeId, bundles: BundleSet) -> PublicKey:
    if jws.kid is None:
        raise InvalidSvid("the token names no key", code="svid_key_id")
    bundle = bundles.get(spiffe_id.trust_domain)
    if bundle is None:
        raise InvalidSvid(
            f"there is no bundle of the trust domain {spiffe_id.trust_domain}",
            code="svid_no_bundle",
            hint="federate with that trust domain, or wait for its bundle",
        )
    key = bundle.jwt_authorities.get(jws.kid)
    if key is None:
        raise InvalidSvid("the token's key is not in the bundle of its trust domain", code="svid_untrusted")
    return key


def _audiences(payload: Mapping[str, JsonValue]) -> tuple[str, ...]:
    value = payload.get("aud")
    # A lone string is made a list first: the test below would otherwise look for a part of it.
    entries = [value] if isinstance(value, str) else value
    if not isinstance(entries, list) or not 1 <= len(entries) <= MAX_AUDIENCES:
        raise InvalidSvid("the token has no audience, or too many", code="svid_audience")
    audiences = tuple(entry for entry in entries if isinstance(entry, str) and entry)
    if len(audiences) != len(entries):
        raise InvalidSvid("an audience of the token is not text", code="svid_audience")
    return audiences


def _times(payload: Mapping[str, JsonValue], now: float, leeway: float) -> tuple[int | None, int]:
    expires = jose.numeric_date(payload, "exp", required=True)
    not_before = jose.numeric_date(payload, "nbf", required=False)
    issued = jose.numeric_date(payload, "iat", required=False)
    # With a leeway its last moment still counts; without one, exp itself is already too late (RFC 7519 §4.1.4).
    if now > expires + leeway or (not leeway and now >= expires):
        raise InvalidSvid("the token has expired", code="svid_expired")
    if now < (not_before or 0) - leeway:
        raise InvalidSvid("the token is not valid yet", code="svid_not_yet_valid", hint="compare the clocks")
    if now < (issued or 0) - leeway:
        raise InvalidSvid("the token was issued in the future", code="svid_not_yet_valid", hint="compare the clocks")
    return issued, expires


def _utc(seconds: int) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)
