"""The agent's own key, SVID and bundle in its runtime directory: a restart needs no new join token, a reboot leaves nothing.

One file, 0600 in a 0700 directory, replaced whole: written beside, synced, renamed, and the directory synced. It is
encrypted where the operator names a key (ADR 0071).
"""

import base64
import binascii
import fcntl
import json
import os
import stat
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Self

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_der_private_key

from broker.agent.private_file import PrivateFile
from broker.agent.sealed import OVERHEAD, SealingKey, is_sealed
from broker.errors import BrokerError, InvalidJson, Misconfigured
from broker.spiffe import Bundle, BundleSet, TrustDomain, strictjson
from broker.transport.tls import TlsIdentity

FILE: Final = "identity.json"
_FORMAT: Final = 1
_MAX_SIZE: Final = 4 << 20  # a bundle of some thousand authorities; ours is a few KiB


@dataclass(frozen=True, slots=True)
class StoredIdentity:
    """What proves this agent to the server, and the server to this agent."""

    tls: TlsIdentity = field(repr=False)
    bundle: Bundle
    reattestable: bool = False

    @property
    def bundles(self) -> BundleSet:
        """The bundle as a set of one."""
        return BundleSet.of(self.bundle)

    @classmethod
    def parse(cls, text: bytes, trust_domain: TrustDomain) -> Self:
        """Read the file's content; raises InvalidJson when it is not one of ours."""
        try:
            document: Any = strictjson.loads(text)
            if document["format"] != _FORMAT or document["trust_domain"] != str(trust_domain):
                raise InvalidJson("it is of another format or trust domain")
            key = load_der_private_key(base64.b64decode(document["key"], validate=True), None)
            if not isinstance(key, ec.EllipticCurvePrivateKey):
                raise InvalidJson("its key is of another kind")
            chain = tuple(base64.b64decode(der, validate=True) for der in document["chain"])
            bundle = Bundle.parse(trust_domain, document["bundle"])
            return cls(TlsIdentity(chain, key), bundle, document["reattestable"] is True)
        except (KeyError, TypeError, ValueError, binascii.Error, BrokerError) as error:
            # Not the error itself: it may quote what it read.
            raise InvalidJson("the stored identity cannot be read") from (
                None if isinstance(error, ValueError) else error
            )

    def serialise(self) -> bytes:
        """Write the file's content."""
        key = self.tls.key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())
        document = {
            "format": _FORMAT,
            "trust_domain": str(self.bundle.trust_domain),
            "key": base64.b64encode(key).decode("ascii"),
            "chain": [base64.b64encode(der).decode("ascii") for der in self.tls.chain_der],
            "bundle": self.bundle.to_json(),
            "reattestable": self.reattestable,
        }
        return json.dumps(document).encode()


class IdentityFile:
    """The file, in a directory that is made 0700 and must be ours."""

    def __init__(self, directory: Path, key: SealingKey | None = None) -> None:
        """``key`` None: the file is in clear, for its owner."""
        self._directory = directory
        self._file = PrivateFile(directory / FILE, max_size=_MAX_SIZE + OVERHEAD)
        self._key = key
        self._lock = -1

    def prepare(self) -> None:
        """Make the directory and hold it until :meth:`release`.

        Raises Misconfigured when it cannot be made, others may enter it, or another agent holds it.
        """
        try:
            _make_parents(self._directory)
            self._directory.mkdir(mode=0o700, exist_ok=True)
            facts = os.lstat(self._directory)
        except OSError as error:
            raise Misconfigured(
                f"{self._directory} cannot be made: {error.strerror}",
                hint="set runtime_dir to a directory of the agent",
            ) from error
        if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.geteuid() or stat.S_IMODE(facts.st_mode) & 0o077:
            raise Misconfigured(
                f"{self._directory} is not a directory of this user alone", hint=f"chmod 0700 {self._directory}"
            )

        lock = os.open(self._directory / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(lock)
            raise Misconfigured(
                f"another agent holds {self._directory}", code="runtime_dir_in_use", hint="stop it, or set runtime_dir"
            ) from error
        self._lock = lock

    def release(self) -> None:
        """Let another agent have the directory. Harmless when repeated."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def load(self, trust_domain: TrustDomain) -> StoredIdentity | None:
        """Read what is stored, None where there is nothing; raises InvalidJson when it is damaged.

        One in clear, of before there was a key, is taken up and encrypted now.
        """
        content = self._file.read()
        if content is None:
            return None
        if self._key is not None and is_sealed(content):
            content = self._key.open(FILE, content)
        elif is_sealed(content):
            raise InvalidJson("it is encrypted, and at_rest_key_path is not set")
        elif self._key is not None:
            with suppress(OSError):  # a disk that is full: it is encrypted with the next SVID
                self._write(content)
        return StoredIdentity.parse(content, trust_domain)

    def store(self, identity: StoredIdentity) -> None:
        """Replace what is stored; on return it is on the disk. Raises OSError."""
        self._write(identity.serialise())

    def _write(self, content: bytes) -> None:
        self._file.write(content if self._key is None else self._key.seal(FILE, content))

    def remove(self) -> None:
        """Forget what is stored; harmless when there is nothing."""
        self._file.remove()


def _make_parents(directory: Path) -> None:
    # The workload socket lies beside: whatever the umask says, everybody may pass through.
    for step in reversed([step for step in directory.parents if not step.exists()]):
        step.mkdir(exist_ok=True)
        step.chmod(0o755)
