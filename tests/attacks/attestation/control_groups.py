"""Real control groups of this machine, made for a test and taken away after it."""

import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Self

import pytest

from broker.attestation.cgroups import parse_cgroup_mounts


class ControlGroups:
    """``put`` moves a process into a group of one hierarchy. ``with`` takes away what was made, once it is empty."""

    def __init__(self) -> None:
        mounts = parse_cgroup_mounts(Path("/proc/self/mountinfo").read_bytes())
        tops = [Path(mount.point) for mount in mounts if mount.root == "/"]
        if not tops or not os.access(tops[-1] / "cgroup.procs", os.W_OK):
            pytest.skip("the control groups of this machine cannot be written")
        self._top = tops[-1]
        self._made: list[Path] = []

    def put(self, pid: int, path: str, *, owner: int = 0) -> None:
        """Move this process to ``path``; groups that have to be made belong to ``owner``."""
        at = self._top
        for name in path.split("/")[1:]:
            at = at / name
            if not at.exists():
                at.mkdir(mode=0o755)
                self._made.append(at)
                if owner:
                    for one in (at, *at.iterdir()):
                        os.chown(one, owner, owner)
        (at / "cgroup.procs").write_text(str(pid))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        deadline = time.monotonic() + 5
        for directory in reversed(self._made):
            while directory.exists() and time.monotonic() < deadline:
                with suppress(OSError):  # its last process is on its way out
                    directory.rmdir()
