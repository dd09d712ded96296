"""A secret in the kernel's keyring of this user: in memory alone, gone with the boot (keyrings(7), user-keyring(7)).

It is readable by this user's processes, as a 0600 file would be, and by no file system, snapshot or backup.
"""

import ctypes
import errno
import os
import platform
from typing import Final

_NUMBERS: Final = {"x86_64": (248, 250), "aarch64": (217, 219), "riscv64": (217, 219)}  # add_key, keyctl
_PROCESS: Final = -2  # KEY_SPEC_PROCESS_KEYRING
_USER: Final = -4  # KEY_SPEC_USER_KEYRING
_SETPERM, _SEARCH, _READ, _MOVE = 5, 10, 11, 30  # KEYCTL_…; MOVE since Linux 5.3
_EXCLUSIVE: Final = 1  # KEYCTL_MOVE_EXCL
_OURS: Final = 0x3F0B0000  # whoever possesses it: all; this user: view, read, search; nobody else anything
_MAX_SIZE: Final = 256  # bytes

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def shared(description: str, fresh: bytes) -> bytes:
    """Give this user's secret of that name; where there is none, ``fresh`` becomes it. At most 256 bytes.

    Of several processes that begin at once one is first, and all get its secret. Raises OSError: the kernel has no
    keyrings, a seccomp filter or a quota refuses, or what is there is not readable.
    """
    try:
        return _found(description)
    except OSError as error:
        if error.errno != errno.ENOKEY:
            raise
    key = _add(description, fresh)
    _keyctl(_SETPERM, key, _OURS)
    try:
        _keyctl(_MOVE, key, _PROCESS, _USER, _EXCLUSIVE)
    except OSError as error:
        if error.errno != errno.EEXIST:
            raise
    return _found(description)


def _found(description: str) -> bytes:
    key = _keyctl(_SEARCH, _USER, b"user", description.encode(), 0)
    content = ctypes.create_string_buffer(_MAX_SIZE)
    size = _keyctl(_READ, key, content, _MAX_SIZE)
    if size > _MAX_SIZE:
        raise OSError(errno.EMSGSIZE, os.strerror(errno.EMSGSIZE))
    return content.raw[:size]


def _add(description: str, content: bytes) -> int:
    add_key, _ = _numbers()
    given = (b"user", description.encode(), content, _long(len(content)), _long(_PROCESS))
    return _said(_libc.syscall(_long(add_key), *given))


def _keyctl(operation: int, *arguments: int | bytes | ctypes.Array[ctypes.c_char]) -> int:
    _, keyctl = _numbers()
    given = [_long(one) if isinstance(one, int) else one for one in arguments]
    return _said(_libc.syscall(_long(keyctl), _long(operation), *given))


def _said(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def _long(number: int) -> ctypes.c_long:
    return ctypes.c_long(number)


def _numbers() -> tuple[int, int]:
    try:
        return _NUMBERS[platform.machine()]
    except KeyError:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS)) from None
