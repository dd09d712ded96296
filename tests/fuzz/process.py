"""``/proc/<pid>/stat`` and ``status``: no name that a process gives itself changes what is read of it.

The reader takes a directory, so it is given one with the files that the kernel would write.
"""

import atexit
import contextlib
import os
import shutil
import tempfile
from pathlib import Path

from tests.fuzz import engine

with engine.instrumented(__name__):
    from broker.attestation.process import _facts, _read_raw
    from broker.errors import NotAttested

START = 123456
REST = b"S " + b" ".join(b"%d" % number for number in range(1, 19)) + b" %d 0 0\n" % START
IDS = b"Pid:\t7\nUid:\t1\t2\t3\t4\nGid:\t5\t6\t7\t8\nFDSize:\t64\nGroups:\t9 10 \nNStgid:\t1\n"
WHOLE = b"\0".join((b"7 (sleep) " + REST, b"Name:\tsleep\nUmask:\t0022\nState:\tS (sleeping)\n" + IDS))
SEEDS = (
    WHOLE,
    b"sleep",
    b") S 1 2 3 (",
    b"a\nUid:\t0\t0\t0\t0",
    b"\\nGroups:\t0",
    b"",
    b"\0",
    b"7 (x) R " + b"9 " * 60 + b"\0Uid:\t1\t1\t1\t1\n",
    b"7 (x) R " + b"9" * 5000 + b"\0Uid:\t" + b"9" * 5000,
)
_MADE: list[tuple[int, Path]] = []


def _directory() -> tuple[int, Path]:
    if not _MADE:
        path = Path(tempfile.mkdtemp(prefix="fuzz-process-"))
        atexit.register(shutil.rmtree, path)
        (path / "ns").mkdir()
        for name in ("mnt", "pid", "user"):
            (path / "ns" / name).symlink_to(f"{name}:[1]")
        (path / "exe").write_bytes(b"")
        (path / "cgroup").write_bytes(b"0::/\n")
        _MADE.append((os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC), path))
    return _MADE[0]


def read(stat: bytes, status: bytes):
    """Give the facts that these two files tell; raises ``NotAttested``."""
    directory, path = _directory()
    (path / "stat").write_bytes(stat)
    (path / "status").write_bytes(status)
    return _facts(_read_raw(directory, 7))


def target(data: bytes) -> None:
    """Read any two files; then files of the kernel's, in which the process has any name."""
    stat, _, status = data.partition(b"\0")
    with contextlib.suppress(NotAttested):
        read(stat, status)
    # The kernel escapes a line break and a backslash in status, and cuts the name after 15 bytes (proc(5)); NUL ends it.
    name = stat[:15]
    shown = name.replace(b"\\", b"\\\\").replace(b"\n", b"\\n")
    facts = read(b"7 (" + name + b") " + REST, b"Name:\t" + shown + b"\nUmask:\t0022\n" + IDS)
    assert (facts.start_time, facts.uids, facts.gids, facts.groups) == (START, (1, 2, 3, 4), (5, 6, 7, 8), {9, 10})


if __name__ == "__main__":
    engine.run("process", target, list(SEEDS))
