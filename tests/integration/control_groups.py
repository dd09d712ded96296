"""Control groups of this machine, made and removed by a test: needs root."""

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from broker.attestation.cgroups import parse_cgroup_mounts
from tests.integration.docker_engine import until


def tops() -> list[Path]:
    """The hierarchies that this machine has mounted."""
    mounts = parse_cgroup_mounts(Path("/proc/self/mountinfo").read_bytes())
    found = [Path(mount.point) for mount in mounts if mount.root == "/"]
    assert found
    return found


@contextmanager
def made(path: str, top: int = -1, owner: int = 0) -> Iterator[Path]:
    """Make a control group and what it needs above it in one hierarchy; remove them afterwards, when nobody is in them."""
    directory = tops()[top]
    new: list[Path] = []
    try:
        for name in path.split("/")[1:]:
            directory = directory / name
            with suppress(FileExistsError):  # others may make the same parent
                directory.mkdir(mode=0o755)
                new.append(directory)
                _inherit_cpuset(directory)
                if owner:
                    os.chown(directory, owner, owner)
        yield directory
    finally:
        for one in reversed(new):
            until(lambda one=one: _removed(one), f"{one} stays")


@contextmanager
def forging() -> Iterator[Callable[..., int]]:
    """Give what puts a process of this host into control groups of its choosing."""
    with ExitStack() as after:

        def put(*paths: str, top: int = -1, owner: int = 0) -> int:
            directories = [after.enter_context(made(path, top - number, owner)) for number, path in enumerate(paths)]
            child = subprocess.Popen(["/bin/sleep", "1000"])
            after.callback(child.wait)
            after.callback(child.kill)
            for directory in directories:
                (directory / "cgroup.procs").write_text(str(child.pid))
            return child.pid

        yield put


def _inherit_cpuset(directory: Path) -> None:
    # A version 1 cpuset takes nobody until it has processors and memory.
    for name in ("cpuset.cpus", "cpuset.mems"):
        if (directory / name).exists() and not (directory / name).read_text().strip():
            (directory / name).write_text((directory.parent / name).read_text())


def _removed(directory: Path) -> bool:
    with suppress(OSError):
        directory.rmdir()
    return not directory.exists()
