"""A TPM in software: as much of one as credential activation needs, by other means than the product's.

Keys and derivations are the cryptography library's own; it gives out a secret only for its own attestation key's name.
"""

import hashlib
import hmac
from dataclasses import dataclass, field

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from cryptography.hazmat.primitives.kdf.concatkdf import ConcatKDFHash
from cryptography.hazmat.primitives.kdf.kbkdf import KBKDFHMAC, CounterLocation, Mode
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from broker.attestation.contract import AttestorFailed
from broker.attestation.tpm_device import TpmKeys

try:
    from cryptography.hazmat.decrepit.ciphers.modes import CFB
except ImportError:  # where the library has not moved it yet
    from cryptography.hazmat.primitives.ciphers.modes import CFB

GOOD = 0x00050472  # an attestation key's attributes: those of swtpm's vectors


def u16(number: int) -> bytes:
    return number.to_bytes(2)


def sized(octets: bytes) -> bytes:
    return u16(len(octets)) + octets


NULL, ECDSA, P256 = u16(0x0010), u16(0x0018) + u16(0x000B), u16(0x0003) + u16(0x0010)
POINT = sized(b"\x11" * 32) + sized(b"\x22" * 32)


def ak_area(
    *, kind=0x0023, name=0x000B, attributes=GOOD, policy=b"", symmetric=NULL, scheme=ECDSA, details=P256, unique=POINT
) -> bytes:
    """TPMT_PUBLIC of an attestation key on P-256, each field by choice."""
    head = u16(kind) + u16(name) + attributes.to_bytes(4) + sized(policy)
    return head + symmetric + scheme + details + unique


def rsa_area(bits: int = 2048, exponent: int = 0, modulus: bytes | None = None, **more) -> bytes:
    unique = sized(b"\xc3" * (bits // 8) if modulus is None else modulus)
    details = u16(bits) + exponent.to_bytes(4)
    return ak_area(kind=0x0001, scheme=u16(0x0014) + u16(0x000B), details=details, unique=unique, **more)


@dataclass
class SoftwareTpm:
    """One endorsement key, and one attestation key whose private half nobody needs."""

    key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey
    certificate: bytes | None = None
    ak: bytes = field(default_factory=ak_area)

    @property
    def public(self) -> bytes:
        return self.key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)

    @property
    def pub_hash(self) -> str:
        return hashlib.sha256(self.public).hexdigest()

    def keys(self) -> TpmKeys:
        return TpmKeys(self.public, self.certificate, sized(self.ak))

    def activate(self, blob: bytes, encrypted_seed: bytes) -> bytes:
        name = u16(0x000B) + hashlib.sha256(self.ak).digest()
        return self.open(name, blob, encrypted_seed)

    def open(self, name: bytes, blob: bytes, encrypted_seed: bytes) -> bytes:
        high = self.key.key_size in (384, 3072)
        digest, aes = (hashes.SHA384(), 32) if high else (hashes.SHA256(), 16)
        seed = self._seed(digest, unsized(encrypted_seed))
        body = unsized(blob)
        size = int.from_bytes(body[:2])
        mac, encrypted = body[2 : 2 + size], body[2 + size :]
        mac_key = derived(digest, seed, b"INTEGRITY", b"", digest.digest_size)
        if not hmac.compare_digest(mac, hmac.digest(mac_key, encrypted + name, digest.name)):
            raise AttestorFailed("the TPM refused: integrity check failed", code="tpm_failed")
        cipher = Cipher(algorithms.AES(derived(digest, seed, b"STORAGE", name, aes)), CFB(bytes(16))).decryptor()
        return unsized(cipher.update(encrypted) + cipher.finalize())

    def _seed(self, digest, sent: bytes) -> bytes:
        if isinstance(self.key, rsa.RSAPrivateKey):
            return self.key.decrypt(sent, padding.OAEP(padding.MGF1(digest), digest, b"IDENTITY\0"))
        width = self.key.key_size // 8
        x, y = sent[2 : 2 + width], sent[4 + width :]
        assert sent == sized(x) + sized(y) and len(y) == width
        theirs = ec.EllipticCurvePublicNumbers(int.from_bytes(x), int.from_bytes(y), self.key.curve).public_key()
        own = self.key.public_key().public_numbers().x.to_bytes(width)
        kdf = ConcatKDFHash(digest, digest.digest_size, b"IDENTITY\0" + x + own)
        return kdf.derive(self.key.exchange(ec.ECDH(), theirs))


def derived(digest, key: bytes, label: bytes, context: bytes, size: int) -> bytes:
    """KDFa, which is the library's KBKDF."""
    kdf = KBKDFHMAC(digest, Mode.CounterMode, size, 4, 4, CounterLocation.BeforeFixed, label, context, None)
    return kdf.derive(key)


def unsized(octets: bytes) -> bytes:
    assert int.from_bytes(octets[:2]) == len(octets) - 2
    return octets[2:]
