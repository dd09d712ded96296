"""JWT authorities and the JWT-SVIDs they sign (JWT-SVID §2-3). Task tokens have keys and rules of their own."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Final

from broker.errors import Invalid, Unavailable
from broker.keys import Signer
from broker.spiffe import SpiffeId, jose
from broker.spiffe.strictjson import JsonValue

ISSUED_BEFORE: Final = timedelta(seconds=10)
"""``iat`` lies this far back: some verifiers allow no second of it ahead of their own clock."""


@dataclass(frozen=True, slots=True)
class JwtAuthority:
    """A JWT key that can sign, until its end."""

    id: str
    not_after: datetime
    signer: Signer = field(repr=False)

    def expiry(self, now: datetime, ttl: timedelta) -> datetime:
        """Give a token's end, in whole seconds, never after this key's; raises Unavailable once the key has ended."""
        start = now.replace(microsecond=0)
        end = min(start + ttl, self.not_after)
        if end <= start:
            raise Unavailable(
                "the JWT signing key has ended",
                code="authority_ended",
                hint="the server is rotating its keys; try again in a few seconds",
            )
        return end


@dataclass(frozen=True, slots=True)
class JwtSvidClaims:
    """What one JWT-SVID says; times are in whole seconds."""

    spiffe_id: SpiffeId
    audience: Sequence[str]
    issued_at: datetime
    expires_at: datetime
    token_id: str
    issuer: str


def sign_jwt_svid(authority: JwtAuthority, claims: JwtSvidClaims) -> str:
    """Sign a JWT-SVID: ``kid`` and ``typ`` always, the audience always a list (JW-02 to JW-08); raises Invalid."""
    if not claims.audience:
        raise Invalid("a JWT-SVID has at least one audience", code="audience_missing")
    header: dict[str, JsonValue] = {"alg": authority.signer.algorithm, "kid": authority.id, "typ": "JWT"}
    payload: dict[str, JsonValue] = {
        "sub": str(claims.spiffe_id),
        "aud": list(claims.audience),
        "exp": int(claims.expires_at.timestamp()),
        "iat": int(claims.issued_at.timestamp()),
        "jti": claims.token_id,
        "iss": claims.issuer,
    }
    return jose.sign_compact(header, payload, authority.signer.sign)
