"""A private file whose content is encrypted: AES-256-GCM under a key that does not lie beside it (ADR 0071).

Layout: magic (8 bytes), nonce (12, random), ciphertext with its tag (16). The magic and the purpose are authenticated.
"""

import errno
import os
from pathlib import Path
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from broker.agent.private_file import PrivateFile
from broker.errors import InvalidJson

KEY_SIZE: Final = 32  # bytes, AES-256
MAGIC: Final = b"BRKSEAL1"
_NONCE: Final = 12  # bytes; random: one key writes once a second at most, far below the 2**32 of SP 800-38D 8.3
_TAG: Final = 16
OVERHEAD: Final = len(MAGIC) + _NONCE + _TAG


class SealingKey:
    """A secret of this agent, never shown; each purpose has its own key below it (RFC 5869, section 2.3)."""

    __slots__ = ("_secret",)

    def __init__(self, secret: bytes) -> None:
        """``secret``: :data:`KEY_SIZE` uniformly random bytes; raises ValueError for another length."""
        if len(secret) != KEY_SIZE:
            raise ValueError(f"a sealing key has {KEY_SIZE} bytes")
        self._secret = secret

    def seal(self, purpose: str, content: bytes) -> bytes:
        """Encrypt for this purpose."""
        nonce = os.urandom(_NONCE)
        return MAGIC + nonce + self._cipher(purpose).encrypt(nonce, content, MAGIC)

    def open(self, purpose: str, sealed: bytes) -> bytes:
        """Decrypt what :meth:`seal` gave for the same purpose; raises InvalidJson for anything else."""
        if not is_sealed(sealed):
            raise InvalidJson("it is not encrypted")
        nonce, body = sealed[len(MAGIC) : len(MAGIC) + _NONCE], sealed[len(MAGIC) + _NONCE :]
        try:
            return self._cipher(purpose).decrypt(nonce, body, MAGIC)
        except InvalidTag:
            raise InvalidJson("it is damaged, or encrypted under another key") from None

    def _cipher(self, purpose: str) -> AESGCM:
        return AESGCM(HKDFExpand(SHA256(), KEY_SIZE, b"identity-broker " + purpose.encode()).derive(self._secret))


def is_sealed(content: bytes) -> bool:
    """Whether this has the shape of what a key sealed; nothing is proven by it."""
    return content.startswith(MAGIC) and len(content) >= OVERHEAD


class SealedFile:
    """A private file that is never read or written in clear. Without a key it holds nothing."""

    def __init__(self, path: Path, key: SealingKey | None, *, max_size: int) -> None:
        """``max_size`` of the content, in bytes. The file's name is the purpose: one cannot stand in another's place."""
        self._file = PrivateFile(path, max_size=max_size + OVERHEAD)
        self._key = key
        self._purpose = path.name

    def require_key(self) -> SealingKey:
        """Raise OSError (ENOKEY) where there is nothing to encrypt with."""
        if self._key is None:
            raise OSError(errno.ENOKEY, "no key to encrypt it with")
        return self._key

    def read(self) -> bytes | None:
        """Give the content, None where there is no file; raises InvalidJson for what this key did not seal."""
        sealed = self._file.read()
        if sealed is None:
            return None
        if self._key is None:
            raise InvalidJson("there is no key to read it with")
        return self._key.open(self._purpose, sealed)

    def write(self, content: bytes) -> None:
        """Replace the content; on return it is on the disk. Raises OSError."""
        self._file.write(self.require_key().seal(self._purpose, content))

    def remove(self) -> None:
        """Take the file away; harmless when there is none."""
        self._file.remove()
