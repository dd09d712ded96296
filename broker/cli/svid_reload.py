"""Telling other programs that files have changed: one started here, one named by a pid file, and a command per change.

What cannot be told is said on standard error, and the files go on being kept. Writes none of them.
"""

import asyncio
import contextlib
import os
import re
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from broker.errors import Invalid

EXEC_SECONDS: Final = 60.0
"""For the command that runs after each change: a reload, no service."""
GRACE: Final = 10.0
"""Seconds between asking the program to end and killing it."""
BY_SIGNAL: Final = 128
"""A shell's way to say in an exit code that a signal ended a process."""
MAX_PID_FILE: Final = 64
"""Bytes: a number and a line feed."""

_PID: Final = re.compile(rb"\s*([1-9][0-9]{0,9})\s*")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReloadPlan:
    """Whom to tell, and how."""

    program: Sequence[str] = ()
    """Started when the first files are there, and signalled afterwards."""
    each_time: Sequence[str] = ()
    """Run to its end after each change."""
    pid_file: Path | None = None
    renew_signal: signal.Signals | None = None


def signal_named(text: str) -> signal.Signals:
    """Read ``HUP`` or ``SIGHUP``; raises Invalid."""
    name = text.upper().removeprefix("SIG")
    if name in {"KILL", "STOP"} or f"SIG{name}" not in signal.Signals.__members__:
        raise Invalid(f"not a signal that tells a program something: {text!r}", code="signal", hint="HUP, USR1, USR2")
    return signal.Signals[f"SIG{name}"]


class Reload:
    """Tells them. ``say`` shows a person what went wrong."""

    def __init__(self, plan: ReloadPlan, say: Callable[[str], None]) -> None:
        self._plan = plan
        self._say = say
        self._child: asyncio.subprocess.Process | None = None
        self.ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        """The exit code of the program, when it ends by itself."""
        self._waiting: asyncio.Task[None] | None = None

    async def changed(self) -> None:
        """Tell everybody; raises Invalid when the program cannot be started at all."""
        if self._plan.program:
            await self._tell_program()
        if self._plan.pid_file is not None:
            self._tell_by_file(self._plan.pid_file)
        if self._plan.each_time:
            await self._run_once(self._plan.each_time)

    async def stop(self) -> None:
        """End the program, first by asking."""
        child, self._child = self._child, None
        if child is None or child.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            child.terminate()
        try:
            # Not wait_for, here and below, which in Python 3.11 forgets a cancellation that comes together with the end.
            async with asyncio.timeout(GRACE):
                await child.wait()
        except TimeoutError:
            with contextlib.suppress(ProcessLookupError):
                child.kill()
            await child.wait()

    async def _tell_program(self) -> None:
        if self._child is None:
            self._child = await _started(self._plan.program)
            self._waiting = asyncio.create_task(self._wait(self._child))
        elif self._plan.renew_signal is not None:
            with contextlib.suppress(ProcessLookupError):
                self._child.send_signal(self._plan.renew_signal)

    async def _wait(self, child: asyncio.subprocess.Process) -> None:
        code = await child.wait()
        if not self.ended.done():
            self.ended.set_result(code if code >= 0 else BY_SIGNAL - code)

    def _tell_by_file(self, path: Path) -> None:
        assert self._plan.renew_signal is not None
        try:
            os.kill(_pid_in(path), self._plan.renew_signal)
        except Invalid as error:
            self._say(f"nobody was signalled: {error.message}")
        except OSError as error:
            self._say(f"nobody was signalled: the process that {path} names: {error.strerror}")

    async def _run_once(self, command: Sequence[str]) -> None:
        try:
            child = await _started(command)
        except Invalid as error:
            self._say(error.message)
            return
        try:
            async with asyncio.timeout(EXEC_SECONDS):
                code = await child.wait()
        except TimeoutError:
            self._say(f"{command[0]} takes longer than {EXEC_SECONDS:.0f} s and is ended")
        else:
            if code:
                self._say(f"{command[0]} ended with {code}")
        finally:
            if child.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    child.kill()
                await child.wait()


def _pid_in(path: Path) -> int:
    try:
        with path.open("rb") as file:
            match = _PID.fullmatch(file.read(MAX_PID_FILE))
    except OSError as error:
        raise Invalid(f"{path} cannot be read: {error.strerror}", code="pid_file") from None
    # NOTE(security): zero, a minus sign and 1 would signal whole groups, or init.
    pid = int(match[1]) if match else 0
    if pid <= 1 or pid == os.getpid():
        raise Invalid(f"{path} names no process that could be meant", code="pid_file")
    return pid


async def _started(command: Sequence[str]) -> asyncio.subprocess.Process:
    try:
        return await asyncio.create_subprocess_exec(*command)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "no name of a program"
        raise Invalid(
            f"{command[0]} cannot be run: {reason}", code="command_not_run", hint="name it by its path"
        ) from None
