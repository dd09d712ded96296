"""Keys at rest for tests: one that is named, and a kernel that refuses its keyrings."""

import ctypes
import os
import struct
import sys
from pathlib import Path

from broker.agent import keyring
from broker.agent.sealed import KEY_SIZE

_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _FILTER = 38, 22, 2
_LOAD, _EQUAL, _RETURN = 0x20, 0x15, 0x06
_ALLOW, _REFUSE = 0x7FFF0000, 0x00050000 | 1  # SECCOMP_RET_ALLOW, SECCOMP_RET_ERRNO | EPERM


def key_file(directory: Path) -> Path:
    """Make a key as an operator would, or give the one that is there."""
    path = directory / "at-rest.key"
    if not path.exists():
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(os.urandom(KEY_SIZE))
    return path


def has_keyring() -> bool:
    """Whether this process may use its user's keyring; a container's seccomp filter usually refuses it."""
    try:
        keyring.shared("identity-broker:test", bytes(KEY_SIZE))
    except OSError:
        return False
    return True


def refuse_keyrings() -> None:
    """Refuse add_key, request_key and keyctl from now on, as container runtimes do; for this process and what it becomes."""
    numbers = range(248, 251) if os.uname().machine == "x86_64" else range(217, 220)
    rules = [(_LOAD, 0, 0, 0), *((_EQUAL, len(numbers) - place, 0, one) for place, one in enumerate(numbers))]
    rules += [(_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _REFUSE)]
    program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *rule) for rule in rules))
    head = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(rules), ctypes.addressof(program)))
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
    assert libc.prctl(_PR_SET_SECCOMP, _FILTER, head, 0, 0) == 0, ctypes.get_errno()


if __name__ == "__main__":
    refuse_keyrings()
    os.execv(sys.argv[1], sys.argv[1:])
