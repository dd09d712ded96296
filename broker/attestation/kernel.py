"""Four questions to the kernel that Python's ``os`` cannot ask.

``statx`` without synchronising (a hung FUSE server must not stop the agent), the type of the file system behind a
descriptor, whether a pidfd's process is gone, and when the machine started. Knows nothing of attestation.
"""

import ctypes
import os
import select
from typing import NamedTuple

PROC_SUPER_MAGIC = 0x9FA0  # statfs(2)

_AT_STATX_DONT_SYNC = 0x4000  # statx(2): answer from what the kernel holds, never ask a remote or FUSE server
_STATX_INO = 0x100
_STATX_SIZE = 256
_STATFS_SIZE = 256  # struct statfs is 120 bytes on 64-bit Linux; f_type is its first long

_libc = ctypes.CDLL(None, use_errno=True)
_libc.statx.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_uint, ctypes.c_void_p)
_libc.statx.restype = ctypes.c_int
_libc.fstatfs.argtypes = (ctypes.c_int, ctypes.c_void_p)
_libc.fstatfs.restype = ctypes.c_int


class _Statx(ctypes.Structure):
    """The part of ``struct statx`` that is read here; the layout is the same on every architecture."""

    _fields_ = (
        ("head", ctypes.c_uint8 * 32),  # mask, blksize, attributes, nlink, uid, gid, mode
        ("ino", ctypes.c_uint64),
        ("middle", ctypes.c_uint8 * 96),  # size, blocks, attributes_mask, four times, rdev
        ("dev_major", ctypes.c_uint32),
        ("dev_minor", ctypes.c_uint32),
        ("rest", ctypes.c_uint8 * (_STATX_SIZE - 144)),
    )


class FileId(NamedTuple):
    """A file, whatever its name: device and inode."""

    device: int
    inode: int


def file_id(dir_fd: int, name: str) -> FileId:
    """Give device and inode of what ``name`` in ``dir_fd`` points to, by what the kernel knows without asking anyone.

    Raises ``OSError``.
    """
    answer = _Statx()
    if _libc.statx(dir_fd, os.fsencode(name), _AT_STATX_DONT_SYNC, _STATX_INO, ctypes.byref(answer)) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), name)
    return FileId(os.makedev(answer.dev_major, answer.dev_minor), answer.ino)


def filesystem_type(fd: int) -> int:
    """Give the magic number of the file system that holds ``fd``. Raises ``OSError``."""
    answer = (ctypes.c_uint8 * _STATFS_SIZE)()
    if _libc.fstatfs(fd, ctypes.byref(answer)) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return ctypes.c_long.from_buffer(answer).value


def boot_time() -> int:
    """Give the moment of the machine's start in seconds of the wall clock, as it is set now. Raises ``OSError``."""
    with open("/proc/stat", "rb") as lines:  # noqa: PTH123 - a kernel file
        for line in lines:
            if line.startswith(b"btime "):
                return int(line[6:])
    raise OSError("/proc/stat does not say when the machine started")


def has_exited(pidfd: int) -> bool:
    """Say whether the process of this pidfd is gone (a zombie is gone); a bad descriptor counts as gone."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))
