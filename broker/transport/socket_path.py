"""Claims the path of a Unix socket so that nobody else can stand in its place.

A directory that others may write to, a path that holds something else, or a socket that somebody serves already are
refused. Knows nothing of what is served.
"""

import errno
import fcntl
import os
import socket
import stat
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from broker.errors import Misconfigured
from broker.transport.acceptor import BACKLOG

MAX_PATH_BYTES = 107  # sun_path holds 108 with its final zero
_UNSAFE = "socket_path_unsafe"
_IN_USE = "socket_in_use"


@dataclass(frozen=True, slots=True)
class ClaimedSocket:
    """A listening socket and its path; the lock keeps a second server away for as long as it is held."""

    path: Path
    listening: socket.socket
    lock: int
    place: tuple[int, int]  # device and inode of the path

    def is_in_place(self) -> bool:
        """Say whether the path still leads to this socket, for callers who come now."""
        try:
            return _place(self.path) == self.place
        except OSError:
            return False

    def claimed_again(self, *, mode: int, directory_mode: int) -> Self:
        """Listen on the path anew, as :func:`claim_socket` does; closing this one's socket is the caller's.

        Raises Misconfigured, and leaves this one as it is, where the place is not safe or is somebody else's now.
        """
        lock_path = _lock_path(_directory(self.path.parent, directory_mode) / self.path.name)
        lock = self.lock if _is_at(lock_path, self.lock) else _lock(lock_path)
        try:
            again = replace(self, listening=_taken(self.path, mode), lock=lock, place=_place(self.path))
        except BaseException:
            if lock != self.lock:
                os.close(lock)
            raise
        if lock != self.lock:
            os.close(self.lock)
        return again

    def release(self) -> None:
        """Close the socket and remove the path, if it is still ours."""
        self.listening.close()
        with suppress(OSError):
            if self.is_in_place():
                self.path.unlink()
        os.close(self.lock)


def claim_socket(path: Path, *, mode: int, directory_mode: int) -> ClaimedSocket:
    """Listen on ``path`` with the file mode ``mode``; missing directories are made with ``directory_mode``.

    Raises Misconfigured: ``socket_path_unsafe`` (who else can write there, or what is there already),
    ``socket_in_use`` (another server lives there).
    """
    directory = _directory(path.absolute().parent, directory_mode)
    resolved = directory / path.name
    if len(os.fsencode(resolved)) > MAX_PATH_BYTES:
        raise Misconfigured(
            f"{resolved} is too long for a socket", code=_UNSAFE, hint=f"at most {MAX_PATH_BYTES} bytes"
        )
    lock = _lock(_lock_path(resolved))
    try:
        listening = _taken(resolved, mode)
        return ClaimedSocket(resolved, listening, lock, _place(resolved))
    except BaseException:
        os.close(lock)
        raise


def require_safe_directory(directory: Path) -> None:
    """Refuse a directory that somebody but root and us can change, at any step from the root of the file system.

    A sticky directory (``/tmp``) is allowed above it: others cannot rename what is ours there. It must not itself be
    one: there anybody could take a free name before us. Raises Misconfigured (``socket_path_unsafe``).
    """
    for step in (directory, *directory.parents):
        facts = step.lstat()
        shared = facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        sticky = facts.st_mode & stat.S_ISVTX and step != directory
        if not stat.S_ISDIR(facts.st_mode) or facts.st_uid not in {0, os.geteuid()} or (shared and not sticky):
            raise Misconfigured(
                f"{step} can be changed by other users: no safe place for a socket",
                code=_UNSAFE,
                hint=f"let root or uid {os.geteuid()} own it, and take away group and other write permission",
            )


def _directory(directory: Path, mode: int) -> Path:
    try:
        # Made step by step, each with its mode set by us: the umask is the whole process's and may say anything.
        missing = [step for step in (directory, *directory.parents) if not step.exists()]
        for step in reversed(missing):
            step.mkdir(mode=0o700, exist_ok=True)
            step.chmod(mode)
        resolved = directory.resolve(strict=True)
    except OSError as error:
        raise Misconfigured(f"{directory}: {error.strerror}", code=_UNSAFE) from error
    require_safe_directory(resolved)
    return resolved


def _lock(path: Path) -> int:
    try:
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as error:
        raise Misconfigured(f"{path}: {error.strerror}", code=_UNSAFE) from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(lock)
        raise Misconfigured(f"another server holds {path}", code=_IN_USE, hint="stop it first") from error
    return lock


def _lock_path(path: Path) -> Path:
    return path.with_name(f".{path.name}.lock")


def _is_at(path: Path, fd: int) -> bool:
    """Say whether the path still leads to what is open here; it goes with its directory."""
    held = os.fstat(fd)
    with suppress(OSError):
        return _place(path) == (held.st_dev, held.st_ino)
    return False


def _place(path: Path) -> tuple[int, int]:
    facts = path.lstat()
    return facts.st_dev, facts.st_ino


def _taken(path: Path, mode: int) -> socket.socket:
    try:
        _clear(path)
        return _listen(path, mode)
    except OSError as error:
        raise Misconfigured(f"{path}: {error.strerror}", code=_UNSAFE) from error


def _clear(path: Path) -> None:
    """Remove a socket that a dead server left; refuse anything else."""
    try:
        facts = path.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(facts.st_mode) or facts.st_uid not in {0, os.geteuid()}:
        raise Misconfigured(f"{path} exists and is not a socket of ours", code=_UNSAFE, hint="remove it by hand")
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        refused = probe.connect_ex(os.fspath(path)) == errno.ECONNREFUSED
    if not refused:
        raise Misconfigured(f"{path} is served already", code=_IN_USE, hint="stop the other server first")
    path.unlink()


def _listen(path: Path, mode: int) -> socket.socket:
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        listening.bind(os.fspath(path))
        path.chmod(mode)  # before listen(): no caller gets in under another mode
        listening.listen(BACKLOG)
    except BaseException:
        listening.close()
        raise
    return listening
