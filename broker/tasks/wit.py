"""Workload identity tokens with their proofs: who calls, and that it holds the key (WIMSE; WIT-SVID, incubating).

Written against draft-ietf-wimse-workload-creds and draft-ietf-wimse-wpt as of 2026-08. A WIT is never a bearer token: it counts
only together with a proof (WPT) by the key that it names, for this very address. Reads no clock and fetches nothing.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import InitVar, dataclass
from datetime import UTC, datetime
from typing import Final

from cryptography.hazmat.primitives.asymmetric import ec

from broker.errors import Invalid, InvalidSpiffeId, InvalidToken
from broker.spiffe import SpiffeId, TrustDomain
from broker.spiffe.jose import (
    PublicKey,
    UnverifiedJws,
    b64url_encode,
    numeric_date,
    parse_compact,
    public_key_from_jwk,
    verify_signature,
)
from broker.spiffe.strictjson import JsonValue
from broker.tasks.dpop import ALGORITHM, MAX_JTI, PROOF_LEEWAY, ShownProof, proof_key, shown
from broker.tasks.resource import Resource

WIT_TYPE: Final = "wit+jwt"
WPT_TYPE: Final = "wpt+jwt"
MAX_WPT_SECONDS: Final = 300
"""Longest life of a proof: the draft says seconds to minutes."""

_TEXT: Final = re.compile(r"[\x21-\x7e]{1,128}")
_SEAL: Final = object()

WitKeys = Mapping[TrustDomain, Mapping[str, PublicKey]]
"""The keys that sign WITs, by trust domain and key ID: no others of a bundle are taken for them."""


@dataclass(frozen=True, slots=True)
class ProvenWit:
    """A workload that showed a WIT and a proof by its key. Only :func:`verify_wit` makes one."""

    id: SpiffeId
    expires_at: datetime
    proof: ShownProof
    seal: InitVar[object]

    def __post_init__(self, seal: object) -> None:
        if seal is not _SEAL:
            raise TypeError("a ProvenWit comes from verify_wit only")


def verify_wit(wit: str, wpt: str, keys: WitKeys, *, address: Resource, now: datetime) -> ProvenWit:
    """Verify a WIT under its trust domain's keys, and the WPT under the key that it names, at an aware time.

    Nothing but these two may be in the request: a WPT that speaks of other tokens speaks of what is not there. Raises
    InvalidToken: code ``invalid_wit`` or ``invalid_wpt``.
    """
    try:
        spiffe_id, key, expires = _wit(wit, keys, now.timestamp())
    except Invalid as error:
        raise InvalidToken(f"the WIT: {error.message}", code="invalid_wit", hint=error.hint) from None
    try:
        proof = _wpt(wpt, wit, key, address, now.timestamp())
    except Invalid as error:
        raise InvalidToken(f"the WPT: {error.message}", code="invalid_wpt", hint=error.hint) from None
    return ProvenWit(spiffe_id, datetime.fromtimestamp(expires, UTC), proof, _SEAL)


def _wit(wit: str, keys: WitKeys, now: float) -> tuple[SpiffeId, ec.EllipticCurvePublicKey, int]:
    jws = _typed(wit, WIT_TYPE)
    try:
        spiffe_id = SpiffeId(jws.payload.get("sub"))  # type: ignore[arg-type]  # refuses what is not text
    except InvalidSpiffeId as error:
        raise Invalid(f"its subject: {error.message}") from None
    # NOTE(security): by the trust domain in ``sub``; an ``iss`` chooses no key.
    signer = keys.get(spiffe_id.trust_domain, {}).get(jws.kid or "")
    if signer is None or not spiffe_id.path:
        raise Invalid("its key is not one of its trust domain's")
    verify_signature(jws, signer, jws.alg)
    expires = numeric_date(jws.payload, "exp", required=True)
    if now > expires + PROOF_LEEWAY:
        raise Invalid("it has expired")
    for name in ("nbf", "iat"):
        if (numeric_date(jws.payload, name, required=False) or 0) > now + PROOF_LEEWAY:
            raise Invalid("it is not valid yet")
    cnf = jws.payload.get("cnf")
    jwk = cnf.get("jwk") if isinstance(cnf, dict) else None
    if not isinstance(jwk, dict) or "alg" not in jwk:
        raise Invalid("it names no key with an algorithm")
    return spiffe_id, proof_key(jwk), expires


def _wpt(wpt: str, wit: str, key: ec.EllipticCurvePublicKey, address: Resource, now: float) -> ShownProof:
    jws = _typed(wpt, WPT_TYPE)
    # The key's algorithm was required to be this one: the proof's must be the same text.
    verify_signature(jws, key, ALGORITHM)
    audience = jws.payload.get("aud")
    if not isinstance(audience, str) or Resource(audience) != address:
        raise Invalid("it is for another address")
    expires = numeric_date(jws.payload, "exp", required=True)
    if not now - PROOF_LEEWAY <= expires <= now + MAX_WPT_SECONDS + PROOF_LEEWAY:
        raise Invalid("it has expired, or lives too long")
    jti = jws.payload.get("jti")
    if not isinstance(jti, str) or _TEXT.fullmatch(jti) is None:
        raise Invalid(f"its jti is missing, or not 1 to {MAX_JTI} printable characters")
    if jws.payload.get("wth") != b64url_encode(hashlib.sha256(wit.encode("ascii", "replace")).digest()):
        raise Invalid("it is for another WIT")
    if not {"ath", "tth", "oth"}.isdisjoint(jws.payload):
        raise Invalid("it speaks of tokens that are not in the request")
    return shown(key, jti, f"WPT:{address.text}", expires + 2 * PROOF_LEEWAY)


def _typed(token: str, kind: str) -> UnverifiedJws:
    jws = parse_compact(token)
    if jws.typ is None or not jws.typ.isascii() or jws.typ.lower() not in (kind, "application/" + kind):
        raise Invalid(f"its typ is not {kind}")
    return jws


def read_wit_keys(jwks: JsonValue) -> dict[str, PublicKey]:
    """Read the keys that sign a trust domain's WITs: a JWK Set, each key with an ID, ``use`` absent or ``wit-svid``.

    Raises:
        Invalid: it is no such set, or names a key twice.
    """
    listed = jwks.get("keys") if isinstance(jwks, dict) else None
    if not isinstance(listed, list) or not listed:
        raise Invalid("not a JWK Set with keys", code="invalid_jwks")
    keys: dict[str, PublicKey] = {}
    for jwk in listed:
        if not isinstance(jwk, dict) or jwk.get("use", "wit-svid") != "wit-svid":
            continue
        kid = jwk.get("kid")
        if not isinstance(kid, str) or not kid or kid in keys:
            raise Invalid("a key lacks its ID, or has another's", code="invalid_jwks")
        keys[kid] = public_key_from_jwk(jwk)
    if not keys:
        raise Invalid("no key of the set signs WITs", code="invalid_jwks")
    return keys
