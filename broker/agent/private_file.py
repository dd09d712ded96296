"""A file of the agent's own: 0600, whole or not there, and read only where nobody else could have written or read it."""

import os
import stat
from contextlib import suppress
from pathlib import Path

from broker.errors import InvalidJson


class PrivateFile:
    """One file, replaced whole: written beside, synced, renamed, and the directory synced."""

    def __init__(self, path: Path, *, max_size: int) -> None:
        """``max_size`` in bytes: what is larger is not ours."""
        self._path = path
        self._max_size = max_size

    def read(self) -> bytes | None:
        """Give the content, None where there is no file; raises InvalidJson where it is not for us alone."""
        try:
            fd = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise InvalidJson(f"{self._path.name} cannot be opened") from error
        with os.fdopen(fd, "rb") as stored:
            facts = os.fstat(fd)
            if facts.st_uid != os.geteuid() or stat.S_IMODE(facts.st_mode) & 0o077 or facts.st_size > self._max_size:
                raise InvalidJson(f"{self._path.name} is readable by others, or not ours")
            return stored.read()

    def write(self, content: bytes) -> None:
        """Replace the content; on return it is on the disk. Raises OSError."""
        beside = self._path.with_name(f".{self._path.name}.new")
        with suppress(FileNotFoundError):
            beside.unlink()
        fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        with os.fdopen(fd, "wb") as new:
            new.write(content)
            new.flush()
            os.fsync(fd)
        beside.rename(self._path)
        self._sync_directory()

    def remove(self) -> None:
        """Take the file away; harmless when there is none."""
        with suppress(FileNotFoundError):
            self._path.unlink()
            self._sync_directory()

    def _sync_directory(self) -> None:
        directory = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
