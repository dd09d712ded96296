"""Tells which container a process is in, and makes sure that nobody but the runtime could have put it there.

Three anchors, all needed: the control group's path has the shape of a known runtime's; every directory on it belongs to
root, so that no other user could make or enter it; and the process that the runtime itself calls the container's first
lives in the same container's control group. The caller's own mounts are never looked at. Knows no runtime's protocol
and no selectors.
"""

import os
import select
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final

from broker.attestation.cgroups import (
    Cgroup,
    CgroupMount,
    Matcher,
    Place,
    Runtime,
    find_places,
    is_outside_namespace,
    is_within,
    outside_namespace,
    parse_cgroup_mounts,
    parse_cgroups,
)
from broker.attestation.contract import AttestorFailed

ROOT: Final = 0
MAX_KERNEL_FILE: Final = 16 << 20  # a busy node has some thousand mounts of some hundred bytes
WRITABLE_BY_OTHERS: Final = 0o022
_PART: Final = 64 * 1024  # bytes of one read
_MEMBERSHIP: Final = ("cgroup.procs", "cgroup.threads", "tasks")  # who may write these may move a process in


class OwnMounts:
    """The agent's own mounts, read again once the kernel says that they are others: a busy node has thousands."""

    def __init__(self) -> None:
        self._fd = -1
        self._changes = select.poll()
        self._text = b""

    def __call__(self) -> bytes:
        """Give ``/proc/self/mountinfo`` as it is now. Raises ``OSError`` and ``AttestorFailed``."""
        if self._fd < 0:
            self._fd = os.open("/proc/self/mountinfo", os.O_RDONLY | os.O_CLOEXEC)
            self._changes.register(self._fd, select.POLLPRI)
        # Asked before it is read: what changes meanwhile is told the next time.
        if self._changes.poll(0) or not self._text:
            self._text = b""
            os.lseek(self._fd, 0, os.SEEK_SET)
            self._text = _read(self._fd)
        return self._text


def _cgroup_of(pid: int) -> bytes:
    fd = os.open(f"/proc/{pid}/cgroup", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return _read(fd)
    finally:
        os.close(fd)


def _read(fd: int) -> bytes:
    parts: list[bytes] = []
    left = MAX_KERNEL_FILE
    while left > 0 and (part := os.read(fd, min(left, _PART))):
        parts.append(part)
        left -= len(part)
    if left <= 0:
        raise AttestorFailed("a kernel file is too long", code="cgroup_unreadable")
    return b"".join(parts)


@dataclass(frozen=True, slots=True)
class Node:
    """Where this machine is asked: the agent's own mounts, the control groups of a pid, and root's number."""

    mountinfo: Callable[[], bytes] = field(default_factory=OwnMounts)
    cgroup_of: Callable[[int], bytes] = _cgroup_of
    root: int = ROOT


THIS_NODE: Final = Node()


@dataclass(frozen=True, slots=True)
class Container:
    """The container that a process's control groups name. A claim until ``require_owned`` and ``require_member``."""

    id: str
    runtime: Runtime | None
    pod_uid: str | None
    user: int | None  # of a rootless runtime
    places: tuple[Place, ...]


def locate(cgroup: bytes, matchers: Sequence[Matcher] = ()) -> Container | None:
    """Read the container out of ``/proc/<pid>/cgroup``; ``None``: in none.

    Raises ``AttestorFailed`` for two candidates, or for a container-like path that no runtime uses.
    """
    places = find_places(parse_cgroups(cgroup), matchers)
    if not places:
        return None
    one = places[0]
    return Container(one.id, one.runtime, one.pod_uid, one.user, places)


def require_owned(container: Container, node: Node = THIS_NODE) -> None:
    """Raise ``AttestorFailed`` unless every directory on each path belongs to root and only its owner may write it.

    A rootless runtime's may belong to its user instead. Reads the control group file systems; does not block.
    """
    owners = frozenset({node.root} if container.user is None else {node.root, container.user})
    try:
        mounts = parse_cgroup_mounts(node.mountinfo())
        for place in container.places:
            if is_outside_namespace(place.cgroup.path):
                raise outside_namespace()
            _require_owned(place.cgroup, mounts, owners)
    except OSError as error:
        raise AttestorFailed(
            "the control group of the process cannot be looked at",
            code="cgroup_unreadable",
            hint="mount the host's /sys/fs/cgroup where the agent runs",
        ) from error


def require_member(container: Container, pid: int, node: Node = THIS_NODE) -> None:
    """Raise ``AttestorFailed`` unless ``pid`` lives in the container's own control group, in every hierarchy that counts."""
    try:
        where = parse_cgroups(node.cgroup_of(pid))
    except OSError:
        raise _mismatch() from None
    paths = {(one.hierarchy, one.controllers): one.path for one in where}
    for place in container.places:
        path = paths.get((place.cgroup.hierarchy, place.cgroup.controllers))
        if path is None or not is_within(path, place.home):
            raise _mismatch()


def _require_owned(cgroup: Cgroup, mounts: Sequence[CgroupMount], owners: frozenset[int]) -> None:
    candidates = [mount for mount in mounts if mount.holds(cgroup)]
    for mount in candidates:
        directory = _opened(mount)
        if directory is None:
            continue
        try:
            _require_owned_below(directory, cgroup.path.split("/")[1:], owners)
        finally:
            os.close(directory)
        return
    raise AttestorFailed(
        "the control group hierarchy of the process is not mounted where the agent runs",
        code="cgroup_unreadable",
        hint="mount the host's /sys/fs/cgroup where the agent runs",
    )


def _opened(mount: CgroupMount) -> int | None:
    """Open a mount's top; ``None`` where another file system lies over it."""
    with suppress(FileNotFoundError, NotADirectoryError, PermissionError):
        directory = os.open(mount.point, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        if os.fstat(directory).st_dev == os.makedev(*mount.device):
            return directory
        os.close(directory)
    return None


def _require_owned_below(top: int, names: Sequence[str], owners: frozenset[int]) -> None:
    device = os.fstat(top).st_dev
    at = os.dup(top)
    try:
        _require_owner(at, device, owners)
        for name in names:
            below = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=at)
            os.close(at)
            at = below
            _require_owner(at, device, owners)
    finally:
        os.close(at)


def _require_owner(directory: int, device: int, owners: frozenset[int]) -> None:
    states = [os.fstat(directory)]
    for name in _MEMBERSHIP:
        with suppress(FileNotFoundError):
            states.append(os.stat(name, dir_fd=directory, follow_symlinks=False))
    # NOTE(security): systemd gives users control groups of their own; a name in there is the user's word.
    if any(one.st_dev != device or one.st_uid not in owners or one.st_mode & WRITABLE_BY_OTHERS for one in states):
        raise AttestorFailed(
            "a control group on the container's path belongs to somebody who is not the runtime",
            code="container_not_anchored",
        )


def _mismatch() -> AttestorFailed:
    return AttestorFailed(
        "the process is not in the control group of the container that it claims",
        code="container_mismatch",
        hint="the agent needs the host's pid namespace to compare",
    )
