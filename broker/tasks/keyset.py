"""The task-token keys as a JWK Set (RFC 7517): one text for ``/keys`` and for the feed, read back by verifiers.

Every key is ES256 and nothing else: a set that holds another kind is refused whole, because a verifier that skipped a key
would also skip the warning.
"""

from collections.abc import Mapping

from cryptography.hazmat.primitives.asymmetric import ec

from broker.errors import Invalid, InvalidToken
from broker.spiffe import jose, strictjson
from broker.spiffe.jose import PublicKey

MAX_KEYS = 64
"""Task-token keys in one set: replicas and their predecessors, with room."""


def write_keys(keys: Mapping[str, PublicKey]) -> str:
    """Write the keys by key ID, in the order of their IDs."""
    return strictjson.canonical(
        {
            "keys": [
                {**jose.jwk_from_public_key(key), "kid": kid, "use": "sig", "alg": "ES256"}
                for kid, key in sorted(keys.items())
            ]
        }
    ).decode()


def read_keys(document: str | bytes) -> dict[str, PublicKey]:
    """Read what :func:`write_keys` wrote.

    Raises:
        Invalid: it is not such a set.
    """
    data = document.encode() if isinstance(document, str) else document
    members = strictjson.loads(data)
    listed = members.get("keys") if isinstance(members, dict) else None
    if not isinstance(listed, list) or len(listed) > MAX_KEYS:
        raise Invalid("not a JWK Set of task-token keys", code="invalid_jwks")
    keys: dict[str, PublicKey] = {}
    for jwk in listed:
        kid = jwk.get("kid") if isinstance(jwk, dict) else None
        if not isinstance(jwk, dict) or not isinstance(kid, str) or not kid or kid in keys or jwk.get("alg") != "ES256":
            raise Invalid("a task-token key lacks its ID or its algorithm", code="invalid_jwks")
        try:
            key = jose.public_key_from_jwk(jwk)
        except InvalidToken as error:
            raise Invalid(f"a task-token key: {error.message}", code="invalid_jwks") from None
        if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
            raise Invalid("a task-token key is not on P-256", code="invalid_jwks")
        keys[kid] = key
    return keys
