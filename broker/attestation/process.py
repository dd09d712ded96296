"""One local process, as the kernel describes it: the ground on which workload attestors stand.

Everything is read through one descriptor of ``/proc/<pid>``, opened while the pidfd showed the process alive: such a
descriptor belongs to that process for ever and answers ESRCH once it is gone, so a recycled number cannot speak for it.
The facts at connection time are kept; whatever happens later is compared with them. Knows no selectors and no entries.
"""

import os
from dataclasses import dataclass
from typing import Self

from broker.attestation.kernel import PROC_SUPER_MAGIC, FileId, file_id, filesystem_type, has_exited
from broker.errors import Misconfigured, NotAttested

MAX_PROC_FILE = 1 << 20  # /proc/<pid>/status with 65,536 groups is 640 KiB; nothing that we read is longer
OVERFLOW_ID = 65534  # what the kernel shows for an id that has no number in our user namespace
_WHOLE_RANGE = 0xFFFFFFFF
_START_TIME = 19  # field 22 of /proc/<pid>/stat, counted behind the last ')'
_NAMESPACES = ("mnt", "pid", "user")
# NOTE(security): a process chooses its name, but not a line break in it: the kernel writes that as a backslash and n.
_STATUS = tuple((name, b"\n%s:\t" % name) for name in (b"Pid", b"Uid", b"Gid", b"Groups"))
_NUMBERS = b"0123456789\t "
_ONE_READ = 16 * 1024  # bytes: status, stat and cgroup are far shorter, but for a process of thousands of groups


_Raw = tuple[bytes, FileId, tuple[tuple[bytes, bytes], ...], tuple[str, ...], bytes]
"""Start time, executable, lines of ``status``, namespaces and cgroup, as the kernel writes them."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What the kernel says of a process at one moment. Two equal values mean the same program under the same rights."""

    start_time: int  # clock ticks since boot
    exe: FileId
    uids: tuple[int, int, int, int]  # real, effective, saved, file system
    gids: tuple[int, int, int, int]
    groups: frozenset[int]
    namespaces: tuple[str, ...]
    cgroup: bytes


@dataclass(frozen=True, slots=True, eq=False)
class Process:
    """A process behind a connection: pid, credentials of ``connect()``, and its facts at that time."""

    pid: int
    uid: int
    gid: int
    facts: Facts
    pidfd: int
    _dir: int
    _raw: _Raw

    @classmethod
    def open(cls, *, pid: int, uid: int, gid: int, pidfd: int) -> Self:
        """Take hold of the process that connected; ``pidfd`` stays the caller's own and is duplicated here.

        Raises ``NotAttested`` when it is gone, outside our pid namespace, has an unmapped user, or cannot be read.
        """
        if pid <= 0:
            raise NotAttested("the caller is outside the agent's pid namespace", hint="run the agent with hostPID")
        if uid == OVERFLOW_ID and is_in_user_namespace():
            raise NotAttested("the caller's user has no number in the agent's user namespace")
        own = os.dup(pidfd)  # dup in Python is always close-on-exec
        directory = -1
        try:
            directory = _open_directory(pid)
            raw = _read_raw(directory, pid)
            facts = _facts(raw)
            process = cls(pid, uid, gid, facts, own, directory, raw)
            _require_number(own, pid)
            process._require_alive()
            process._require_credentials(facts)
        except BaseException:
            os.close(own)
            if directory >= 0:
                os.close(directory)
            raise
        return process

    @classmethod
    def of_pid(cls, pid: int) -> Self:
        """Take hold of a process by its number, as if it connected now: to explain, never to serve a caller.

        Raises ``NotAttested`` as :meth:`open` does, with the code ``process_gone`` where there is no such process.
        """
        try:
            pidfd = os.pidfd_open(pid)
        except (OSError, OverflowError) as error:
            raise NotAttested("there is no such process", code="process_gone") from error
        try:
            directory = _open_directory(pid)
            try:
                facts = _facts(_read_raw(directory, pid))
            finally:
                os.close(directory)
            return cls.open(pid=pid, uid=facts.uids[1], gid=facts.gids[1], pidfd=pidfd)
        finally:
            os.close(pidfd)

    def snapshot(self) -> Facts:
        """Read the facts anew. Raises ``NotAttested`` when the process is gone or unreadable."""
        return _facts(_read_raw(self._dir, self.pid))

    def still_same(self) -> None:
        """Raise ``NotAttested`` unless the process lives and every fact is what it was at connection time."""
        now = _read_raw(self._dir, self.pid)
        self._require_alive()
        # The kernel's own words: the same words are the same facts, and need no reading.
        if now != self._raw:
            raise NotAttested("the process has changed since it connected", code="process_changed")

    def still_there(self) -> None:
        """Raise ``NotAttested`` unless it lives with the same executable and effective ids: the cheap half, three calls."""
        self._require_alive()
        try:
            owner = os.fstat(self._dir)
            exe = file_id(self._dir, "exe")
        except OSError as error:
            raise _unreadable(self.pid, error) from error
        if exe != self.facts.exe or owner.st_uid != self.uid or owner.st_gid != self.gid:
            raise NotAttested("the process has changed since it connected", code="process_changed")

    def is_gone(self) -> bool:
        """Say whether the process has exited."""
        return has_exited(self.pidfd)

    def read(self, name: str) -> bytes:
        """Read one file of ``/proc/<pid>``. Raises ``NotAttested`` when the process is gone or denies it."""
        return _read_file(self._dir, name, self.pid)

    def open_file(self, name: str) -> int:
        """Open one file of ``/proc/<pid>`` (``exe``: the running image itself), read-only; the caller closes it."""
        try:
            return os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY, dir_fd=self._dir)
        except OSError as error:
            raise _unreadable(self.pid, error) from error

    def link(self, name: str) -> str:
        """Read one link of ``/proc/<pid>``. Its text proves nothing: a mount namespace can forge it."""
        try:
            return os.readlink(name, dir_fd=self._dir)
        except OSError as error:
            raise _unreadable(self.pid, error) from error

    def close(self) -> None:
        """Let go of the process. Exactly once."""
        os.close(self._dir)
        os.close(self.pidfd)

    def _require_alive(self) -> None:
        if has_exited(self.pidfd):
            raise NotAttested("the process is gone", code="process_gone")

    def _require_credentials(self, facts: Facts) -> None:
        if facts.uids[1] != self.uid or facts.gids[1] != self.gid:
            raise NotAttested("the process has changed its user since it connected", code="process_changed")


def require_procfs() -> None:
    """Raise ``Misconfigured`` unless ``/proc`` is the kernel's own: everything said of a process is read there."""
    try:
        fd = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise Misconfigured("/proc cannot be opened", hint="mount procfs at /proc") from error
    try:
        if filesystem_type(fd) != PROC_SUPER_MAGIC:
            raise Misconfigured("/proc is not procfs", hint="mount procfs at /proc")
    finally:
        os.close(fd)


def is_in_user_namespace() -> bool:
    """Say whether we run in a user namespace of our own, where unmapped ids all look like nobody's."""
    with open("/proc/self/uid_map", "rb") as map_file:  # noqa: PTH123 - a kernel file, opened by its fixed name
        rows = [[int(field) for field in line.split()] for line in map_file]
    return rows != [[0, 0, _WHOLE_RANGE]]


def _open_directory(pid: int) -> int:
    try:
        directory = os.open(f"/proc/{pid}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise _unreadable(pid, error) from error
    # NOTE(security): a bind-mounted look-alike of /proc must not describe callers.
    if filesystem_type(directory) != PROC_SUPER_MAGIC:
        os.close(directory)
        raise NotAttested("/proc is not procfs", hint="mount procfs at /proc")
    return directory


def _require_number(pidfd: int, pid: int) -> None:
    """The pidfd's own number, in the namespace of this ``/proc``, must be the one that we opened."""
    info = os.open(f"/proc/self/fdinfo/{pidfd}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        lines = os.read(info, _ONE_READ)  # a handful of lines, written in one piece
    finally:
        os.close(info)
    for line in lines.split(b"\n"):
        if line.startswith(b"Pid:"):
            if int(line[4:]) != pid:
                raise NotAttested("the process is gone", code="process_gone")
            return
    raise NotAttested("the kernel does not say whose pidfd this is")


def _read_raw(directory: int, pid: int) -> _Raw:
    status = status_lines(_read_single(directory, "status", pid))
    # NOTE(security): another process's directory may be mounted over this one's, and is procfs all the same.
    if (b"Pid", b"%d" % pid) not in status:
        raise NotAttested("/proc describes another process under this number", hint="mount procfs at /proc")
    # NOTE(security): a process may name itself ") S 1 (": the numbers stand behind the last parenthesis.
    stat = _read_single(directory, "stat", pid).rpartition(b")")[2].split(None, _START_TIME + 1)
    try:
        exe = file_id(directory, "exe")
        namespaces = tuple(os.readlink(f"ns/{name}", dir_fd=directory) for name in _NAMESPACES)
    except OSError as error:
        raise _unreadable(pid, error) from error
    start_time = stat[_START_TIME] if len(stat) > _START_TIME else b""
    return start_time, exe, status, namespaces, _read_single(directory, "cgroup", pid)


def status_lines(status: bytes) -> tuple[tuple[bytes, bytes], ...]:
    """Find the lines of ``status`` that facts are read from, as name and numbers.

    They are looked for as text: an expression over all lines, for every message of every stream, was a third of a full look.
    """
    found: list[tuple[bytes, bytes]] = []
    for name, begun in _STATUS:
        at = status.find(begun)
        while at >= 0:
            start = at + len(begun)
            end = status.find(b"\n", start)
            numbers = status[start:] if end < 0 else status[start:end]
            if not numbers.translate(None, _NUMBERS):
                found.append((name, numbers))
            at = status.find(begun, start)
    return tuple(found)


def _facts(raw: _Raw) -> Facts:
    start_time, exe, lines, namespaces, cgroup = raw
    status = dict(lines)
    try:
        return Facts(
            start_time=int(start_time),
            exe=exe,
            uids=_four(status[b"Uid"]),
            gids=_four(status[b"Gid"]),
            groups=frozenset(int(group) for group in status[b"Groups"].split()),
            namespaces=namespaces,
            cgroup=cgroup,
        )
    except (KeyError, ValueError) as error:
        raise NotAttested("the kernel's description of the process cannot be read") from error


def _read_single(directory: int, name: str, pid: int) -> bytes:
    """Read a file that the kernel writes in one piece (``status``, ``stat``, ``cgroup``): a read that is not filled was the last."""
    try:
        fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=directory)
        try:
            content = os.read(fd, _ONE_READ)
        finally:
            os.close(fd)
    except OSError as error:
        raise _unreadable(pid, error) from error
    return content if len(content) < _ONE_READ else _read_file(directory, name, pid)


def _read_file(directory: int, name: str, pid: int) -> bytes:
    try:
        fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=directory)
        try:
            parts: list[bytes] = []
            left = MAX_PROC_FILE
            while left > 0 and (part := os.read(fd, min(left, 65536))):
                parts.append(part)
                left -= len(part)
        finally:
            os.close(fd)
    except OSError as error:
        raise _unreadable(pid, error) from error
    if left <= 0:
        raise NotAttested("the kernel's description of the process is too long")
    return b"".join(parts)


def _four(value: bytes) -> tuple[int, int, int, int]:
    real, effective, saved, file_system = (int(number) for number in value.split())
    return real, effective, saved, file_system


def _unreadable(pid: int, error: OSError) -> NotAttested:
    if isinstance(error, PermissionError):
        return NotAttested(
            f"the agent may not read /proc/{pid}",
            code="process_unreadable",
            hint="run the agent as root or with CAP_SYS_PTRACE",
        )
    return NotAttested("the process is gone", code="process_gone")
