"""Proof that a node has the key of its certificate, and the messages that carry it, both sides; SPIRE's ``x509pop`` wire.

The server asks with a fresh nonce, the node adds its own and signs SHA-256 of both. Who vouches for the certificate is
not known here. Messages are read strictly: one copy of each member, one form of each value.
"""

import hashlib
import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Self, TypeAlias

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import Prehashed, decode_dss_signature, encode_dss_signature

from broker.attestation.base64_json import members, octets, read, text
from broker.errors import InvalidJson, NotAttested
from broker.spiffe.strictjson import JsonValue

NONCE: Final = 32
"""Bytes of a nonce, as in SPIRE."""
MAX_INTEGER: Final = 66
"""Bytes of an ECDSA signature's r and s: P-521 is the largest curve."""

_DIGEST: Final = Prehashed(hashes.SHA256())
_MGF: Final = padding.MGF1(hashes.SHA256())
_CHAIN, _RSA, _ECDSA = "certificates", "rsa_signature", "ecdsa_signature"

PublicKey: TypeAlias = rsa.RSAPublicKey | ec.EllipticCurvePublicKey
PrivateKey: TypeAlias = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey


@dataclass(frozen=True, slots=True)
class Challenge:
    """The question of one attestation. Its nonce is used for one response."""

    key: PublicKey = field(repr=False)
    nonce: bytes = field(repr=False)

    @classmethod
    def to(cls, key: PublicKey) -> Self:
        """Make one for the holder of a key, with a nonce that nobody has seen."""
        return cls(key, secrets.token_bytes(NONCE))

    def message(self) -> bytes:
        """Write it."""
        return _message(_RSA if isinstance(self.key, rsa.RSAPublicKey) else _ECDSA, {"nonce": self.nonce})

    def check(self, response: bytes) -> None:
        """Refuse a response that does not prove the key; raises NotAttested."""
        try:
            if isinstance(self.key, rsa.RSAPublicKey):
                self._check_rsa(self.key, _chosen(response, _RSA, "nonce", "signature"))
            else:
                self._check_ecdsa(self.key, _chosen(response, _ECDSA, "nonce", "r", "s"))
        except InvalidJson as error:
            raise NotAttested(f"the response: {error.message}", code="evidence_malformed") from None
        except (InvalidSignature, ValueError):
            raise NotAttested("the node did not prove that it has the key", code="possession_not_proven") from None

    def _check_rsa(self, key: rsa.RSAPublicKey, proof: Mapping[str, JsonValue]) -> None:
        digest = _combined(self.nonce, _nonce(proof))
        # Go's default salt is as long as fits, ours as the digest: the signature itself says which.
        key.verify(octets(proof["signature"]), digest, padding.PSS(_MGF, padding.PSS.AUTO), _DIGEST)

    def _check_ecdsa(self, key: ec.EllipticCurvePublicKey, proof: Mapping[str, JsonValue]) -> None:
        digest = _combined(self.nonce, _nonce(proof))
        r, s = (int.from_bytes(octets(proof[name], MAX_INTEGER)) for name in ("r", "s"))
        key.verify(encode_dss_signature(r, s), digest, ec.ECDSA(_DIGEST))


def answer(key: PrivateKey, challenge: bytes) -> bytes:
    """Sign a challenge's nonce together with a fresh one; raises InvalidJson for a challenge of another kind."""
    kind = _RSA if isinstance(key, rsa.RSAPrivateKey) else _ECDSA
    own = secrets.token_bytes(NONCE)
    digest = _combined(_nonce(_chosen(challenge, kind, "nonce")), own)
    if isinstance(key, rsa.RSAPrivateKey):
        signature = key.sign(digest, padding.PSS(_MGF, padding.PSS.DIGEST_LENGTH), _DIGEST)
        return _message(kind, {"nonce": own, "signature": signature})
    r, s = (
        number.to_bytes((number.bit_length() + 7) // 8)
        for number in decode_dss_signature(key.sign(digest, ec.ECDSA(_DIGEST)))
    )
    return _message(kind, {"nonce": own, "r": r, "s": s})


def chain_message(chain: Sequence[bytes]) -> bytes:
    """Write the evidence: the chain, leaf first, in DER."""
    return json.dumps({_CHAIN: [text(der) for der in chain]}).encode()


def read_chain(payload: bytes, most: int) -> tuple[bytes, ...]:
    """Read the evidence, decoding no certificate if there are too many; raises NotAttested."""
    try:
        value = read(payload)
        texts = members(value, _CHAIN)[_CHAIN]
        count = len(texts) if isinstance(texts, list) else 0
        if isinstance(texts, list) and 1 <= count <= most:
            return tuple(octets(one) for one in texts)
    except InvalidJson as error:
        raise NotAttested(f"the evidence: {error.message}", code="evidence_malformed") from None
    if count:
        raise NotAttested("the node sent too many intermediates", code="certificate_chain_length")
    raise NotAttested("the evidence: there is no certificate", code="evidence_malformed")


def _message(kind: str, content: Mapping[str, bytes]) -> bytes:
    empty: dict[str, object] = {_RSA: None, _ECDSA: None}
    return json.dumps(empty | {kind: {name: text(value) for name, value in content.items()}}).encode()


def _chosen(message: bytes, kind: str, *names: str) -> Mapping[str, JsonValue]:
    """Read a challenge or response of this kind and of no other; raises InvalidJson."""
    value = read(message)
    if isinstance(value, dict):
        # Go writes the kind that it does not use as null.
        value = {name: one for name, one in value.items() if one is not None}
    return members(members(value, kind)[kind], *names)


def _nonce(content: Mapping[str, JsonValue]) -> bytes:
    nonce = octets(content["nonce"])
    if len(nonce) != NONCE:
        raise InvalidJson(f"a nonce does not have {NONCE} bytes")
    return nonce


def _combined(challenge: bytes, response: bytes) -> bytes:
    return hashlib.sha256(challenge + response).digest()
