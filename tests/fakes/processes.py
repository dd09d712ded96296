"""Real processes for attestation tests: orphaned connections, chosen process ids, agents in a process of their own."""

import asyncio
import ctypes
import errno
import os
import signal
import sys
import time
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("workload_process.py")
_CLONE3 = 435  # the same on every architecture
_SIGCHLD = 17

AGENT = """
import os, sys
from pathlib import Path
from broker.agent.program import run
from broker.agent.settings import load
run(load(Path(sys.argv[1]), os.environ))
"""


class _CloneArgs(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_uint64)
        for name in (
            "flags",
            "pidfd",
            "child_tid",
            "parent_tid",
            "exit_signal",
            "stack",
            "stack_size",
            "tls",
            "set_tid",
            "set_tid_size",
            "cgroup",
        )
    )


def spawn_as(pid: int, command: list[str], seconds: float = 30.0) -> None:
    """Start a process under this very number, which must be free or about to be; skips where the kernel does not allow it."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    wanted = (ctypes.c_int32 * 1)(pid)
    arguments = _CloneArgs(exit_signal=_SIGCHLD, set_tid=ctypes.addressof(wanted), set_tid_size=1)
    prepared = [os.fsencode(part) for part in command]
    deadline = time.monotonic() + seconds
    while True:
        got = libc.syscall(_CLONE3, ctypes.byref(arguments), ctypes.sizeof(arguments))
        if got == 0:
            try:
                os.execv(prepared[0], prepared)
            finally:
                os._exit(127)
        if got > 0:
            assert got == pid
            return
        number = ctypes.get_errno()
        if number in {errno.EPERM, errno.ENOSYS, errno.EINVAL}:
            pytest.skip(f"the kernel does not let us choose a process id: {os.strerror(number)}")
        assert number == errno.EEXIST, os.strerror(number)
        assert time.monotonic() < deadline, "the number does not become free"
        time.sleep(0.005)


def reap(pid: int) -> None:
    """End a process of ours and take it out of the table."""
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    with suppress(ChildProcessError):
        os.waitpid(pid, 0)


class Held:
    """A process that connected, and the relay to its connection."""

    def __init__(self, process: asyncio.subprocess.Process, relay: Path) -> None:
        self.process, self.relay = process, relay

    @property
    def pid(self) -> int:
        return self.process.pid

    async def act(self) -> None:
        """Let it do what it was started for."""
        self.process.stdin.write(b"\n")
        await self.process.stdin.drain()


@asynccontextmanager
async def held_connection(socket: Path, relay: Path, act: str, *command: str, uid: int = -1):
    """A process that connected to ``socket`` and whose child offers that connection at ``relay``."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-I", "-S", str(SCRIPT), str(uid), str(socket), str(relay), act, *command,
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    holder = None
    try:
        word, holder = (await process.stdout.readline()).split()
        assert word == b"ready"
        yield Held(process, relay)
    finally:
        if holder is not None:
            with suppress(ProcessLookupError):
                os.kill(int(holder), signal.SIGKILL)
        if process.returncode is None:
            process.kill()
        process.stdin.close()
        await process.wait()
        await process.stdout.read()


@asynccontextmanager
async def agent_process(directory: Path, text: str, *, inside: tuple[str, ...] = ()):
    """An agent in a process of its own, as ``broker agent run`` starts it; ``inside``: a command that runs it, such as unshare."""
    path = directory / "agent.toml"
    path.write_text(text)
    log = directory / "agent.log"
    with log.open("wb") as out:
        process = await asyncio.create_subprocess_exec(
            *inside,
            sys.executable,
            "-c",
            AGENT,
            str(path),
            stdout=out,
            stderr=out,
            cwd=Path(__file__).resolve().parents[2],
        )
    process.log = log
    try:
        yield process
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGCONT)
            os.kill(innermost(process.pid) if inside else process.pid, signal.SIGTERM)
            try:
                await asyncio.wait_for(process.wait(), 30)
            except TimeoutError:
                process.kill()
                await process.wait()
                raise


def innermost(pid: int) -> int:
    """The process that a chain of commands such as unshare has come to."""
    while children := Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        pid = int(children[0])
    return pid
