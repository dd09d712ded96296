"""Many at once, large files, and what the agent's own processes and memory give away (A07, A21, A23, A25)."""

import asyncio
import ctypes
import errno
import hashlib
import os
from collections import Counter
from pathlib import Path

import pytest

from tests.attacks.attestation.arena import (
    BOUND,
    DENIED,
    EVIL_UID,
    FAILED,
    IS_ROOT,
    REFUSED,
    UID,
    WITH_PATHS,
    Arena,
    arena,
    bystander_of,
    served,
)
from tests.fakes.running_agent import until

pytestmark = [
    pytest.mark.alone("how long others wait is measured"),
    pytest.mark.asyncio(loop_scope="package"),
]
LIMIT = 64 << 20  # bytes
HUGE = 64 << 30  # bytes, hardly any of them on the disk: more than can be hashed in the time that an attestor has
TIMES_OUT = 5.0  # seconds until the unix attestor gives a caller up
USERS = range(5000, 5050)
PTRACE_SEIZE = 0x4206


def with_a_limit(it: Arena) -> str:
    return f"{WITH_PATHS}workload_size_limit = {LIMIT}\n"


# --- A07: files that take long to hash


@pytest.mark.bears("A07")
async def test_a_huge_executable_is_refused_at_once_where_there_is_a_limit() -> None:
    async with arena(attestors=with_a_limit) as it:
        os.truncate(huge := it.program("huge"), HUGE)
        it.register("huge", f"unix:uid:{UID}")
        async with it.asks(str(huge), uid=UID) as attacker:
            assert attacker.answer == FAILED
        await until(lambda: "executable_too_large" in it.log)
        async with it.asks(uid=UID) as other:
            assert other.answer == served("/wl/huge")


@pytest.mark.root("processes of other users")
@pytest.mark.bears("A07")
async def test_a_hundred_callers_with_a_huge_executable_hold_up_nobody_else(duel: Arena) -> None:
    """Without a limit each of them costs a thread for five seconds, of which one user has a few: newcomers are served all along."""
    os.truncate(huge := duel.program("huge"), HUGE)
    clock = asyncio.get_running_loop().time
    async with duel.swarm(huge, [EVIL_UID] * 100) as go:
        attack, slowest, until_then = asyncio.create_task(go()), 0.0, clock() + TIMES_OUT + 1
        while clock() < until_then:
            began = clock()
            await duel.serve_victim()  # a new process each time: it has to be attested
            slowest = max(slowest, clock() - began)
        assert not attack.done()
        attack.cancel()
        await asyncio.gather(attack, return_exceptions=True)
    huge.unlink()
    print(f"slowest newcomer during the attack: {slowest:.3f} s")
    assert slowest < TIMES_OUT - 1


@pytest.mark.bears("A07")
async def test_a_changed_file_is_hashed_again(duel: Arena) -> None:
    program = duel.program("hashed")
    with program.open("ab") as file:
        file.write(b"mine")  # every other copy of this interpreter has the same digest
    known = hashlib.sha256(program.read_bytes()).hexdigest()
    duel.register("hashed", f"unix:uid:{UID}", f"unix:sha256:{known}")
    async with duel.asks(str(program), uid=UID) as honest:
        assert honest.answer == served("/wl/hashed")
    with program.open("ab") as file:
        file.write(b"\0")
    async with duel.asks(str(program), uid=UID) as changed:
        assert changed.answer == DENIED


@pytest.mark.bears("A07")
async def test_an_executable_that_grows_while_it_is_hashed(duel: Arena) -> None:
    """The kernel keeps writers away from what is executed (ETXTBSY); where it does not, the caller is refused."""
    os.truncate(growing := duel.program("growing"), 1 << 30)
    duel.register("growing", f"unix:uid:{UID}", f"unix:path:{growing}")
    async with duel.puppet(growing, uid=UID) as attacker:
        try:
            with growing.open("ab", buffering=0) as file:
                asking = asyncio.create_task(attacker.do("ask", duel.socket))
                while not asking.done():
                    file.write(b"x")
                    await asyncio.sleep(0)
                assert await asking in REFUSED
        except OSError as error:
            assert error.errno == errno.ETXTBSY  # noqa: PT017 - either this, or no error at all
            in_time, too_slow = served("/wl/growing"), FAILED
            assert await attacker.do("ask", duel.socket) in (in_time, too_slow)
    growing.unlink()


# --- A21: what a program of the agent's inherits


@pytest.mark.bears("A21")
async def test_the_agents_own_programs_inherit_none_of_its_descriptors() -> None:
    script = '#!/bin/sh\nls -l /proc/$$/fd > "$1/$$.fds"\necho \'{"version": 1, "selectors": []}\'\n'

    def listing(it: Arena) -> str:
        program = it.executable("listing", script)
        (it.directory / "out").mkdir(mode=0o777)
        digest = hashlib.sha256(script.encode()).hexdigest()
        return (
            f'{WITH_PATHS}[[agent.attestors.workload.exec.programs]]\nname = "listing"\npath = "{program}"\n'
            f'args = ["{it.directory}/out"]\nsha256 = "{digest}"\ntimeout = 5.0\n'
        )

    async with arena(attestors=listing) as it, bystander_of(it) as witness, it.puppet(it.victim, uid=UID) as holder:
        await witness.report()
        await holder.do("connect", it.socket)
        await holder.do("call")  # a stream that stays open while others are attested
        for _ in range(3):
            await it.serve_victim()
        lists = list((it.directory / "out").glob("*.fds"))
        assert len(lists) > 3
        for one in lists:
            links = [line.partition(" -> ")[2] for line in one.read_text().splitlines() if " -> " in line]
            assert len(links) >= 3
            kinds = Counter(link.partition(":")[0] for link in links if link not in {"/dev/null", str(one)})
            # Its question, its answer, and itself: by the number it was started with, and as the shell opened it.
            assert kinds <= Counter({"/memfd": 3, "pipe": 1}), links


# --- A23: a storm


@pytest.mark.root("processes of fifty users")
@pytest.mark.bears("A23")
async def test_a_storm_of_five_hundred_processes_of_fifty_users(duel: Arena) -> None:
    for uid in USERS:
        duel.register(f"user-{uid}", f"unix:uid:{uid}")
    async with duel.asks(uid=USERS[-1]) as last:  # the agent has heard of all of them
        assert last.answer == served(f"/wl/user-{USERS[-1]}")
    async with duel.swarm(duel.evil, [*USERS] * 10) as go:
        answers = await go()
    took = sorted(seconds for _, _, seconds in answers)
    print(f"answered within {took[-1]:.2f} s, half of them within {took[250]:.2f} s")
    assert len(answers) == 500
    assert [(uid, answer) for uid, answer, _ in answers if answer != served(f"/wl/user-{uid}")] == []
    assert took[-1] < 3 * BOUND


# --- A25: the agent's memory


@pytest.mark.bears("A25")
@pytest.mark.skipif(IS_ROOT, reason="root may read every process")
async def test_its_own_user_may_not_look_into_the_agent(duel: Arena) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    agent = duel.agent.pid
    async with duel.puppet() as other:
        assert b"PYTHONHOME" in Path(f"/proc/{other.pid}/environ").read_bytes()  # it may do so with its other processes
    for name in ("environ", "mem", "maps", "auxv"):
        with pytest.raises(PermissionError):
            Path(f"/proc/{agent}/{name}").read_bytes()
    with pytest.raises(PermissionError):
        os.listdir(f"/proc/{agent}/fd")
    assert libc.ptrace(PTRACE_SEIZE, agent, None, None) == -1
    assert ctypes.get_errno() == errno.EPERM
