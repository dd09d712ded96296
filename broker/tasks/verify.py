"""The verdict over a task token: its form, signature, issuer, audience and times (RFC 9068 §4, RFC 8725 §3).

Responsible for what the token alone can show. Whether its holder presents it (:mod:`broker.tasks.binding`), whether its
task still lives and whether policy agrees are the verifier's to ask next. Fetches nothing and reads no clock.
"""

from collections.abc import Mapping
from dataclasses import InitVar, dataclass
from datetime import datetime
from typing import Final

from broker.errors import InvalidToken
from broker.spiffe import SpiffeId
from broker.spiffe.jose import PublicKey, UnverifiedJws, parse_compact, verify_signature
from broker.tasks.binding import Confirmation
from broker.tasks.claims import TaskClaims
from broker.tasks.resource import Resource

ALGORITHM: Final = "ES256"
"""The one algorithm of task tokens; another comes with another key, never by what a token says."""
LEEWAY: Final = 30
"""Seconds by which the clocks of issuer and verifier may differ, for every time in the token."""
TOKEN_TYPE: Final = "at+jwt"  # noqa: S105 - a media type
"""What we write as ``typ`` (RFC 9068 §2.1)."""

BEARER_SECONDS: Final = 60
"""Longest life of a token that is bound to nobody: whoever sees it has it."""

_TYPES: Final = frozenset({TOKEN_TYPE, "application/" + TOKEN_TYPE})
_SEAL: Final = object()


@dataclass(frozen=True, slots=True)
class VerifiedToken:
    """A task token whose signature and claims hold. Only :func:`verify_task_token` makes one."""

    claims: TaskClaims
    seal: InitVar[object]

    def __post_init__(self, seal: object) -> None:
        if seal is not _SEAL:
            raise TypeError("a VerifiedToken comes from verify_task_token only")

    @property
    def user(self) -> str:
        """For whom the agent acts."""
        return self.claims.sub

    @property
    def agent(self) -> SpiffeId:
        """Who acts: the one actor that counts for access (RFC 8693 §4.1)."""
        return self.claims.client_id

    @property
    def task_id(self) -> str:
        """The task of the token."""
        return self.claims.task.id

    @property
    def root(self) -> str:
        """The root of the task's tree: what a frame of kind ``subtree`` names."""
        return self.claims.task.root

    @property
    def epoch(self) -> int:
        """The task's epoch at issue; dead when its tree's, or its own, is higher now."""
        return self.claims.task.epoch

    @property
    def jti(self) -> str:
        """The token's own id."""
        return self.claims.jti


def verify_task_token(
    token: str,
    keys: Mapping[str, PublicKey],
    *,
    issuer: str,
    audience: Resource | str,
    now: datetime,
    bearer: bool = False,
) -> VerifiedToken:
    """Verify a task token under the issuer's keys by ``kid``, for one audience, at an aware time; raises InvalidToken.

    ``bearer``: whether a token that is bound to nobody is one at all: only where the audience was published so.
    Raises Invalid when the audience itself is not a resource.
    """
    if now.tzinfo is None:
        raise ValueError("now must be an aware datetime")
    ours = audience if isinstance(audience, Resource) else Resource(audience)
    jws = parse_compact(token)
    verify_signature(jws, _key(jws, keys), ALGORITHM)
    claims = TaskClaims.parse(jws.payload)
    # NOTE(security): byte by byte; a prefix, another case or a slash more is another issuer (RFC 8414 §3.3).
    if claims.iss != issuer:
        raise InvalidToken("the token is from another issuer", code="token_issuer")
    if claims.aud != ours:
        raise InvalidToken("the token is for another audience", code="token_audience")
    _check_times(claims, now.timestamp())
    _check_bearer(claims, bearer=bearer)
    return VerifiedToken(claims, _SEAL)


def _key(jws: UnverifiedJws, keys: Mapping[str, PublicKey]) -> PublicKey:
    # The media type's case does not matter (RFC 2045 §5.1); ASCII is asked first, as lower() folds the Kelvin sign to k.
    if jws.typ is None or not jws.typ.isascii() or jws.typ.lower() not in _TYPES:
        raise InvalidToken("the token is not a task token", code="token_type", hint="its typ is not at+jwt")
    key = keys.get(jws.kid) if jws.kid is not None else None
    if key is None:
        raise InvalidToken("the token's key is not one of the issuer's", code="token_key_unknown")
    return key


def _check_times(claims: TaskClaims, now: float) -> None:
    if now > claims.exp + LEEWAY:
        raise InvalidToken("the token has expired", code="token_expired")
    if claims.iat > now + LEEWAY or (claims.nbf is not None and claims.nbf > now + LEEWAY):
        raise InvalidToken("the token is not valid yet", code="token_not_yet_valid")


def _check_bearer(claims: TaskClaims, *, bearer: bool) -> None:
    if claims.cnf is not None:
        return
    if not bearer:
        raise InvalidToken(
            "the token is bound to nobody", code="token_claim_missing", hint="this service takes no bearer tokens"
        )
    if claims.exp - claims.iat > BEARER_SECONDS:
        raise InvalidToken("a bearer token does not live so long", code="token_cnf")


def unverified_claims(token: str) -> tuple[str | None, TaskClaims]:
    """Read the key's ID and the claims of one's own new token, to know by what it ends. Proves nothing. Raises InvalidToken."""
    jws = parse_compact(token)
    return jws.kid, TaskClaims.parse(jws.payload)


def unverified_confirmation(token: str) -> Confirmation | None:
    """Read the ``cnf`` of one's own new token, to know what it needs; None: nothing. Proves nothing. Raises InvalidToken."""
    payload = parse_compact(token).payload
    return Confirmation.parse(payload["cnf"]) if "cnf" in payload else None
