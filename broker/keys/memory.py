"""Keys that live in this process and die with it: the default, because nothing on a disk can be copied.

A restart therefore makes new authorities; the old public halves stay published until what they signed has expired
(``broker/server/authority/rotation``).
"""

from collections.abc import Iterable
from typing import Literal, final

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

from broker.errors import Conflict, NotFound
from broker.keys.signer import ALGORITHM, Signer

_SHA256 = hashes.SHA256()
_ECDSA = ec.ECDSA(_SHA256)
_COORDINATE_BYTES = 32


@final
class _MemorySigner:
    """A P-256 key in this process."""

    __slots__ = ("_id", "_key", "_public_key")

    def __init__(self, key_id: str, key: ec.EllipticCurvePrivateKey) -> None:
        self._id = key_id
        self._key = key
        self._public_key = key.public_key()

    @property
    def id(self) -> str:
        """The name under which it is held."""
        return self._id

    @property
    def algorithm(self) -> Literal["ES256"]:
        """The JOSE name of its one algorithm."""
        return ALGORITHM

    @property
    def public_key(self) -> ec.EllipticCurvePublicKey:
        """The public half."""
        return self._public_key

    def sign(self, data: bytes) -> bytes:
        """Sign with ES256; ``r || s``."""
        r, s = decode_dss_signature(self._key.sign(data, _ECDSA))
        return r.to_bytes(_COORDINATE_BYTES, "big") + s.to_bytes(_COORDINATE_BYTES, "big")

    def sign_der(self, data: bytes) -> bytes:
        """Sign with ECDSA and SHA-256; DER."""
        return self._key.sign(data, _ECDSA)

    def certify(self, builder: x509.CertificateBuilder) -> x509.Certificate:
        """Sign a complete certificate."""
        return builder.sign(self._key, _SHA256)

    def __repr__(self) -> str:
        return f"Signer({self._id!r}, <secret>)"

    def __reduce__(self) -> str:
        # Pickle would be a second way out for the key.
        raise TypeError("a signer is not serialised")


@final
class MemoryKeys:
    """The key manager whose keys end with the process."""

    __slots__ = ("_signers",)

    def __init__(self) -> None:
        self._signers: dict[str, _MemorySigner] = {}

    def generate(self, key_id: str) -> Signer:
        """Make a P-256 key under a new name; ``Conflict`` when the name is taken."""
        if key_id in self._signers:
            raise Conflict(f"there is a key {key_id!r} already", code="key_exists")
        signer = self._signers[key_id] = _MemorySigner(key_id, ec.generate_private_key(ec.SECP256R1()))
        return signer

    def signer(self, key_id: str) -> Signer:
        """Find a key; ``NotFound`` when it is not held here."""
        try:
            return self._signers[key_id]
        except KeyError:
            raise NotFound(f"no key {key_id!r} is held here", code="key_not_found") from None

    def ids(self) -> Iterable[str]:
        """Name every key that is held here."""
        return tuple(self._signers)

    def remove(self, key_id: str) -> None:
        """Forget a key; a name that is not held is no error."""
        self._signers.pop(key_id, None)

    def __repr__(self) -> str:
        return f"MemoryKeys({len(self._signers)} keys, <secret>)"
