"""TPM2_MakeCredential in software: a secret that one TPM gives out, and only while it holds one key.

TPM 2.0 Library, Part 1 §24 (credential protection), §11.4.10 (KDFa, KDFe) and annexes B and C (how the seed travels to an
RSA or ECC key). The endorsement keys are those of TCG's EK Credential Profile (§B.3, §B.4): there the key's kind says its
hash and its cipher, so that no node can choose them. Whose the key is, is not known here.
"""

import hashlib
import hmac
import secrets
from dataclasses import dataclass, field
from typing import Final, TypeAlias

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from broker.errors import NotAttested

SECRET: Final = 32
"""Bytes of the secret: a credential holds no more than the digest of the endorsement key's hash."""
EXPONENT: Final = 65537
"""Of an RSA endorsement key (EK Credential Profile §B.3.3): another one could make the work dear."""

PublicKey: TypeAlias = rsa.RSAPublicKey | ec.EllipticCurvePublicKey


@dataclass(frozen=True, slots=True)
class Suite:
    """What the profile fixes for a kind of endorsement key."""

    hash: hashes.HashAlgorithm
    aes_bits: int

    @property
    def size(self) -> int:
        """Bytes of a digest."""
        return self.hash.digest_size


_LOW, _HIGH = Suite(hashes.SHA256(), 128), Suite(hashes.SHA384(), 256)
_RSA_SUITES: Final = {2048: _LOW, 3072: _HIGH}  # templates L-1 and H-6
_ECC_SUITES: Final[dict[type[ec.EllipticCurve], Suite]] = {ec.SECP256R1: _LOW, ec.SECP384R1: _HIGH}  # L-2 and H-3


@dataclass(frozen=True, slots=True)
class EndorsementKey:
    """A public key of one of the profile's kinds."""

    key: PublicKey = field(repr=False)
    suite: Suite

    @classmethod
    def of(cls, key: object) -> "EndorsementKey":
        """Take a public key; raises NotAttested (``ek_key``)."""
        suite = None
        if isinstance(key, rsa.RSAPublicKey) and key.public_numbers().e == EXPONENT:
            suite = _RSA_SUITES.get(key.key_size)
        elif isinstance(key, ec.EllipticCurvePublicKey):
            suite = _ECC_SUITES.get(type(key.curve))
        if suite is None or not isinstance(key, rsa.RSAPublicKey | ec.EllipticCurvePublicKey):
            raise NotAttested(
                "the endorsement key is of another kind than RSA-2048, RSA-3072, P-256 and P-384", code="ek_key"
            )
        return cls(key, suite)

    def pub_hash(self) -> str:
        """Name the TPM: SHA-256 of the key's SubjectPublicKeyInfo in DER, as lower-case hex."""
        return hashlib.sha256(self.key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)).hexdigest()


@dataclass(frozen=True, slots=True)
class Credential:
    """What TPM2_ActivateCredential takes: a TPM2B_ID_OBJECT and a TPM2B_ENCRYPTED_SECRET."""

    blob: bytes = field(repr=False)
    encrypted_seed: bytes = field(repr=False)


def make_credential(ek: EndorsementKey, name: bytes, secret: bytes) -> Credential:
    """Wrap a secret for the holder of an endorsement key and of the object of that name; raises NotAttested (``ek_key``)."""
    try:
        if isinstance(ek.key, rsa.RSAPublicKey):
            seed, sent = _rsa_seed(ek.key, ek.suite)
        else:
            seed, sent = _ecc_seed(ek.key, ec.generate_private_key(ek.key.curve), ek.suite)
    except ValueError:
        raise NotAttested("nothing can be encrypted to the endorsement key", code="ek_key") from None
    return Credential(_sized(_protected(ek.suite, seed, name, secret)), _sized(sent))


def kdfa(algorithm: hashes.HashAlgorithm, key: bytes, label: bytes, context: bytes, bits: int) -> bytes:
    """Derive ``bits``, a multiple of 8, by SP 800-108 in counter mode (Part 1 §11.4.10.2)."""
    derived = b""
    while len(derived) * 8 < bits:
        counter = len(derived) // algorithm.digest_size + 1
        message = counter.to_bytes(4) + label + b"\0" + context + bits.to_bytes(4)
        derived += hmac.digest(key, message, algorithm.name)
    return derived[: bits // 8]


def kdfe(algorithm: hashes.HashAlgorithm, shared: bytes, label: bytes, parties: bytes) -> bytes:
    """Derive one digest by SP 800-56A's concatenation (Part 1 §11.4.10.3): no more than one is ever needed here."""
    return hashlib.new(algorithm.name, (1).to_bytes(4) + shared + label + b"\0" + parties).digest()


def _rsa_seed(key: rsa.RSAPublicKey, suite: Suite) -> tuple[bytes, bytes]:
    seed = secrets.token_bytes(suite.size)
    # The label ends with its zero byte (Part 1 §B.4).
    return seed, key.encrypt(seed, padding.OAEP(padding.MGF1(suite.hash), suite.hash, b"IDENTITY\0"))


def _ecc_seed(key: ec.EllipticCurvePublicKey, own: ec.EllipticCurvePrivateKey, suite: Suite) -> tuple[bytes, bytes]:
    # Coordinates have the curve's full width, leading zeros included (Part 1 §C.8).
    width = key.curve.key_size // 8
    point, theirs = own.public_key().public_numbers(), key.public_numbers()
    x, y = point.x.to_bytes(width), point.y.to_bytes(width)
    shared = own.exchange(ec.ECDH(), key)
    return kdfe(suite.hash, shared, b"IDENTITY", x + theirs.x.to_bytes(width)), _sized(x) + _sized(y)


def _protected(suite: Suite, seed: bytes, name: bytes, secret: bytes) -> bytes:
    """Encrypt, then authenticate together with the name (Part 1 §24.4, §24.5)."""
    cipher_key = kdfa(suite.hash, seed, b"STORAGE", name, suite.aes_bits)
    encrypted = _cfb(cipher_key, _sized(secret))
    mac_key = kdfa(suite.hash, seed, b"INTEGRITY", b"", suite.size * 8)
    return _sized(hmac.digest(mac_key, encrypted + name, suite.hash.name)) + encrypted


def _cfb(key: bytes, plain: bytes) -> bytes:
    """Encrypt by AES-CFB with an initial vector of zeros, as the standard wants: the key is used once."""
    # From single blocks (SP 800-38A §6.3): the library has moved its own CFB about between the versions we work with.
    encryptor = Cipher(algorithms.AES(key), modes.ECB()).encryptor()  # noqa: S305
    done, last = b"", bytes(16)
    for start in range(0, len(plain), 16):
        pad = encryptor.update(last)
        last = bytes(one ^ other for one, other in zip(plain[start : start + 16], pad, strict=False))
        done += last
    return done


def _sized(octets: bytes) -> bytes:
    return len(octets).to_bytes(2) + octets
