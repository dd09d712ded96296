"""Processes of ours, remembered by pid and start time, so that nothing else is ever ended in their place."""

import os
import select
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

GRACE_SECONDS = 5.0
"""Between the polite signal and the other one: a server closes its store and its connections."""

TAIL_LINES = 12
"""Of a log, shown when its program fails: the last error and what led to it."""

_TAIL_BYTES = 16 * 1024


@dataclass(frozen=True, slots=True)
class Started:
    """One process: its pid, and when it started (clock ticks since boot), which no later holder of the pid has."""

    pid: int
    start_time: int


def launch(arguments: Sequence[str], *, log: Path, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """Start a program in a session of its own, its output appended to ``log`` (0600)."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as output:
        return subprocess.Popen(  # noqa: S603 - our own programs, by a list of arguments
            list(arguments),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=dict(environment),
            start_new_session=True,
        )


def identify(pid: int) -> Started | None:
    """Give a living process's identity; None when there is none, or only its remains."""
    try:
        # The name in parentheses may hold anything; what follows the last one is fields 3 and on.
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    state, start_time = fields[0], int(fields[19])
    return None if state in {"Z", "X", "x"} else Started(pid, start_time)


def is_running(started: Started) -> bool:
    """Say whether that very process still lives."""
    return identify(started.pid) == started


def end(started: Started, *, grace: float = GRACE_SECONDS) -> None:
    """End that very process, if it still lives, and wait until it is gone; ``grace`` is in seconds."""
    try:
        pidfd = os.pidfd_open(started.pid)
    except ProcessLookupError:
        return
    try:
        # After the pidfd is held the pid cannot pass to another: now the comparison means something.
        if identify(started.pid) != started:
            return
        for number in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, number)
            if select.select([pidfd], [], [], grace)[0]:
                return
    finally:
        os.close(pidfd)


def tail(log: Path) -> str:
    """Give the last lines of a log, indented, for an error text."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - _TAIL_BYTES))
            text = file.read().decode("utf-8", errors="replace")
    except OSError:
        return "  (no log)"
    return "\n".join(f"  {line}" for line in text.splitlines()[-TAIL_LINES:]) or "  (its log is empty)"
