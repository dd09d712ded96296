"""A P-256 key held by this process: what the key managers ``memory`` and ``disk`` hand out."""

from collections.abc import Callable
from typing import Literal, final

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from broker.keys.signer import ALGORITHM, KeyName

_SHA256 = hashes.SHA256()
_ECDSA = ec.ECDSA(_SHA256)
_COORDINATE_BYTES = 32


@final
class LocalSigner:
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

    def request(self, builder: x509.CertificateSigningRequestBuilder) -> x509.CertificateSigningRequest:
        """Sign a certificate request, which proves that the key is held."""
        return builder.sign(self._key, _SHA256)

    def keep(self, write: Callable[[bytes], None]) -> None:
        """Hand the key, as PKCS#8 in PEM, to who keeps it: for the key manager ``disk`` and nobody else."""
        write(self._key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))

    def __repr__(self) -> str:
        return f"Signer({self._id!r}, <secret>)"

    def __reduce__(self) -> str:
        # Pickle would be a second way out for the key.
        raise TypeError("a signer is not serialised")


def generated(name: str | KeyName) -> LocalSigner:
    """Make a P-256 key; its name may be made from its public half."""
    key = ec.generate_private_key(ec.SECP256R1())
    return LocalSigner(name if isinstance(name, str) else name(key.public_key()), key)
