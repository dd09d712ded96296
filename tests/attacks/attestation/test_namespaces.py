"""Callers and agents in namespaces of their own, and a /proc that is not the kernel's (A12, A13, A14)."""

import os
from pathlib import Path

import pytest

from tests.attacks.attestation.arena import (
    BYSTANDER,
    DENIED,
    EVIL_UID,
    IS_ROOT,
    REFUSED,
    UID,
    Arena,
    arena,
    as_user,
    served,
)
from tests.fakes.processes import innermost
from tests.fakes.running_agent import until

pytestmark = pytest.mark.asyncio(loop_scope="package")
needs_root = pytest.mark.root("namespaces that hold other users' processes")
OWN_PIDS = ("unshare", "--pid", "--fork", "--kill-child")
OWN_USERS = ("--user", "--map-root-user")  # what an ordinary user needs to be allowed the rest
KEPT = ("nsenter", "--user", "--preserve-credentials")


# --- A12: user namespaces


@pytest.mark.bears("A12")
async def test_roots_number_in_a_user_namespace_is_nobodys(duel: Arena) -> None:
    """Fake root, with a user database of its own in which it is called root: the agent knows the kernel's number."""
    duel.may_unshare("-m")
    duel.register("root", "unix:uid:0", f"unix:path:{duel.evil}")
    duel.register("by-name", "unix:user:root", f"unix:path:{duel.evil}")
    duel.register("itself", f"unix:uid:{EVIL_UID}", f"unix:path:{duel.evil}")
    passwd = duel.directory / "passwd"
    passwd.write_text(f"root:x:{EVIL_UID}:{EVIL_UID}::/:/bin/sh\n4001:x:{EVIL_UID}:{EVIL_UID}::/:/bin/sh\n")
    script = f'mount --bind {passwd} /etc/passwd; exec "$0" "$@"'
    inside = ("unshare", "--user", "--map-root-user", "--mount", "/bin/sh", "-e", "-c", script)
    async with duel.asks(inside=inside, uid=EVIL_UID) as attacker:
        assert attacker.answer == served("/wl/itself")


@needs_root
@pytest.mark.bears("A12")
async def test_an_agent_in_a_user_namespace_takes_unmapped_ids_for_nobody() -> None:
    """Every id without a number there looks like 65534: no rule on 65534 may match by that."""
    async with arena(inside=("unshare", "--user", "--map-root-user"), ready=False) as it:
        within = (*KEPT, "--target", str(it.agent.pid))
        grouped = ("setpriv", f"--groups={EVIL_UID}")
        for selector in ("uid", "gid", "supplementary_gid"):
            it.register(selector, f"unix:{selector}:65534")
        for selector in ("user:nobody", "group:nogroup", "supplementary_group:nogroup"):
            it.register(selector.replace(":", "-"), f"unix:{selector}")

        async with it.asks(str(it.bystander), inside=within) as honest:
            assert honest.answer == (honest.answer[0], [BYSTANDER])
        async with it.asks(uid=EVIL_UID) as attacker:
            assert attacker.answer in REFUSED
        async with it.asks(inside=("setpriv", f"--regid={EVIL_UID}", "--clear-groups", *within)) as attacker:
            assert attacker.answer in REFUSED
        async with it.asks(inside=(*grouped, *within)) as attacker:
            assert attacker.answer in REFUSED
        async with it.asks(str(it.bystander), inside=(*grouped, *within)) as honest:
            assert honest.answer == (honest.answer[0], [BYSTANDER])


# --- A13: pid namespaces


@pytest.mark.bears("A13")
async def test_a_caller_in_a_pid_namespace_is_known_by_its_number_outside(duel: Arena) -> None:
    duel.may_unshare("-pf")
    inside = (*OWN_PIDS, *OWN_USERS)
    async with (
        duel.asks(str(duel.victim), inside=inside, uid=UID) as honest,
        duel.asks(inside=inside, uid=UID) as attacker,
    ):
        assert honest.pid == attacker.pid == 1
        assert honest.answer == served("/wl/victim")
        assert attacker.answer == DENIED


@needs_root
@pytest.mark.bears("A13")
async def test_an_agent_in_a_pid_namespace_knows_nobody_outside() -> None:
    async with arena(inside=(*OWN_PIDS, "--mount-proc"), ready=False) as it:
        async with it.asks(str(it.victim), uid=UID) as outside:
            assert outside.answer in REFUSED
        async with it.asks(str(it.victim), inside=(*OWN_PIDS, *OWN_USERS), uid=UID) as beside:
            assert beside.answer in REFUSED
        await until(lambda: "hostPID" in it.log)  # the cause, for whoever runs it
        within = ("nsenter", "--target", str(innermost(it.agent.pid)), "--pid", "--mount")
        async with it.asks(str(it.victim), inside=(*within, *as_user(UID))) as inside:
            assert inside.answer == served("/wl/victim")


@needs_root
@pytest.mark.bears("A13", "A14")
async def test_numbers_of_one_namespace_in_the_proc_of_another() -> None:
    """An agent with the outer /proc: the caller's number within is the victim's number outside."""
    async with arena(inside=OWN_PIDS, ready=False) as it, it.puppet(it.victim, uid=UID) as victim:
        script = f'echo {victim.pid - 1} > /proc/sys/kernel/ns_last_pid; "$0" "$@"; true'
        within = ("nsenter", "--target", str(innermost(it.agent.pid)), "--pid", "/bin/sh", "-c", script)
        async with it.puppet(uid=UID, inside=within) as attacker:
            assert await attacker.do("pid") == victim.pid
            assert await attacker.do("ask", it.socket) in REFUSED
        # Nobody is served by such an agent: it fails closed, and goes on.
        assert it.agent.returncode is None


# --- A14: another /proc than the kernel's


@pytest.mark.bears("A14")
@pytest.mark.parametrize("lie", ["a directory", "an empty file system"])
async def test_an_agent_whose_proc_is_not_the_kernels_does_not_start(duel: Arena, lie: str) -> None:
    duel.may_unshare("-m")
    fake = duel.directory / "proc"
    (fake / "self").mkdir(parents=True, exist_ok=True)
    (fake / "self" / "uid_map").write_text("0 0 4294967295\n")
    mount = f"mount --bind {fake} /proc" if lie == "a directory" else "mount -t tmpfs none /proc"
    outer = ("unshare", "--mount", *(() if IS_ROOT else OWN_USERS))
    inside = (*outer, "/bin/sh", "-e", "-c", f'{mount}; exec "$0" "$@"')
    async with arena(inside=inside, ready=False) as it:
        assert await it.agent.wait() == 1
        assert "/proc is not procfs" in it.log


@needs_root
@pytest.mark.bears("A14")
@pytest.mark.parametrize("lie", ["a copy", "the victim's own"])
async def test_another_directory_over_the_callers_in_the_agents_proc(lie: str) -> None:
    private = ("unshare", "--mount", "--propagation", "private")
    async with arena(inside=private) as it, it.puppet(uid=UID) as attacker, it.puppet(it.victim, uid=UID) as victim:
        source = f"/proc/{victim.pid}"
        if lie == "a copy":
            source = str(described(Path(source), it.directory / "described"))
        mount = f"mount --bind {source} /proc/{attacker.pid}"
        enter = ("nsenter", "--target", str(it.agent.pid), "--mount", "/bin/sh", "-e", "-c")
        async with it.asks(inside=(*enter, f'{mount}; exec "$0" "$@"')):
            assert await attacker.do("ask", it.socket) in REFUSED
        await it.serve_victim()


def described(process: Path, copy: Path) -> Path:
    """A directory that says of one process what /proc says of another."""
    (copy / "ns").mkdir(parents=True)
    for name in ("status", "stat", "cgroup"):
        (copy / name).write_bytes((process / name).read_bytes())
    for name in ("exe", "ns/mnt", "ns/pid", "ns/user"):
        (copy / name).symlink_to(os.readlink(process / name))
    return copy


@needs_root
@pytest.mark.bears("A14")
async def test_an_agent_that_may_not_see_other_users_refuses_them() -> None:
    """hidepid=2, and an agent without the capabilities that see through it."""
    script = 'mount -t proc -o hidepid=2 proc /proc; exec setpriv --bounding-set=-all --inh-caps=-all "$0" "$@"'
    inside = ("unshare", "--mount", "--propagation", "private", "/bin/sh", "-e", "-c", script)
    async with (
        arena(inside=inside, ready=False) as it,
        it.puppet(it.victim, uid=UID) as hidden,
        it.puppet(it.bystander) as seen,
    ):
        await seen.do("drop_capabilities")
        assert await hidden.do("ask", it.socket) in REFUSED
        answer = await seen.do("ask", it.socket)
        assert answer == (answer[0], [BYSTANDER])
        assert it.agent.returncode is None
