"""Where attacks take place: an agent in a process of its own with one honest workload, and puppets to play everybody else."""

import asyncio
import json
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from tests.attacks.attestation import portable, wire
from tests.fakes.agent_estate import agent_text
from tests.fakes.fake_server import FakeServer, entry_message
from tests.fakes.processes import agent_process
from tests.fakes.running_agent import until

VICTIM = "spiffe://example.org/wl/victim"
BYSTANDER = "spiffe://example.org/wl/bystander"
SECONDS = 30.0  # for anything that must happen; the machine may be slow
FOR_EVER = "import time; time.sleep(3600)"
PROMPTLY = 2.0  # seconds until a connection without its process is closed
BOUND = 10.0  # seconds; 99 of 100 calls of a bystander are answered in that time, whatever is going on
IS_ROOT = os.geteuid() == 0
UID = 4001 if IS_ROOT else os.geteuid()  # of the victim
EVIL_UID = 4002 if IS_ROOT else os.geteuid()

WITH_PATHS = "[agent.attestors.workload.unix]\ndiscover_workload_path = true\n"
# Refused is: no identity, attestation failed, unauthenticated, or a connection that is closed.
REFUSED = ((wire.STATUS, 7), (wire.STATUS, 14), (wire.STATUS, 16), (wire.CLOSED, None))
DENIED, FAILED, CLOSED = (wire.STATUS, 7), (wire.STATUS, 14), (wire.CLOSED, None)


def as_user(uid: int, *groups: int) -> tuple[str, ...]:
    """A command that runs what follows as this user, in a group of the same number; nothing where we are this user."""
    if uid == os.geteuid():
        return ()
    listed = f"--groups={','.join(map(str, groups))}" if groups else "--clear-groups"
    return "setpriv", f"--reuid={uid}", f"--regid={uid}", listed


def served(*paths: str) -> tuple[str, list[str]]:
    """The answer that gives these identities."""
    return wire.SERVED, sorted(f"spiffe://example.org{path}" for path in paths)


class Held:
    """A connection in this process's hands, whoever made it."""

    def __init__(self, connection: socket.socket) -> None:
        self.wire = wire.Connection(connection)

    async def call(self, seconds: float = SECONDS, method: str = "FetchX509SVID"):
        return await asyncio.to_thread(lambda: self.wire.hear(self.wire.call(method), seconds))

    async def open_stream(self) -> int:
        return await asyncio.to_thread(self.wire.call)

    async def hear(self, stream: int, seconds: float = SECONDS):
        return await asyncio.to_thread(self.wire.hear, stream, seconds)

    async def is_closed(self, seconds: float = PROMPTLY) -> bool:
        """Whether it has come to its end within this time."""
        return (await self.hear(-1, seconds))[0] == wire.CLOSED

    def close(self) -> None:
        self.wire.socket.close()


class Puppet:
    """A process of ours that does what it is told; see puppet.py."""

    def __init__(self, process: asyncio.subprocess.Process, control: socket.socket) -> None:
        self.process, self._control = process, control
        control.settimeout(SECONDS)
        self._lines = control.makefile("rb")
        self.held: list[Held] = []

    @property
    def pid(self) -> int:
        return self.process.pid

    async def do(self, verb: str, *arguments):
        """Have it done; gives the answer."""
        self._control.sendall(json.dumps([verb, *arguments]).encode() + b"\n")
        line = await asyncio.to_thread(self._lines.readline)
        answer = json.loads(line)
        assert not isinstance(answer, dict), f"{verb}: {answer}"
        return tuple(answer) if verb in {"call", "ask"} else answer

    async def give(self) -> Held:
        """Take its connection, while it keeps its own hold of it."""
        held = Held(await self._take("give"))
        self.held.append(held)
        return held

    @asynccontextmanager
    async def sibling(self):
        """A child that holds the same connection: another puppet, of which this process is not the parent."""
        sibling = Puppet(self.process, await self._take("fork"))
        try:
            yield sibling
        finally:
            sibling.let_go()  # it ends by itself when nobody is there to tell it anything

    def let_go(self) -> None:
        for held in self.held:
            held.close()
        self._lines.close()
        self._control.close()

    async def _take(self, verb: str) -> socket.socket:
        self._control.sendall(json.dumps([verb]).encode() + b"\n")
        # Read by hand: a descriptor comes with its byte, and the answer's line follows.
        _, (fd,), _, _ = await asyncio.to_thread(socket.recv_fds, self._control, 1, 1)
        assert json.loads(await asyncio.to_thread(self._lines.readline)) is None
        return socket.socket(fileno=fd)

    async def take(self, held: Held) -> None:
        """Hand it a connection, which replaces its own."""
        assert await self.do("take") == "ready"
        await asyncio.to_thread(socket.send_fds, self._control, [b"t"], [held.wire.socket.fileno()])
        assert json.loads(await asyncio.to_thread(self._lines.readline)) is None

    async def end(self) -> None:
        """It exits, and is reaped."""
        self._control.sendall(b'["end"]\n')
        await self.process.wait()


class Program:
    """A process that asked once by wire.py and is still there: its answer, and what its executable is called."""

    def __init__(self, process: asyncio.subprocess.Process, said: dict) -> None:
        self.process = process
        self.answer = tuple(said["answer"])
        self.exe_for_itself: str = said["exe"]
        self.pid: int = said["pid"]


class Arena:
    """The agent, its server, three programs, and what is needed to start processes that play."""

    def __init__(self, directory: Path, server: FakeServer) -> None:
        self.directory, self.server = directory, server
        self.agent: asyncio.subprocess.Process
        self.text: str
        self.socket = str(directory / "agent" / "public" / "api.sock")
        self.programs = directory / "wl"
        self.programs.mkdir()
        self.home = directory / "python"
        portable.install(self.home)
        self.environ = portable.environment(self.home)
        self.victim, self.evil, self.bystander = (self.program(name) for name in ("victim", "evil", "bystander"))

    def program(self, name: str) -> Path:
        """Another copy of the interpreter: a file of its own."""
        path = self.programs / name
        shutil.copyfile(os.path.realpath("/proc/self/exe"), path)
        path.chmod(0o755)
        return path

    def command(self, program: Path | str, script: str, *arguments: str) -> tuple[str, ...]:
        """A script of the harness under an interpreter."""
        return str(program), "-S", "-s", str(self.home / script), *arguments

    def register(self, name: str, *selectors: str) -> None:
        """Have the server say that these selectors earn ``/wl/<name>``."""
        self.server.put(entry_message(name, f"/wl/{name}", list(selectors)))

    def executable(self, name: str, text: str) -> Path:
        """A script in the arena's directory."""
        path = self.directory / name
        path.write_text(text)
        path.chmod(0o755)
        return path

    @property
    def log(self) -> str:
        return self.agent.log.read_text(errors="replace")

    @asynccontextmanager
    async def puppet(self, program: Path | None = None, *, uid: int | None = None, inside: Iterable[str] = ()):
        """A puppet that executes ``program`` (the evil one) as ``uid`` (who we are)."""
        ours, theirs = socket.socketpair()
        process = await asyncio.create_subprocess_exec(
            *inside, *self.command(program or self.evil, "puppet.py", str(theirs.fileno())),
            pass_fds=(theirs.fileno(),), env=self.environ,
        )  # fmt: skip
        theirs.close()
        puppet = Puppet(process, ours)
        try:
            if uid is not None and IS_ROOT:
                await puppet.do("become", uid, uid, [])
            yield puppet
        finally:
            puppet.let_go()
            await ended(process)

    @asynccontextmanager
    async def asks(self, *argv: str, uid: int | None = None, inside: Iterable[str] = ()):
        """A process that asks once; ``argv``: an interpreter, by default the evil one, and its first arguments."""
        user = () if uid is None else as_user(uid)
        argv = (
            *user,
            *inside,
            *(argv or (str(self.evil),)),
            "-S",
            "-s",
            str(self.home / "wire.py"),
            self.socket,
            "hold",
        )
        async with self.asks_by(*argv) as program:
            yield program

    @asynccontextmanager
    async def asks_by(self, *argv: str):
        """This command, which is to end in wire.py, as a process that asks once."""
        process = await asyncio.create_subprocess_exec(
            *argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=self.environ, cwd="/"
        )
        try:
            line = await asyncio.wait_for(process.stdout.readline(), SECONDS)
            assert line, f"{argv[0]} did not get as far as to ask"
            yield Program(process, json.loads(line))
        finally:
            await ended(process)

    @asynccontextmanager
    async def swarm(self, program: Path, uids: Iterable[int]):
        """Processes that wait; the function given lets them ask all at once, and gives [uid, answer, seconds] of each."""
        process = await asyncio.create_subprocess_exec(
            *self.command(program, "swarm.py", self.socket, *map(str, uids)),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=self.environ, limit=1 << 24,
        )  # fmt: skip

        async def go() -> list[tuple[int, tuple, float]]:
            process.stdin.write(b"\n")
            said = json.loads(await asyncio.wait_for(process.stdout.readline(), 2 * SECONDS))
            return [(uid, tuple(answer), seconds) for uid, answer, seconds in said]

        try:
            assert await asyncio.wait_for(process.stdout.readline(), SECONDS) == b"ready\n"
            yield go
        finally:
            await ended(process)

    def may_unshare(self, *flags: str) -> None:
        """Skip the test where this user may not make user namespaces."""
        if subprocess.run(["unshare", "-Ur", *flags, "true"], capture_output=True, check=False).returncode != 0:
            pytest.skip("user namespaces are not allowed here")

    async def transform(self, puppet: Puppet, program: Path):
        """Have a puppet become this program (execve), which then does nothing."""
        puppet._control.sendall(
            json.dumps(["become_program", str(program), [str(program), "-S", "-s", "-c", FOR_EVER]]).encode() + b"\n"
        )
        await until(lambda: os.readlink(f"/proc/{puppet.pid}/exe") == str(program))

    @asynccontextmanager
    async def rebirth(self):
        """A function that starts a victim under a number of one's choice, which must be free; see victims.py."""
        process = await asyncio.create_subprocess_exec(
            *self.command(self.victim, "victims.py", str(UID), self.socket),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=self.environ,
        )  # fmt: skip

        async def say(line: str) -> None:
            process.stdin.write(line.encode() + b"\n")
            assert json.loads(await asyncio.wait_for(process.stdout.readline(), SECONDS)) is None

        async def born(pid: int) -> None:
            await say(f"spawn {pid}")
            assert os.readlink(f"/proc/{pid}/exe") == str(self.victim)

        try:
            yield born
            await say("kill")
        finally:
            await ended(process)

    async def serve_victim(self) -> None:
        """Have the honest workload ask until it has what it is entitled to, and nothing else: the positive view."""
        async with asyncio.timeout(SECONDS), self.puppet(self.victim, uid=UID) as victim:
            while await victim.do("ask", self.socket) != (wire.SERVED, [VICTIM]):
                pass


class Witness:
    """The bystander's process."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def report(self) -> dict:
        """What became of its calls so far; waits for the one in progress."""
        self._process.stdin.write(b"\n")
        return json.loads(await asyncio.wait_for(self._process.stdout.readline(), 2 * SECONDS))


async def ended(process: asyncio.subprocess.Process) -> None:
    """End a process of ours, and let go of its pipes. What it started and does not end with it sees its input's end."""
    if process.stdin is not None:
        process.stdin.close()
    if process.returncode is None:
        with suppress(ProcessLookupError):
            process.kill()
    if process.stdout is not None:
        await process.stdout.read()
    await process.wait()


@asynccontextmanager
async def prepared(*, attestors: Callable[[Arena], str] = lambda it: WITH_PATHS, **settings):
    """An arena whose agent has not been started; ``text`` is its settings, ``attestors`` the end of them."""
    directory = Path(tempfile.mkdtemp(dir="/tmp"))
    directory.chmod(0o755)
    try:
        async with FakeServer(directory) as server:
            it = Arena(directory, server)
            for name, program, uid in (("victim", it.victim, UID), ("bystander", it.bystander, os.geteuid())):
                entry = entry_message(name, f"/wl/{name}", [f"unix:uid:{uid}", f"unix:path:{program}"])
                server.entries[name] = entry
            it.text = agent_text(server, **settings) + attestors(it)
            yield it
    finally:
        shutil.rmtree(directory)


@asynccontextmanager
async def arena(*, inside: tuple[str, ...] = (), ready: bool = True, **settings):
    """An arena; ``ready``: the victim has been served before anything begins."""
    async with prepared(**settings) as it, agent_process(it.directory, it.text, inside=inside) as it.agent:
        await until(lambda: it.server.watches or it.agent.returncode is not None, SECONDS)
        if ready:
            assert it.agent.returncode is None, it.log
            await it.serve_victim()
        yield it


@asynccontextmanager
async def bystander_of(it: Arena):
    """An honest workload beside the attack, which must be served throughout."""
    process = await asyncio.create_subprocess_exec(
        *it.command(it.bystander, "bystander.py", it.socket, BYSTANDER),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=it.environ,
    )  # fmt: skip
    try:
        yield Witness(process)
    finally:
        await ended(process)
