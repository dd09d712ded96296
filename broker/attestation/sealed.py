"""A file's content in memory that nobody can change any more: what was hashed there is what runs.

Such memory is a file without a name, with an inode of its own: a program that runs from it is like no other process's
executable. Knows nothing of what is run, and by whom.
"""

import fcntl
import hashlib
import os
from typing import Final

from broker.errors import Invalid

_BLOCK: Final = 1 << 20
_SEALS: Final = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
_MFD_EXEC: Final = 0x10  # memfd_create(2), since Linux 6.3


class TooLarge(Invalid):
    """The content does not fit into what may be held in memory."""

    code = "too_large"


def executable_memory(name: str) -> int:
    """Make empty memory that can be sealed and run; give its descriptor, close-on-exec.

    Raises ``OSError``; with ``vm.memfd_noexec = 2`` always.
    """
    flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
    try:
        return os.memfd_create(name, flags | _MFD_EXEC)
    except OSError:
        return os.memfd_create(name, flags)  # before Linux 6.3: always executable


def fill(memory: int, source: int, limit: int) -> None:
    """Copy a file from where it is read to its end. Raises ``TooLarge`` beyond ``limit`` bytes, and ``OSError``."""
    size = 0
    while block := os.read(source, _BLOCK):
        size += len(block)
        if size > limit:
            raise TooLarge(f"larger than {limit} bytes")
        written = 0
        while written < len(block):
            written += os.write(memory, block[written:])


def seal(memory: int) -> None:
    """Let nobody change content or size any more, us included. Raises ``OSError``."""
    fcntl.fcntl(memory, fcntl.F_ADD_SEALS, _SEALS)


def digest(file: int) -> str:
    """Give the SHA-256 of a file's whole content, in hexadecimal; where it is read does not move. Raises ``OSError``."""
    found, at = hashlib.sha256(), 0
    while block := os.pread(file, _BLOCK, at):
        found.update(block)
        at += len(block)
    return found.hexdigest()
