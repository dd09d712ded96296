"""DPoP from the client's side: a key that this process keeps, and a fresh proof for each request (RFC 9449 §4).

For where TLS ends before the service: the token is bound to the key, and the key outlives every certificate. It is in memory
only, and its owner never sees it.
"""

import secrets
from typing import Final

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

from broker.clock import Clock, SystemClock
from broker.spiffe import jose
from broker.spiffe.strictjson import JsonValue
from broker.tasks.dpop import ALGORITHM, PROOF_TYPE, token_hash

JTI_BYTES: Final = 16
_COORDINATE: Final = 32  # bytes, of P-256


class ProofKey:
    """A P-256 key for proofs, made anew; ``repr`` shows its thumbprint only."""

    def __init__(self, clock: Clock | None = None) -> None:
        """Make a key."""
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._clock = clock or SystemClock()
        self._jwk: dict[str, JsonValue] = {**jose.jwk_from_public_key(self._key.public_key())}
        self.jkt = jose.thumbprint(self._key.public_key())
        """The thumbprint by which tokens are bound to it (RFC 7638)."""

    def __repr__(self) -> str:
        """Name the key by its thumbprint."""
        return f"ProofKey({self.jkt})"

    def proof(self, method: str, url: str, *, token: str = "", nonce: str = "") -> str:
        """Make the value of one ``DPoP`` header: for this method and address, the token beside it, the server's nonce."""
        payload: dict[str, JsonValue] = {
            "jti": secrets.token_urlsafe(JTI_BYTES),
            "htm": method,
            "htu": url.split("#", 1)[0].split("?", 1)[0],
            "iat": int(self._clock.now().timestamp()),
        }
        if token:
            payload["ath"] = token_hash(token)
        if nonce:
            payload["nonce"] = nonce
        return jose.sign_compact({"alg": ALGORITHM, "typ": PROOF_TYPE, "jwk": self._jwk}, payload, self._sign)

    def _sign(self, data: bytes) -> bytes:
        r, s = decode_dss_signature(self._key.sign(data, ec.ECDSA(hashes.SHA256())))
        return r.to_bytes(_COORDINATE) + s.to_bytes(_COORDINATE)
