"""Where the database file lives: its URL, its directory and modes, and the lock that keeps a second server out.

Knows files, not SQL. The lock is ``flock`` on a file beside the database: it goes with its process, however that ends. Not on the
database itself, because closing any descriptor of that drops every POSIX lock that SQLite holds on it in the process.
"""

import errno
import fcntl
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import unquote, urlsplit

from broker.errors import Misconfigured, Unavailable

SCHEME: Final = "sqlite"
FILE_MODE: Final = 0o600
DIRECTORY_MODE: Final = 0o700
LOCK: Final = ".lock"
WAL: Final = "-wal"
COMPANIONS: Final = (WAL, "-shm", "-journal")
"""What SQLite keeps beside the file; they hold the same rows and so get the same mode."""


def database_path(url: str) -> Path:
    """Read ``sqlite:///absolute/path.db``; raises Misconfigured(code="store_url")."""
    parts = urlsplit(url)
    path = Path(unquote(parts.path))
    if (
        parts.scheme != SCHEME
        or parts.netloc
        or parts.query
        or parts.fragment
        or not path.is_absolute()
        or not path.name
    ):
        raise Misconfigured(
            f"the store's URL {parts.scheme}:… is not understood",
            code="store_url",
            hint="write sqlite:///absolute/path/to/broker.db",
        )
    return path


@dataclass(frozen=True, slots=True)
class FileIdentity:
    """Which file a path named when it was looked at."""

    device: int
    inode: int

    @classmethod
    def of(cls, path: Path) -> "FileIdentity | None":
        """Look at a path; None when nothing is there, or nothing can be seen."""
        try:
            found = path.lstat()
        except OSError:
            return None
        return cls(found.st_dev, found.st_ino)


class LockedFile:
    """The database file, made safe and locked; nobody else's until :meth:`release`."""

    def __init__(self, path: Path) -> None:
        """Make directory and files as needed, set modes, take the lock; raises Misconfigured."""
        directory = _safe_directory(path.parent)
        self.path: Final = directory / path.name
        self._fd = _open_private(directory / (path.name + LOCK))
        try:
            _lock(self._fd, self.path)
            # Only with the lock: another server in this process would lose SQLite's locks by this close.
            os.close(_open_private(self.path))
            for suffix in COMPANIONS:
                _make_private(directory / (path.name + suffix))
            _sync_directory(directory)
        except BaseException:
            os.close(self._fd)
            raise
        self._watched = {name: FileIdentity.of(name) for name in (self.path, directory / (path.name + LOCK))}

    def remember_wal(self) -> None:
        """Watch the write-ahead log too, as it is now; call once it is open."""
        wal = self.path.with_name(self.path.name + WAL)
        self._watched[wal] = FileIdentity.of(wal)

    def check(self) -> None:
        """Raise Unavailable(code="store_replaced") when a path no longer names the file that was opened."""
        # Writing on would be writing into files that no later start finds, or beside a history of someone else.
        if any(FileIdentity.of(path) != identity for path, identity in self._watched.items()):
            raise Unavailable(
                "the database was removed or replaced while the server was running",
                code="store_replaced",
                hint="restore the file, then restart the server; nothing is written until then",
            )

    def release(self) -> None:
        """Give the lock back; after the last connection is closed."""
        os.close(self._fd)


def _safe_directory(directory: Path) -> Path:
    try:
        missing = [part for part in (directory, *directory.parents) if not part.exists()]
        for part in reversed(missing):
            part.mkdir(mode=DIRECTORY_MODE)
            part.chmod(DIRECTORY_MODE)
        resolved = directory.resolve(strict=True)
        mode = resolved.stat().st_mode
    except OSError as error:
        raise Misconfigured(
            f"the store's directory {directory} cannot be made or read: {os.strerror(error.errno or 0)}",
            code="store_directory",
            hint="name a directory that the server may create or write",
        ) from error
    if mode & (stat.S_IWGRP | stat.S_IWOTH):
        # Who may write here may replace the database, or plant a journal for SQLite to replay.
        raise Misconfigured(
            f"others may write in the store's directory {resolved}",
            code="store_directory_unsafe",
            hint=f"chmod 700 {resolved}",
        )
    return resolved


def _open_private(path: Path) -> int:
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        fd = os.open(path, flags, FILE_MODE)
    except OSError as error:
        reason = "it is a symbolic link" if error.errno == errno.ELOOP else os.strerror(error.errno or 0)
        raise Misconfigured(
            f"the database {path} cannot be opened: {reason}",
            code="store_file",
            hint="name a file that the server may read and write",
        ) from error
    try:
        _require_regular(os.fstat(fd).st_mode, path)
        os.fchmod(fd, FILE_MODE)
    except OSError as error:
        os.close(fd)
        raise Misconfigured(
            f"the mode of the database {path} cannot be set", code="store_file", hint="the server must own the file"
        ) from error
    except Misconfigured:
        os.close(fd)
        raise
    return fd


def _require_regular(mode: int, path: Path) -> None:
    if not stat.S_ISREG(mode):
        raise Misconfigured(f"{path} is not a regular file", code="store_file", hint="remove it, or name another file")


def _lock(fd: int, path: Path) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise Misconfigured(
            f"another server has the database {path} open",
            code="store_in_use",
            hint="one server per file; stop the other one, or give this one its own file",
        ) from None


def _make_private(path: Path) -> None:
    try:
        _require_regular(path.lstat().st_mode, path)
        path.chmod(FILE_MODE)
    except FileNotFoundError:
        return
    except OSError as error:
        raise Misconfigured(f"the mode of {path} cannot be set", code="store_file") from error


def _sync_directory(directory: Path) -> None:
    # A new file is durable only when its name is.
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
