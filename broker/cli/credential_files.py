"""Certificates, keys and tokens as files in a directory: each whole or not there, its mode its own from the first byte.

Every name is looked up below one open directory and none is followed: a link that lies where a file should be is replaced,
and what it points to is left alone. Files that belong together are all written first, and then put in place one after
the other. Asks nobody, and knows nothing of SVIDs.
"""

import os
import re
import secrets
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from broker.errors import Invalid, Misconfigured

MAX_NAME: Final = 200
"""Longest file name, in characters: with what is added to it while it is written it stays below the kernel's 255."""
_NAME: Final = re.compile(r"[A-Za-z0-9_@%+=,-][A-Za-z0-9._@%+=,-]*")
_BESIDE: Final = re.compile(r"\.(.+)\.[0-9a-f]{16}\.new")


@dataclass(frozen=True, slots=True)
class NewFile:
    """One file. ``repr`` shows no content."""

    name: str
    content: bytes = field(repr=False)
    mode: int


def file_name(text: str) -> str:
    """Check a name: of this directory, and no hidden one; raises Invalid."""
    if len(text) > MAX_NAME or _NAME.fullmatch(text) is None:
        raise Invalid(
            f"not a plain file name: {text!r}", code="file_name", hint="a name alone, without a directory: svid.pem"
        )
    return text


class CredentialDirectory:
    """An open directory."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self._fd = descriptor

    @classmethod
    @contextmanager
    def opened(cls, path: Path) -> Iterator["CredentialDirectory"]:
        """Open it, made with mode 0700 where it is not there; raises Misconfigured."""
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError as error:
            raise _not_usable(path, error) from None
        try:
            yield cls(path, descriptor)
        finally:
            os.close(descriptor)

    def sweep(self, names: Iterable[str]) -> None:
        """Remove what a writer of these files that was killed left beside them."""
        ours = frozenset(names)
        with os.scandir(self._fd) as found:
            left = [one.name for one in found if (match := _BESIDE.fullmatch(one.name)) and match[1] in ours]
        for name in left:
            with suppress(OSError):
                os.unlink(name, dir_fd=self._fd)

    def write(self, files: Sequence[NewFile]) -> Sequence[str]:
        """Put these files in place of what is there; gives their paths. Raises Misconfigured, and then nothing is changed.

        A reader of one file finds the old one or the new one. Between two files of a set there is a moment in which
        the first is new and the second old.
        """
        beside: list[tuple[str, str]] = []
        try:
            for one in files:
                temporary = f".{one.name}.{secrets.token_hex(8)}.new"
                self._create(temporary, one)
                beside.append((temporary, one.name))
            for temporary, name in beside:
                os.replace(temporary, name, src_dir_fd=self._fd, dst_dir_fd=self._fd)
            os.fsync(self._fd)
        except OSError as error:
            raise _not_usable(self.path, error) from None
        finally:
            for temporary, _ in beside:
                with suppress(FileNotFoundError):
                    os.unlink(temporary, dir_fd=self._fd)
        return [str(self.path / one.name) for one in files]

    def remove(self, names: Iterable[str]) -> None:
        """Take files away, harmless where there are none; raises Misconfigured."""
        try:
            for name in names:
                with suppress(FileNotFoundError):
                    os.unlink(name, dir_fd=self._fd)
        except OSError as error:
            raise _not_usable(self.path, error) from None

    def _create(self, name: str, one: NewFile) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(name, flags, 0o600, dir_fd=self._fd)
        try:
            with os.fdopen(descriptor, "wb") as file:
                os.fchmod(file.fileno(), one.mode)  # whatever the umask says
                file.write(one.content)
                file.flush()
                os.fsync(file.fileno())
        except BaseException:
            os.unlink(name, dir_fd=self._fd)
            raise


def _not_usable(path: Path, error: OSError) -> Misconfigured:
    return Misconfigured(
        f"{path} cannot be written to: {error.strerror}",
        code="files_not_written",
        hint="name a directory of this user's own, itself no link, with room in it",
    )
