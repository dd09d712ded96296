"""Executables on a file system whose server stops to answer the agent, in the middle of whatever the agent asks of it (A07)."""

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import TypeVar

import pytest

from tests.attacks.attestation.arena import (
    EVIL_UID,
    FAILED,
    REFUSED,
    SECONDS,
    Arena,
    Puppet,
    as_user,
    served,
)
from tests.attacks.attestation.hanging_files import OPERATIONS
from tests.fakes.running_agent import until

pytestmark = [
    pytest.mark.alone("how long others wait is measured"),
    pytest.mark.asyncio(loop_scope="package"),
    pytest.mark.root("mounts a file system of its own"),
    pytest.mark.skipif(not os.access("/dev/fuse", os.R_OK | os.W_OK), reason="this kernel has no FUSE"),
]
T = TypeVar("T")
GIVES_UP = 5.0  # seconds until the unix attestor gives a caller up
LIMIT = GIVES_UP + 3  # of a busy machine


class Hanging:
    """A mounted file system of one program, and its server."""

    def __init__(self, process: asyncio.subprocess.Process, program: Path) -> None:
        self._process, self.program = process, program

    async def say(self, line: str) -> int:
        """Tell the server; gives how many requests it keeps waiting."""
        self._process.stdin.write(f"{line}\n".encode())
        return int(await asyncio.wait_for(self._process.stdout.readline(), SECONDS))


@asynccontextmanager
async def hanging_files(it: Arena, name: str) -> AsyncIterator[Hanging]:
    """A file system of its own below the arena, seen by everybody."""
    directory = it.directory / f"files-{name}"
    directory.mkdir()
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(it.home / "hanging_files.py"), str(directory), str(it.evil),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert await asyncio.wait_for(process.stdout.readline(), SECONDS) == b"ready\n", "it could not be mounted"
        yield Hanging(process, directory / "program")
    finally:
        process.stdin.close()  # it unmounts; whoever waits for an answer gets an error
        await asyncio.wait_for(process.wait(), SECONDS)
        directory.rmdir()


@pytest.mark.bears("A07", "A22")
@pytest.mark.timeout(120)
async def test_files_that_hang_refuse_their_own_callers_in_time_and_nobody_else(duel: Arena) -> None:
    """Wherever the agent stands when the file system stops to answer: at the name, the open, the facts, the bytes."""
    clock = asyncio.get_running_loop().time
    async with AsyncExitStack() as stack:
        all_files: dict[str, Hanging] = {}
        puppets: dict[str, Puppet] = {}
        for name in OPERATIONS:
            files = all_files[name] = await stack.enter_async_context(hanging_files(duel, name))
            duel.register(f"on-{name}", f"unix:uid:{EVIL_UID}", f"unix:path:{files.program}")
            # While it answers it is a file system like any other.
            async with duel.puppet(files.program, uid=EVIL_UID) as puppet:
                await served_in_the_end(duel, puppet, name)
            puppets[name] = await stack.enter_async_context(duel.puppet(files.program, uid=EVIL_UID))
        threads = threads_of(duel.agent.pid)
        for name, files in all_files.items():
            assert await files.say(f"hang {duel.agent.pid} {name}") == 0

        asking = {name: asyncio.create_task(timed(puppet.do("ask", duel.socket))) for name, puppet in puppets.items()}
        slowest, until_then = 0.0, clock() + 3 * LIMIT
        while not all(one.done() for one in asking.values()) and clock() < until_then:
            began = clock()
            await duel.serve_victim()  # a new process each time: it has to be attested
            slowest = max(slowest, clock() - began)
        print(f"slowest newcomer meanwhile: {slowest:.3f} s")
        for name, one in asking.items():
            answer, seconds = await one
            assert answer == FAILED, name
            assert GIVES_UP - 1 < seconds < LIMIT, (name, seconds)
            assert await all_files[name].say("seen") > 0, f"the agent did not ask for {name}"
        assert slowest < GIVES_UP - 1

        # It answers again: the agent's threads are free, and the same processes are what they always were.
        for name, files in all_files.items():
            await files.say("release")
            await served_in_the_end(duel, puppets[name], name)
        await until(lambda: threads_of(duel.agent.pid) <= threads + 5, SECONDS)


@pytest.mark.bears("A07", "A12")
async def test_a_file_system_of_a_users_own_namespace_is_not_even_asked(duel: Arena) -> None:
    """The kernel lets nobody from outside into it: what runs from there cannot be looked at, and is refused at once."""
    duel.may_unshare("-m")
    directory = duel.directory / "files-own"
    directory.mkdir()
    duel.register("own", f"unix:uid:{EVIL_UID}")
    python, script = str(duel.home / "hanging_files.py"), str(duel.evil)
    inside = (*as_user(EVIL_UID), "unshare", "-Urm", script, "-S", "-s", python, str(directory), script)
    async with duel.puppet(uid=EVIL_UID) as control:
        await served_in_the_end(duel, control, "own", "/wl/own")
    began = asyncio.get_running_loop().time()
    async with duel.asks(str(directory / "program"), inside=inside) as attacker:
        assert attacker.exe_for_itself == str(directory / "program")
        assert attacker.answer in REFUSED
    assert asyncio.get_running_loop().time() - began < SECONDS
    await until(lambda: "process_unreadable" in duel.log)
    directory.rmdir()


async def served_in_the_end(it: Arena, puppet: Puppet, name: str, *paths: str) -> None:
    """Have it ask until the agent has heard of its entry."""
    async with asyncio.timeout(SECONDS):
        while await puppet.do("ask", it.socket) != served(*(paths or (f"/wl/on-{name}",))):
            pass


async def timed(work: Awaitable[T]) -> tuple[T, float]:
    """What it gives, and in how many seconds."""
    clock = asyncio.get_running_loop().time
    began = clock()
    return await work, clock() - began


def threads_of(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/task"))
