"""Launches a program under a name: hold its code fast, register the process, then let it run; stay until it ends.

The process is registered before its program runs, and the program never runs where that failed: the child waits at a pipe,
and the pipe's end ends it. The launcher does not reap the process before its registration is gone, so that nobody else can
have its number meanwhile. Knows nothing of selectors and entries.
"""

import ctypes
import fcntl
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Final, NoReturn, Self

from broker.agent.launch_account import Account
from broker.agent.launch_code import SCRIPT_FD, Code
from broker.agent.launch_directory import LaunchDirectory
from broker.attestation.launches import Exe, Launch, boot_id, pid_namespace, start_time_of
from broker.errors import Misconfigured, Refused, Unavailable

FORWARDED: Final = frozenset(
    {signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2}
)
BY_SIGNAL: Final = 128  # a shell's way to say in an exit code that a signal ended a process

_WAITED: Final = FORWARDED | {signal.SIGCHLD}
_GO: Final = b"g"
_MAX_FAILURE: Final = 512  # bytes of what a child can say of its failure
_IMAGE_FD, _FAILURE_FD, _FIRST_CLOSED = SCRIPT_FD + 1, SCRIPT_FD + 2, SCRIPT_FD + 3
_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS = 1, 38  # prctl(2)

Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Launching:
    """What is to be launched, and as whom; ``account`` None stays who we are."""

    name: str
    code: Code
    account: Account | None
    environment: dict[str, str]


def launch(plan: Launching, directory: LaunchDirectory, tell: Tell) -> int:
    """Run the program to its end; give its exit code, or 128 and the number of the signal that ended it.

    Raises:
        Unavailable: it could not be registered; it never ran.
        Misconfigured: it could not be executed.
        Refused: its file was written while it was started.
    """
    _open_standard()
    with _signals_held() as before, _Pipe() as go, _Pipe() as failure:
        launcher = os.getpid()
        pid = os.fork()
        if pid == 0:
            go.close_write()
            _become(plan, go.read, failure.write, launcher, before)
        launched = _Launched(pid, directory)
        try:
            failure.close_write()
            launched.register(plan)
            with suppress(BrokenPipeError):  # it is dead already, and its end will be seen
                os.write(go.write, _GO)
            _require_started(failure.read, plan)
            with suppress(OSError):  # nobody may be listening any more; the program goes on
                tell(f"launched {plan.name} as process {pid}")
            return launched.stay()
        finally:
            launched.end()


class _Pipe:
    """Both ends, closed with the block or before; never inherited by a program."""

    def __init__(self) -> None:
        self.read, self.write = os.pipe2(os.O_CLOEXEC)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.read)
        self.close_write()

    def close_write(self) -> None:
        if self.write >= 0:
            os.close(self.write)
            self.write = -1


class _Launched:
    """Our child, from its fork to its end."""

    def __init__(self, pid: int, directory: LaunchDirectory) -> None:
        self._pid = pid
        self._directory = directory
        self._file = ""
        self._is_reaped = False

    def register(self, plan: Launching) -> None:
        start_time = start_time_of(self._pid)
        if start_time is None:
            raise Unavailable("the kernel does not show our own child", code="launch_not_registered")
        uids, gids = (os.getresuid(), os.getresgid())
        account = plan.account
        launch = Launch(
            boot_id=boot_id(),
            pid_namespace=pid_namespace(),
            pid=self._pid,
            start_time=start_time,
            name=plan.name,
            exe=Exe(device=plan.code.exe.device, inode=plan.code.exe.inode),
            uid=uids[1] if account is None else account.uid,
            gid=gids[1] if account is None else account.gid,
            sha256=plan.code.sha256,
            size=plan.code.size,
        )
        self._file = launch.file_name
        self._directory.write(launch)

    def stay(self) -> int:
        """Pass signals on until it has ended; give its exit code."""
        while not self._has_ended():
            told = signal.sigwaitinfo(_WAITED)
            # What the terminal sends, it sends to the whole group: the child has it already.
            if told.si_signo != signal.SIGCHLD and told.si_code <= 0:
                os.kill(self._pid, told.si_signo)
        return self._reap()

    def end(self) -> None:
        """Kill it if it still runs, and leave nothing of it."""
        if not self._is_reaped:
            with suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)
            self._reap()

    def _has_ended(self) -> bool:
        while (found := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) is not None:
            if found.si_pid == self._pid:
                return True
            os.waitpid(found.si_pid, 0)  # as a container's first process we are given the orphans
        return False

    def _reap(self) -> int:
        os.waitid(os.P_PID, self._pid, os.WEXITED | os.WNOWAIT)
        # Until it is reaped nobody else can have its number.
        if self._file:
            self._directory.remove(self._file)
        _, status = os.waitpid(self._pid, 0)
        self._is_reaped = True
        code = os.waitstatus_to_exitcode(status)
        return code if code >= 0 else BY_SIGNAL - code


def _require_started(read_failure: int, plan: Launching) -> None:
    """Wait until its program runs: the pipe's other end is closed by the kernel then."""
    said = b""
    while part := os.read(read_failure, _MAX_FAILURE):
        said += part
    if said:
        raise Misconfigured(
            f"{plan.code.arguments[0]} cannot be run: {said.decode('utf-8', 'replace')}",
            code="launch_failed",
            hint="may that user reach its directory, and is it a program of this machine?",
        )
    # From here on the kernel lets nobody write a running program's file.
    if not plan.code.is_unchanged():
        raise Refused("the program's file was written while it was started", code="launch_code_changed")


def _become(plan: Launching, go: int, failure: int, launcher: int, before: set[signal.Signals]) -> NoReturn:
    """The child: wait, drop what the program must not have, and become it. Never returns."""
    try:
        if os.read(go, 1) != _GO:
            os._exit(1)  # the launcher is gone, or could not register us
        image = _arrange(plan.code, failure)
        if plan.account is not None:
            plan.account.assume()
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0):
            raise OSError(ctypes.get_errno(), "prctl")  # noqa: TRY301 - told like any other failure
        if os.getppid() != launcher:
            os._exit(1)
        for number in (signal.SIGPIPE, signal.SIGXFSZ):  # which Python ignores
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        os.execve(image, plan.code.arguments, plan.environment)  # noqa: S606 - no shell: that is the point
    except BaseException as error:  # noqa: BLE001 - nothing may leave this function
        said = error.strerror if isinstance(error, OSError) and error.strerror else type(error).__name__
        with suppress(OSError):
            os.write(_FAILURE_FD, said.encode()[:_MAX_FAILURE])
    finally:
        os._exit(1)


def _arrange(code: Code, failure: int) -> int:
    """Give each descriptor its place and close all others; give the image's."""
    above = 64  # out of the way of the places
    wanted = {_FAILURE_FD: failure, _IMAGE_FD: code.image}
    if code.script is not None:
        wanted[SCRIPT_FD] = code.script
    kept = {place: fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, above) for place, fd in wanted.items()}
    for place, fd in kept.items():
        os.dup2(fd, place, inheritable=place == SCRIPT_FD)
    if code.script is None:
        with suppress(OSError):
            os.close(SCRIPT_FD)
    os.closerange(_FIRST_CLOSED, os.sysconf("SC_OPEN_MAX"))
    return _IMAGE_FD


def _open_standard() -> None:
    """No file of ours may get the number of a standard stream that is closed."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)


@contextmanager
def _signals_held() -> Iterator[set[signal.Signals]]:
    """Keep what we wait for from arriving in between; give the mask of before."""
    # Ignored by whoever started us, our child would be reaped by the kernel and its number free too early.
    child = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _WAITED)
    try:
        yield {signal.Signals(number) for number in before}
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        signal.signal(signal.SIGCHLD, child or signal.SIG_DFL)
