"""Under which key the agent encrypts what it keeps, chosen once at the start (ADR 0071).

A file that the operator names, else a key that ends with the boot: in the kernel's keyring, or beside what it
encrypts where that lies in memory. Where none can be had, nothing is kept.
"""

import os
import stat
from pathlib import Path
from typing import Final

from broker.agent import keyring
from broker.agent.private_file import PrivateFile
from broker.agent.sealed import KEY_SIZE, SealingKey
from broker.attestation.kernel import filesystem_type
from broker.errors import InvalidJson, Misconfigured
from broker.telemetry.log import get_logger

KEY_FILE: Final = "at-rest.key"
DESCRIPTION: Final = "identity-broker:agent"  # one per user: a user may have 200 keys, and agents of one user one trust
_IN_MEMORY: Final = frozenset({0x01021994, 0x858458F6})  # TMPFS_MAGIC, RAMFS_MAGIC (statfs(2))
_HINT: Final = "set at_rest_key_path to a file of 32 random bytes, readable by the agent's user alone"

_log = get_logger("agent.at_rest")


def named_key(path: Path) -> SealingKey:
    """Read the operator's key; raises Misconfigured (``at_rest_key_unusable``) unless it is 32 bytes for us alone.

    Links are followed: secrets that Kubernetes mounts are links.
    """
    try:
        with os.fdopen(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as file:
            facts = os.fstat(file.fileno())
            content = file.read(KEY_SIZE + 1) if stat.S_ISREG(facts.st_mode) else b""
    except OSError as error:
        raise _unusable(path, error.strerror or "it cannot be read") from error
    if facts.st_uid not in {0, os.geteuid()} or facts.st_mode & 0o027:
        raise _unusable(path, "others than the agent's user may read or replace it")
    if len(content) != KEY_SIZE:
        raise _unusable(path, f"it does not hold exactly {KEY_SIZE} bytes")
    return SealingKey(content)


def _unusable(path: Path, reason: str) -> Misconfigured:
    return Misconfigured(
        f"the key at rest {path} is not usable: {reason}",
        code="at_rest_key_unusable",
        hint=f"make one: (umask 077; openssl rand -out {path} {KEY_SIZE})",
    )


def chosen(named: SealingKey | None, directory: Path) -> SealingKey | None:
    """Give the key for what may be lost with the boot, and say where it is, and what stays in clear."""
    if named is not None:
        _log.info("at_rest_key", source="file")
        return named
    if not in_memory(directory):
        _log.warning("agent_key_in_clear", path=str(directory), hint=_HINT)
    return boot_key(directory)


def boot_key(directory: Path, *, description: str = DESCRIPTION) -> SealingKey | None:
    """Give the key that ends with this boot, None where there is no place for one.

    ``directory`` is the agent's private one, made and held.
    """
    try:
        key = SealingKey(keyring.shared(description, os.urandom(KEY_SIZE)))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "it is not ours"
    else:
        _log.info("at_rest_key", source="keyring")
        return key
    if in_memory(directory):
        try:
            key = _beside(directory)
        except OSError as error:
            reason = error.strerror or type(error).__name__
        else:
            _log.info("at_rest_key", source="memory", reason=reason)
            return key
    _log.warning("at_rest_key_missing", reason=reason, hint=_HINT)
    return None


def in_memory(directory: Path) -> bool:
    """Whether what is written there is in memory, and never on a disk but for swap."""
    held = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return filesystem_type(held) in _IN_MEMORY
    finally:
        os.close(held)


def _beside(directory: Path) -> SealingKey:
    file = PrivateFile(directory / KEY_FILE, max_size=KEY_SIZE)
    try:
        return SealingKey(file.read() or b"")
    except (InvalidJson, ValueError):
        secret = os.urandom(KEY_SIZE)
        file.write(secret)
        return SealingKey(secret)
