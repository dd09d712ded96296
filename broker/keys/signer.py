"""The contract of a key: sign bytes, sign a certificate, show the public half, show nothing else."""

from collections.abc import Callable, Iterable
from typing import Final, Literal, Protocol, TypeAlias

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

# One algorithm everywhere: every SPIFFE validator takes it, and there is nothing to negotiate (RFC 7518 §3.4).
ALGORITHM: Final = "ES256"

KeyName: TypeAlias = Callable[[ec.EllipticCurvePublicKey], str]
"""Makes a key's name from its public half, where the name says which key it is."""


class Signer(Protocol):
    """One private key that stays where it is."""

    @property
    def id(self) -> str:
        """The name under which the key manager holds it; in JOSE also the ``kid``."""
        ...

    @property
    def algorithm(self) -> Literal["ES256"]:
        """The JOSE name of its one algorithm."""
        ...

    @property
    def public_key(self) -> ec.EllipticCurvePublicKey:
        """The public half, on P-256."""
        ...

    def sign(self, data: bytes) -> bytes:
        """Sign with ECDSA and SHA-256; 64 bytes ``r || s`` as JOSE wants them (RFC 7518 §3.4)."""
        ...

    def sign_der(self, data: bytes) -> bytes:
        """Sign with ECDSA and SHA-256; the signature as X.509 wants it (RFC 3279 §2.2.3)."""
        ...

    def certify(self, builder: x509.CertificateBuilder) -> x509.Certificate:
        """Sign a complete certificate with ECDSA and SHA-256 (RFC 5280 §4.1.1.2)."""
        ...

    def request(self, builder: x509.CertificateSigningRequestBuilder) -> x509.CertificateSigningRequest:
        """Sign a certificate request, which proves that the key is held (RFC 2986)."""
        ...


class KeyManager(Protocol):
    """Makes keys and finds them again by name. To make and to forget one may take as long as a disk does."""

    async def generate(self, name: str | KeyName) -> Signer:
        """Make a P-256 key under a new name, kept when this returns; raises Conflict when the name is taken, Unavailable."""
        ...

    def signer(self, key_id: str) -> Signer:
        """Find a key; ``NotFound`` when it is not held here."""
        ...

    def ids(self) -> Iterable[str]:
        """Name every key that is held here."""
        ...

    async def remove(self, key_id: str) -> None:
        """Forget a key, which is not held any more from the call on; a name that is not held is no error. Raises Unavailable."""
        ...
