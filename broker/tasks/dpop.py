"""DPoP proofs: the verdict over one proof of possession of a key (RFC 9449 §4).

All that the proof and its request can show: form, signature under the key that it brings, method, address, time, nonce and
token. Whether it was shown before is for whoever keeps memory: :attr:`ShownProof.id` is what to remember, until
:attr:`ShownProof.expires_at`. Reads no clock and fetches nothing.
"""

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import InitVar, dataclass
from datetime import UTC, datetime
from typing import Final

from cryptography.hazmat.primitives.asymmetric import ec

from broker.errors import Invalid, InvalidToken
from broker.spiffe.jose import (
    PublicKey,
    UnverifiedJws,
    b64url_encode,
    numeric_date,
    parse_compact,
    public_key_from_jwk,
    thumbprint,
    verify_signature,
)
from broker.spiffe.strictjson import JsonValue
from broker.tasks.resource import Resource

ALGORITHM: Final = "ES256"
"""The one algorithm of proofs: what the proof says must be it, and its key must fit."""
PROOF_TYPE: Final = "dpop+jwt"
MAX_PROOF: Final = 4096
"""Largest proof, in bytes: a P-256 key, five claims and a long address need a thousand."""
MAX_JTI: Final = 128
"""Longest jti, in characters: 96 random bits need sixteen; what is longer is a load on memory."""
MAX_NONCE: Final = 128
PROOF_SECONDS: Final = 60
"""How long a proof is good after its ``iat``: it is made for one request, and nonces bound it from the other side."""
PROOF_LEEWAY: Final = 30
"""Seconds by which the clocks of the two sides may differ."""

_HEADERS: Final = frozenset({"alg", "typ", "jwk"})
_TYPES: Final = frozenset({PROOF_TYPE, "application/" + PROOF_TYPE})
_TEXT: Final = re.compile(r"[\x21-\x7e]{1,128}")
_METHOD: Final = re.compile(r"[A-Z]{1,16}")
_SEAL: Final = object()


class NonceWanted(Invalid):
    """The proof lacks a nonce of the server's, or has one that is over (RFC 9449 §8, §9): a new one is in the answer."""

    code = "use_dpop_nonce"

    def __init__(self, nonce: str) -> None:
        """Carry the nonce to use."""
        super().__init__("a nonce of this server is needed in the proof", hint="repeat with the nonce of DPoP-Nonce")
        self.nonce = nonce


@dataclass(frozen=True, slots=True)
class Expected:
    """What a proof must be for: the request's method, and the address as configured here, never as a header says.

    ``token`` is the access token that it came with, None at the token endpoint.
    """

    method: str
    address: Resource
    token: str | None = None


@dataclass(frozen=True, slots=True)
class ShownProof:
    """A proof that holds, if it was not shown before. Only :func:`verify_proof` makes one, and :mod:`broker.tasks.wit`.

    ``id`` is the same for two proofs that are one: the key, the jti, method and address in their one form are in it, the
    signature is not. ``nonce`` is empty where none was asked for.
    """

    jkt: str
    id: str
    expires_at: datetime
    nonce: str
    seal: InitVar[object]

    def __post_init__(self, seal: object) -> None:
        if seal is not _SEAL:
            raise TypeError("a ShownProof comes from the verifying functions only")


def shown(key: PublicKey, jti: str, place: str, until: int, nonce: str = "") -> ShownProof:
    """Seal a proof that was verified: for the functions of this room that verify, and for nobody else.

    ``place`` is method and address in their one form; ``until`` is in seconds since 1970.
    """
    jkt = thumbprint(key)
    name = b64url_encode(hashlib.sha256(f"{jkt}:{jti}:{place}".encode()).digest())
    return ShownProof(jkt, name, datetime.fromtimestamp(until, UTC), nonce, _SEAL)


def verify_proof(
    headers: Sequence[str], expected: Expected, *, now: datetime, nonce: Callable[[str], bool] | None = None
) -> ShownProof:
    """Do the twelve checks of RFC 9449 §4.3, but for the token's own ``cnf.jkt``; ``headers``: every DPoP header's value.

    ``nonce`` says whether a nonce is one of ours that is not over; None where no nonce is asked for. It is called last, with
    the empty text where the proof has none, and raises :class:`NonceWanted` by itself.

    Raises InvalidToken: code ``invalid_dpop_proof``.
    """
    try:
        return _verified(headers, expected, now, nonce)
    except NonceWanted:
        raise
    except Invalid as error:
        raise InvalidToken(f"the DPoP proof: {error.message}", code="invalid_dpop_proof", hint=error.hint) from None


def _verified(
    headers: Sequence[str], expected: Expected, now: datetime, nonce: Callable[[str], bool] | None
) -> ShownProof:
    if len(headers) != 1:
        raise Invalid("there is not exactly one")
    jws = parse_compact(headers[0], allowed_headers=_HEADERS, max_token=MAX_PROOF)
    # ASCII is asked first, as lower() folds the Kelvin sign to k.
    if jws.typ is None or not jws.typ.isascii() or jws.typ.lower() not in _TYPES:
        raise Invalid("its typ is not dpop+jwt")
    key = proof_key(jws.header.get("jwk"))
    verify_signature(jws, key, ALGORITHM)
    jti = _text(jws.payload, "jti")
    if _METHOD.fullmatch(expected.method) is None or jws.payload.get("htm") != expected.method:
        raise Invalid("it is for another method")
    if _address(jws.payload.get("htu")) != expected.address:
        raise Invalid("it is for another address", hint="htu is the address as the server publishes it")
    until = check_age(jws, now.timestamp())
    _check_dates(jws, now.timestamp())
    _check_token(jws, expected.token)
    told = "" if "nonce" not in jws.payload else _text(jws.payload, "nonce")
    if nonce is not None and not nonce(told):
        raise Invalid("its nonce is not one of this server's")
    place = f"{expected.method}:{expected.address.text}"
    return shown(key, jti, place, until, told)


def proof_key(jwk: JsonValue) -> ec.EllipticCurvePublicKey:
    """Read the public key that a proof or a WIT brings, P-256 only; raises InvalidToken for a private or another one."""
    if not isinstance(jwk, dict):
        raise InvalidToken("it brings no key", code="jwk_malformed")
    key = public_key_from_jwk(jwk)
    if jwk.get("alg", ALGORITHM) != ALGORITHM:
        raise InvalidToken("its key is for another algorithm", code="token_algorithm")
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise InvalidToken("its key is not on P-256", code="token_algorithm")
    return key


def check_age(jws: UnverifiedJws, now: float) -> int:
    """Check ``iat`` against the clock; give until when the proof must be remembered. Raises Invalid."""
    issued = numeric_date(jws.payload, "iat", required=True)
    if not now - PROOF_SECONDS - PROOF_LEEWAY <= issued <= now + PROOF_LEEWAY:
        raise Invalid("it is too old, or of the future", hint="compare the clocks, and make a proof for each request")
    # Replicas' clocks differ, too: none may forget a proof that another would still take.
    return issued + PROOF_SECONDS + 2 * PROOF_LEEWAY


def _check_dates(jws: UnverifiedJws, now: float) -> None:
    """Hold a proof to dates that it need not have, and has (RFC 7519 §4.1.4, §4.1.5)."""
    expires = numeric_date(jws.payload, "exp", required=False)
    starts = numeric_date(jws.payload, "nbf", required=False)
    if expires is not None and now > expires + PROOF_LEEWAY:
        raise Invalid("it has expired")
    if starts is not None and now < starts - PROOF_LEEWAY:
        raise Invalid("it is not valid yet")


def token_hash(token: str) -> str:
    """Give ``ath``: the SHA-256 of the token's ASCII text in base64url (RFC 9449 §4.2)."""
    return b64url_encode(hashlib.sha256(token.encode("ascii", "replace")).digest())


def _check_token(jws: UnverifiedJws, token: str | None) -> None:
    if token is not None and jws.payload.get("ath") != token_hash(token):
        raise Invalid("it is for another token")


def _address(value: JsonValue) -> Resource:
    if not isinstance(value, str):
        raise Invalid("it is for no address")
    # RFC 9449 §4.3: query and fragment are passed over.
    return Resource(value.split("#", 1)[0].split("?", 1)[0])


def _text(payload: Mapping[str, JsonValue], name: str) -> str:
    value = payload.get(name)
    if not isinstance(value, str) or _TEXT.fullmatch(value) is None:
        raise Invalid(f"its {name} is missing, or not 1 to {MAX_JTI} printable characters")
    return value
