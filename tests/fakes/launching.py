"""``broker run`` as a process of its own, and the process that it launched."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from broker.attestation.process import Process

SECONDS = 30.0
READY = "import sys, os; print(os.getpid(), flush=True); sys.stdin.readline()"
"""A script that tells its number and waits for a line."""


class Launched:
    """The launcher, and what it launched."""

    def __init__(self, launcher: subprocess.Popen[str], pid: int) -> None:
        self.launcher, self.pid = launcher, pid

    @contextmanager
    def process(self) -> Iterator[Process]:
        with held(self.pid) as process:
            yield process

    def line(self) -> str:
        assert self.launcher.stdout is not None
        return self.launcher.stdout.readline().strip()

    def say(self, text: str = "") -> None:
        assert self.launcher.stdin is not None
        self.launcher.stdin.write(text + "\n")
        self.launcher.stdin.flush()

    def end(self) -> tuple[int, str]:
        """Let it go on; give the launcher's exit code and what it said."""
        _, err = self.launcher.communicate("\n", timeout=SECONDS)
        return self.launcher.returncode, err


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "broker.cli.main", "run", *arguments]


def run(*arguments: str, env: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Run the launcher to its end."""
    return subprocess.run(
        command(*arguments), capture_output=True, text=True, check=False, timeout=SECONDS, input="", env=env
    )


@contextmanager
def launched(*arguments: str, registered: Path | None = None, **options) -> Iterator[Launched]:
    """Start the launcher with a program that prints its number first; both are ended with the block.

    With ``registered`` it is one that repeats a line, and its number is read from that directory.
    """
    launcher = subprocess.Popen(
        command(*arguments),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options,
    )  # fmt: skip
    try:
        assert launcher.stdout is not None
        if registered is not None and launcher.stdin is not None:
            launcher.stdin.write("\n")
            launcher.stdin.flush()
        first = launcher.stdout.readline()
        if registered is not None and first == "\n":
            first = names(registered)[0].partition("-")[0]
        assert first.strip().isdigit(), (first, launcher.communicate(timeout=SECONDS))
        yield Launched(launcher, int(first))
    finally:
        launcher.kill()  # which ends its child, too
        launcher.communicate(timeout=SECONDS)


@contextmanager
def held(pid: int) -> Iterator[Process]:
    process = Process.of_pid(pid)
    try:
        yield process
    finally:
        process.close()


def private(directory: Path) -> Path:
    """Make what an agent would have made; give the directory of registrations, which is not there yet."""
    made = directory / "private"
    made.mkdir(mode=0o700)
    return made / "launches"


def script(directory: Path, text: str = READY, name: str = "agent.py") -> str:
    path = directory / name
    path.write_text(text + "\n")
    path.chmod(0o644)
    return str(path)


def until_gone(pid: int) -> None:
    deadline = time.monotonic() + SECONDS
    while os.path.exists(f"/proc/{pid}"):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def names(directory: Path) -> Sequence[str]:
    return sorted(os.listdir(directory))
