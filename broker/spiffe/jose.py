"""Compact JWS and public JWKs, strictly, for every kind of token (RFC 7515, 7517, 7518, 7638).

Cuts a token, checks its signature under a key the caller chose, and reads dates. Which key, which issuer and which
claims are the caller's business. Keys never come from the token, except where a DPoP proof's ``jwk`` is asked for.
"""

import binascii
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Final, Literal, TypeAlias, overload

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from jwt.algorithms import ECAlgorithm, RSAAlgorithm, RSAPSSAlgorithm

from broker.errors import InvalidJson, InvalidToken
from broker.spiffe import strictjson
from broker.spiffe.strictjson import JsonValue

PublicKey: TypeAlias = ec.EllipticCurvePublicKey | rsa.RSAPublicKey

MAX_TOKEN: Final = 8192
"""Largest token, in bytes: what common HTTP servers take as one header line."""
MAX_HEADER: Final = 2048
"""Largest header, in bytes once decoded: three short members need a hundred."""
MAX_KEY_ID: Final = 256
"""Longest ``kid``, in characters: it is an index into our own keys, never a path or a query."""
MIN_RSA_BITS: Final = 2048
"""RFC 7518 §3.3."""
MAX_RSA_BITS: Final = 8192
"""Checking a larger key's signature is a denial of service."""
MAX_DATE: Final = 253402300799
"""The last second of the year 9999: datetime ends there."""

DEFAULT_HEADERS: Final = frozenset({"alg", "kid", "typ"})
# Each lets the token choose its own key or meaning: refused whatever the caller allows.
_NEVER: Final = frozenset({"crit", "b64", "jku", "x5u", "x5c", "zip", "enc"})

_EC: Final = {
    "ES256": ("P-256", ECAlgorithm(ECAlgorithm.SHA256, ec.SECP256R1)),
    "ES384": ("P-384", ECAlgorithm(ECAlgorithm.SHA384, ec.SECP384R1)),
    "ES512": ("P-521", ECAlgorithm(ECAlgorithm.SHA512, ec.SECP521R1)),
}
_RSA: Final = {
    "RS256": RSAAlgorithm(RSAAlgorithm.SHA256),
    "RS384": RSAAlgorithm(RSAAlgorithm.SHA384),
    "RS512": RSAAlgorithm(RSAAlgorithm.SHA512),
    "PS256": RSAPSSAlgorithm(RSAPSSAlgorithm.SHA256),
    "PS384": RSAPSSAlgorithm(RSAPSSAlgorithm.SHA384),
    "PS512": RSAPSSAlgorithm(RSAPSSAlgorithm.SHA512),
}
ALGORITHMS: Final = frozenset(_EC) | frozenset(_RSA)
"""The nine of JWT-SVID §3. All asymmetric: there is no none, and no shared secret."""

CURVES: Final[dict[str, tuple[type[ec.EllipticCurve], int]]] = {
    "P-256": (ec.SECP256R1, 32),
    "P-384": (ec.SECP384R1, 48),
    "P-521": (ec.SECP521R1, 66),
}
_CURVE_NAMES: Final[dict[str, str]] = {curve().name: name for name, (curve, _) in CURVES.items()}
PRIVATE_MEMBERS: Final = frozenset({"d", "p", "q", "dp", "dq", "qi", "oth", "k"})
_KEY_ID: Final = re.compile(r"[\x20-\x7e]+")
_PUBLIC_EXPONENTS: Final = range(3, 1 << 32)
# CVE-2017-15361: a chip made moduli that are powers of 65537 modulo every small prime; chance does so once in 2^27.
_ROCA: Final = {
    prime: frozenset(pow(65537, power, prime) for power in range(prime - 1))
    for prime in range(3, 168, 2)
    if all(prime % divisor for divisor in range(3, 14, 2) if divisor < prime)
}


@dataclass(frozen=True, slots=True)
class UnverifiedJws:
    """A token cut into its parts. Nothing in it is true until its signature has been checked."""

    alg: str
    kid: str | None
    typ: str | None
    header: Mapping[str, JsonValue] = field(repr=False)
    payload: Mapping[str, JsonValue] = field(repr=False)
    signing_input: bytes = field(repr=False)
    signature: bytes = field(repr=False)


def b64url_encode(data: bytes) -> str:
    """Write bytes as base64url without padding (RFC 7515 §2)."""
    return binascii.b2a_base64(data, newline=False).rstrip(b"=").translate(_TO_URL).decode("ascii")


def b64url_decode(text: str) -> bytes:
    """Read canonical base64url: no padding, no spare bits, no other character; raises InvalidToken."""
    try:
        raw = text.encode("ascii")
        data = binascii.a2b_base64(raw.translate(_FROM_URL) + b"=" * (-len(raw) % 4))
    except ValueError:
        raise InvalidToken("it is not base64url", code="token_encoding") from None
    # The reader drops what it does not know; only text that comes back the same had one meaning.
    if b64url_encode(data) != text:
        raise InvalidToken("it is not canonical base64url", code="token_encoding")
    return data


def parse_compact(
    token: str,
    *,
    allowed_headers: frozenset[str] = DEFAULT_HEADERS,
    max_token: int = MAX_TOKEN,
    max_header: int = MAX_HEADER,
) -> UnverifiedJws:
    """Cut a compact JWS and read both JSON parts, checking no signature; raises InvalidToken (RFC 7515 §5.2)."""
    if not isinstance(token, str):
        raise InvalidToken("the token is not text", code="token_malformed")
    if len(token) > max_token:
        raise InvalidToken(f"the token is longer than {max_token} bytes", code="token_too_large")
    parts = token.split(".", 5)
    if len(parts) != 3:
        raise InvalidToken("the token does not have three parts", code="token_malformed")
    header = _json_object(parts[0], max_header, "header")
    alg, kid, typ = _check_header(header, allowed_headers)
    payload = _json_object(parts[1], max_token, "payload")
    signing_input = token[: -len(parts[2]) - 1].encode("ascii")
    signature = b64url_decode(parts[2])
    return UnverifiedJws(alg, kid, typ, header, payload, signing_input, signature)


def verify_signature(jws: UnverifiedJws, key: PublicKey, alg: str) -> None:
    """Check the signature by an algorithm that must be the token's and fit the key; raises InvalidToken (RFC 7518 §3)."""
    if alg not in ALGORITHMS or alg != jws.alg:
        raise InvalidToken("the signature algorithm is not accepted", code="token_algorithm")
    if isinstance(key, ec.EllipticCurvePublicKey) and alg in _EC:
        curve, ec_algorithm = _EC[alg]
        # The length check also refuses DER: a P-256 signature is 64 bytes, in no other form.
        fits = _CURVE_NAMES.get(key.curve.name) == curve and len(jws.signature) == 2 * CURVES[curve][1]
        valid = fits and ec_algorithm.verify(jws.signing_input, key, jws.signature)
    elif isinstance(key, rsa.RSAPublicKey) and alg in _RSA:
        fits = MIN_RSA_BITS <= key.key_size <= MAX_RSA_BITS
        valid = fits and _RSA[alg].verify(jws.signing_input, key, jws.signature)
    else:
        raise InvalidToken("the signature algorithm does not fit the key", code="token_algorithm")
    if not valid:
        raise InvalidToken("the signature is not valid", code="token_signature")


def sign_compact(
    header: Mapping[str, JsonValue], payload: Mapping[str, JsonValue], sign: Callable[[bytes], bytes]
) -> str:
    """Write a compact JWS; ``sign`` gives the raw JOSE signature (r and s side by side for ECDSA) of the bytes."""
    return _signed(b64url_encode(_compact(header)), _compact(payload), sign)


def sign_text(header: Mapping[str, str], payload: str, sign: Callable[[bytes], bytes]) -> str:
    """Do as :func:`sign_compact` with a payload that is JSON text already: these very characters are signed."""
    return _signed(_encoded_header(tuple(header.items())), payload.encode("utf-8"), sign)


@overload
def numeric_date(payload: Mapping[str, JsonValue], name: str, *, required: Literal[True]) -> int: ...
@overload
def numeric_date(payload: Mapping[str, JsonValue], name: str, *, required: bool) -> int | None: ...
def numeric_date(payload: Mapping[str, JsonValue], name: str, *, required: bool) -> int | None:
    """Read a claim of seconds since 1970: an integer from 0 to the year 9999; raises InvalidToken (RFC 7519 §2)."""
    if name not in payload:
        if required:
            raise InvalidToken(f"the claim {name} is missing", code="token_claim_missing")
        return None
    value = payload[name]
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MAX_DATE:
        raise InvalidToken(f"the claim {name} is not a whole number of seconds", code="token_claim_invalid")
    return value


def jwk_from_public_key(key: PublicKey) -> dict[str, str]:
    """Give the members that RFC 7518 §6 requires of a public key, and no others."""
    if isinstance(key, rsa.RSAPublicKey):
        rsa_numbers = key.public_numbers()
        return {"kty": "RSA", "n": _uint(rsa_numbers.n), "e": _uint(rsa_numbers.e)}
    name = _CURVE_NAMES.get(key.curve.name)
    if name is None:
        raise InvalidToken("the key's curve is not accepted", code="jwk_curve")
    ec_numbers, size = key.public_numbers(), CURVES[name][1]
    return {"kty": "EC", "crv": name, "x": _uint(ec_numbers.x, size), "y": _uint(ec_numbers.y, size)}


def public_key_from_jwk(jwk: Mapping[str, JsonValue]) -> PublicKey:
    """Read a public EC (P-256, P-384, P-521) or RSA (2048 to 8192 bits) key; raises InvalidToken (RFC 7518 §6)."""
    if not PRIVATE_MEMBERS.isdisjoint(jwk):
        raise InvalidToken("the JWK holds private members", code="jwk_private")
    operations = jwk.get("key_ops", ["verify"])
    if jwk.get("use") == "enc" or not isinstance(operations, list) or "verify" not in operations:
        raise InvalidToken("the JWK is not for verifying signatures", code="jwk_use")
    kty = jwk.get("kty")
    if kty == "EC":
        return _ec_key(jwk)
    if kty == "RSA":
        return _rsa_key(jwk)
    raise InvalidToken("the JWK's key type is not accepted", code="jwk_key_type")


def thumbprint(key: PublicKey) -> str:
    """Give the key's SHA-256 thumbprint in base64url (RFC 7638)."""
    return b64url_encode(hashlib.sha256(strictjson.canonical(jwk_from_public_key(key))).digest())


def _ec_key(jwk: Mapping[str, JsonValue]) -> ec.EllipticCurvePublicKey:
    curve, size = CURVES.get(_member(jwk, "crv"), (None, 0))
    if curve is None:
        raise InvalidToken("the JWK's curve is not accepted", code="jwk_curve")
    x, y = b64url_decode(_member(jwk, "x")), b64url_decode(_member(jwk, "y"))
    if len(x) != size or len(y) != size:
        raise InvalidToken("a coordinate of the JWK has the wrong length", code="jwk_malformed")
    try:
        # Refuses a point that is not on the curve.
        return ec.EllipticCurvePublicNumbers(int.from_bytes(x), int.from_bytes(y), curve()).public_key()
    except (ValueError, UnsupportedAlgorithm):
        raise InvalidToken("the JWK is not a point of its curve", code="jwk_malformed") from None


def _rsa_key(jwk: Mapping[str, JsonValue]) -> rsa.RSAPublicKey:
    n, e = b64url_decode(_member(jwk, "n")), b64url_decode(_member(jwk, "e"))
    if n[:1] in (b"", b"\x00") or e[:1] in (b"", b"\x00"):
        raise InvalidToken("a number of the JWK is not in its shortest form", code="jwk_malformed")
    modulus, exponent = int.from_bytes(n), int.from_bytes(e)
    if not MIN_RSA_BITS <= modulus.bit_length() <= MAX_RSA_BITS or modulus % 2 == 0:
        raise InvalidToken(f"the RSA key does not have {MIN_RSA_BITS} to {MAX_RSA_BITS} bits", code="jwk_weak")
    if exponent not in _PUBLIC_EXPONENTS or exponent % 2 == 0:
        raise InvalidToken("the RSA key's public exponent is not accepted", code="jwk_weak")
    if all(modulus % prime in powers for prime, powers in _ROCA.items()):
        raise InvalidToken("the RSA key comes from a generator that is broken", code="jwk_weak")
    try:
        return rsa.RSAPublicNumbers(exponent, modulus).public_key()
    except ValueError:
        raise InvalidToken("the JWK is not an RSA key", code="jwk_malformed") from None


def _member(jwk: Mapping[str, JsonValue], name: str) -> str:
    value = jwk.get(name)
    if not isinstance(value, str):
        raise InvalidToken(f"the JWK's member {name} is missing or not text", code="jwk_malformed")
    return value


def _uint(number: int, size: int = 0) -> str:
    return b64url_encode(number.to_bytes(size or (number.bit_length() + 7) // 8))


def _json_object(text: str, limit: int, part: str) -> dict[str, JsonValue]:
    try:
        value = strictjson.loads(b64url_decode(text), max_bytes=limit)
    except InvalidJson as error:
        raise InvalidToken(f"the token's {part}: {error.message}", code="token_malformed") from None
    if not isinstance(value, dict):
        raise InvalidToken(f"the token's {part} is not a JSON object", code="token_malformed")
    return value


def _check_header(header: Mapping[str, JsonValue], allowed: frozenset[str]) -> tuple[str, str | None, str | None]:
    if not header.keys() <= allowed or not _NEVER.isdisjoint(header):
        raise InvalidToken("the token's header holds a parameter that is not allowed", code="token_header")
    alg, kid, typ = header.get("alg"), header.get("kid"), header.get("typ")
    if not isinstance(alg, str) or alg not in ALGORITHMS:
        raise InvalidToken("the signature algorithm is not accepted", code="token_algorithm")
    if "kid" in header and not (isinstance(kid, str) and len(kid) <= MAX_KEY_ID and _KEY_ID.fullmatch(kid)):
        raise InvalidToken("the token's key ID is not short printable text", code="token_header")
    if "typ" in header and not (isinstance(typ, str) and typ):
        raise InvalidToken("the token's type is not text", code="token_header")
    return alg, kid if isinstance(kid, str) else None, typ if isinstance(typ, str) else None


def _signed(header: str, payload: bytes, sign: Callable[[bytes], bytes]) -> str:
    signing_input = f"{header}.{b64url_encode(payload)}"
    return f"{signing_input}.{b64url_encode(sign(signing_input.encode('ascii')))}"


@lru_cache(maxsize=64)
def _encoded_header(members: tuple[tuple[str, str], ...]) -> str:
    """Encode a header: a key signs thousands of tokens under the same."""
    return b64url_encode(_compact(dict(members)))


def _compact(members: Mapping[str, JsonValue]) -> bytes:
    return _WRITER.encode(dict(members)).encode("utf-8")


_WRITER: Final = json.JSONEncoder(separators=(",", ":"), ensure_ascii=False, allow_nan=False)


_TO_URL: Final = bytes.maketrans(b"+/", b"-_")
# The standard alphabet's own two signs are mapped to something no canonical text can hold.
_FROM_URL: Final = bytes.maketrans(b"-_+/", b"+/==")
