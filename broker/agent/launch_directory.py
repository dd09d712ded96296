"""Where the launcher registers what it launches: written whole or not at all, and swept of what has ended.

The directory lies in the agent's private directory and belongs to whom that belongs to; so do the files, so that an agent
that is not root can read what root's launcher wrote. Knows nothing of programs.
"""

import os
import re
import stat
from contextlib import suppress
from pathlib import Path
from typing import Final, Self

from broker.attestation.launches import (
    FILE_NAME,
    Launch,
    boot_id,
    open_directory,
    pid_namespace,
    read_launch,
    start_time_of,
)
from broker.errors import BrokerError, Misconfigured, Unavailable

MAX_LAUNCHES: Final = 4096
"""Launched processes of one node at a time: far more than it runs, and some 2 MiB of files."""

_UNFINISHED: Final = re.compile(r"\.([1-9][0-9]{0,9})-([0-9]{1,20})\.new")  # named after its launcher


class LaunchDirectory:
    """The directory, open. Use it with ``with``."""

    def __init__(self, fd: int, owner: tuple[int, int]) -> None:
        """``owner`` is the uid and gid to whom files are given."""
        self._fd = fd
        self._owner = owner
        self._owners = frozenset({0, os.geteuid(), owner[0]})

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open it, made where it is missing.

        Raises:
            Unavailable: there is no agent's private directory.
            Misconfigured: it is open to others, or not ours to write.
        """
        private = _open_private(path.parent)
        try:
            facts = os.fstat(private)
            # NOTE(security): whoever owns the agent's directory is the agent; root launches for it, others for themselves.
            if facts.st_uid != os.geteuid() and os.geteuid() != 0:
                raise _not_ours(path)
            owner = (facts.st_uid, facts.st_gid)
            _make(private, path.name, owner)
            return cls(open_directory(path, {0, os.geteuid(), owner[0]}, within=private), owner)
        except FileNotFoundError:
            raise Unavailable(f"{path} has gone", code="no_agent_directory", hint="is the agent starting?") from None
        finally:
            os.close(private)

    @property
    def owner(self) -> int:
        """The uid that may write here, beside root."""
        return self._owner[0]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)

    def write(self, launch: Launch) -> None:
        """Register a process. Raises ``Unavailable`` when that is not possible; then nothing is left behind."""
        own = os.getpid()
        unfinished = f".{own}-{start_time_of(own)}.new"
        try:
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
            file = os.open(unfinished, flags, 0o600, dir_fd=self._fd)
            try:
                with os.fdopen(file, "wb") as new:
                    os.fchmod(file, 0o600)
                    if os.geteuid() == 0:
                        os.fchown(file, *self._owner)
                    new.write(launch.serialise())
                os.rename(unfinished, launch.file_name, src_dir_fd=self._fd, dst_dir_fd=self._fd)
            except BaseException:
                with suppress(OSError):
                    os.unlink(unfinished, dir_fd=self._fd)
                raise
        except OSError as error:
            raise Unavailable(
                f"the process cannot be registered: {error.strerror}",
                code="launch_not_registered",
                hint="nothing was started; is there room in the agent's runtime directory?",
            ) from None

    def remove(self, name: str) -> None:
        """Take a registration away; harmless when it is gone."""
        with suppress(FileNotFoundError):
            os.unlink(name, dir_fd=self._fd)

    def sweep(self) -> None:
        """Remove what belongs to processes that have ended. Raises ``Unavailable`` when too many still run."""
        living = 0
        here = (boot_id(), pid_namespace())
        for name in os.listdir(self._fd):  # noqa: PTH208 - by descriptor
            match = FILE_NAME.fullmatch(name) or _UNFINISHED.fullmatch(name)
            if match is None:
                continue
            pid, start_time = map(int, match.groups())
            if self._is_elsewhere(name, here) or _lives(pid, start_time):
                living += 1
            else:
                self.remove(name)
        if living >= MAX_LAUNCHES:
            raise Unavailable(f"{MAX_LAUNCHES} launched processes run here already", code="too_many_launches")

    def _is_elsewhere(self, name: str, here: tuple[str, str]) -> bool:
        """Whether it is a launcher's whose process numbers mean nothing to us."""
        if FILE_NAME.fullmatch(name) is None:
            return False
        try:
            launch = read_launch(self._fd, name, self._owners)
        except BrokerError:
            return False
        return launch is not None and launch.boot_id == here[0] and launch.pid_namespace != here[1]


def _lives(pid: int, start_time: int) -> bool:
    seen = start_time_of(pid)
    if seen is not None:
        return seen == start_time
    # A /proc that hides other users' processes must not make them dead.
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        pass
    return True


def _open_private(path: Path) -> int:
    try:
        private = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except PermissionError:
        raise _not_ours(path) from None
    except OSError as error:
        raise Unavailable(
            f"{path} cannot be opened: {error.strerror}",
            code="no_agent_directory",
            hint="start the agent first; --directory names the directory launches in its runtime_dir/private",
        ) from None
    if os.fstat(private).st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        os.close(private)
        raise Misconfigured(f"{path} can be written by others", code="launches_unsafe", hint=f"chmod 0700 {path}")
    return private


def _make(private: int, name: str, owner: tuple[int, int]) -> None:
    try:
        os.mkdir(name, 0o700, dir_fd=private)
        # NOTE(security): by descriptor, for the agent's user may put something else in its place meanwhile.
        made = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=private)
    except FileExistsError:
        return
    except OSError as error:
        raise Unavailable(f"the directory {name} cannot be made: {error.strerror}", code="no_agent_directory") from None
    try:
        if os.fstat(made).st_uid == os.geteuid():
            os.fchmod(made, 0o700)
            if os.geteuid() == 0:
                os.fchown(made, *owner)
    finally:
        os.close(made)


def _not_ours(path: Path) -> Misconfigured:
    return Misconfigured(
        f"{path} is not ours to write: only the agent's operator launches",
        code="launches_not_ours",
        hint="run this as root, or for a trial as the user that runs the agent",
    )
