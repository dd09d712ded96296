"""What the unix attestor says of real processes, and what it refuses to say."""

import asyncio
import grp
import hashlib
import os
import pwd
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from attestors.workload import unix as module
from attestors.workload.unix import UnixAttestor, UnixSettings
from broker.attestation.contract import AttestorFailed
from broker.attestation.process import Process

SLEEP = Path(shutil.which("sleep")).resolve()
needs_root = pytest.mark.root("other users' processes, mounts")


class Running:
    """A process and its description, as long as the block."""

    def __init__(self, *command: str, **options) -> None:
        self.child = subprocess.Popen(command, stdout=subprocess.PIPE, **options)
        self.child.stdout.readline()
        uid = options.get("user") or os.geteuid()
        gid = options.get("group") or os.getegid()
        pidfd = os.pidfd_open(self.child.pid)
        self.process = Process.open(pid=self.child.pid, uid=uid, gid=gid, pidfd=pidfd)
        os.close(pidfd)

    def __enter__(self) -> Process:
        return self.process

    def __exit__(self, *_) -> None:
        self.process.close()
        self.child.kill()
        self.child.communicate()


def sleeping(binary: Path | str = SLEEP, **options) -> Running:
    return (
        Running("/bin/sh", "-c", 'echo x; exec "$0" 60', str(binary), **options)
        if binary is SLEEP
        else Running("/bin/sh", "-c", "echo x; exec sleep 60", **options)
    )


async def selectors(process: Process, **settings) -> set[str]:
    return {str(one) for one in await UnixAttestor(UnixSettings(**settings)).attest(process)}


@pytest.fixture
def me():
    pidfd = os.pidfd_open(os.getpid())
    process = Process.open(pid=os.getpid(), uid=os.geteuid(), gid=os.getegid(), pidfd=pidfd)
    os.close(pidfd)
    yield process
    process.close()


async def test_user_and_groups(me) -> None:
    found = await selectors(me)
    assert {
        f"unix:uid:{os.geteuid()}",
        f"unix:gid:{os.getegid()}",
        f"unix:user:{pwd.getpwuid(os.geteuid()).pw_name}",
        f"unix:group:{grp.getgrgid(os.getegid()).gr_name}",
    } <= found
    assert {f"unix:supplementary_gid:{gid}" for gid in os.getgroups()} <= found
    assert not any(one.startswith(("unix:path", "unix:sha256")) for one in found)


@needs_root
async def test_a_number_without_a_name_has_no_name_selector() -> None:
    with sleeping(user=45678, group=45679, extra_groups=[45680]) as process:
        assert await selectors(process) == {"unix:uid:45678", "unix:gid:45679", "unix:supplementary_gid:45680"}


async def test_path_and_digest_of_the_running_image(me) -> None:
    exe = os.readlink("/proc/self/exe")
    found = await selectors(me, discover_workload_path=True)
    assert f"unix:path:{exe}" in found
    assert f"unix:sha256:{hashlib.sha256(Path(exe).read_bytes()).hexdigest()}" in found


async def test_without_hashing_where_the_limit_says_so(me) -> None:
    found = await selectors(me, discover_workload_path=True, workload_size_limit=-1)
    assert any(one.startswith("unix:path:") for one in found)
    assert not any(one.startswith("unix:sha256:") for one in found)


@pytest.mark.bears("A12")
async def test_groups_without_a_number_in_the_agents_user_namespace_are_nobodys(me, monkeypatch) -> None:
    unmapped = replace(me, gid=65534, facts=replace(me.facts, groups=frozenset({65534, 4242})))
    assert {"unix:gid:65534", "unix:supplementary_gid:65534"} <= await selectors(unmapped)
    monkeypatch.setattr(module, "is_in_user_namespace", lambda: True)
    found = {one for one in await selectors(unmapped) if not one.startswith(("unix:uid:", "unix:user:"))}
    assert found == {"unix:supplementary_gid:4242"}


@pytest.mark.bears("A07")
async def test_an_executable_above_the_limit_refuses_its_caller(me) -> None:
    with pytest.raises(AttestorFailed) as refused:
        await selectors(me, discover_workload_path=True, workload_size_limit=100)
    assert refused.value.reason == "executable_too_large"


@pytest.mark.bears("A07")
async def test_a_digest_is_remembered_until_the_file_changes(me, monkeypatch) -> None:
    hashed = []
    real = module._hash
    monkeypatch.setattr(module, "_hash", lambda fd, size, stop: hashed.append(1) or real(fd, size, stop))
    attestor = UnixAttestor(UnixSettings(discover_workload_path=True))
    first, second = await attestor.attest(me), await attestor.attest(me)
    assert first == second
    assert len(hashed) == 1


@pytest.mark.bears("A07")
async def test_what_a_process_became_is_not_hashed_for_what_it_was() -> None:
    script = "echo x; read y; exec sleep 60"
    with (running := Running("/bin/sh", "-c", script, stdin=subprocess.PIPE)) as process:
        running.child.stdin.write(b"\n")
        running.child.stdin.flush()
        while process.snapshot().exe == process.facts.exe:
            await asyncio.sleep(0.01)
        with pytest.raises(AttestorFailed, match="changed while it was looked at"):
            await selectors(process, discover_workload_path=True)


@pytest.mark.bears("A07")
async def test_a_file_that_changes_while_it_is_hashed_has_no_digest(tmp_path, monkeypatch) -> None:
    path, real = copied(tmp_path, "victim"), module._hash

    def hashed(fd: int, size: int, stop) -> str:
        digest = real(fd, size, stop)
        if changes:
            path.chmod(changes.pop())
        return digest

    with (running := run_copy(path)):
        process, changes = await settled(path, running), [0o700]
        monkeypatch.setattr(module, "_hash", hashed)
        attestor = UnixAttestor(UnixSettings(discover_workload_path=True))
        with pytest.raises(AttestorFailed, match="while it was hashed"):
            await attestor.attest(process)
        found = {str(one) for one in await attestor.attest(process)}
        assert f"unix:sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}" in found


@pytest.mark.bears("A07")
async def test_a_description_that_takes_too_long_refuses_its_caller(me, monkeypatch) -> None:
    monkeypatch.setattr(module, "ATTEST_TIMEOUT", 0.05)
    monkeypatch.setattr(module, "_account", lambda uid, gids: asyncio.run(asyncio.sleep(0.3)))
    with pytest.raises(AttestorFailed) as refused:
        await selectors(me)
    assert refused.value.reason == "attestor_timeout"


def copied(directory: Path, name: str) -> Path:
    path = directory / name
    shutil.copy(SLEEP, path)
    return path


def run_copy(path: Path) -> Running:
    return Running("/bin/sh", "-c", 'echo x; exec "$0" 60', str(path))


async def settled(process_path: Path, running: Running) -> Process:
    """The shell has become the program."""
    facts = process_path.stat()
    while running.process.snapshot().exe != (facts.st_dev, facts.st_ino):
        await asyncio.sleep(0.01)
    pidfd = os.pidfd_open(running.child.pid)
    running.process.close()
    running.process = Process.open(pid=running.child.pid, uid=os.geteuid(), gid=os.getegid(), pidfd=pidfd)
    os.close(pidfd)
    return running.process


@pytest.mark.skipif("busybox" in str(SLEEP), reason="sleep is part of a larger program here")
@pytest.mark.bears("A06")
async def test_a_path_counts_only_while_the_file_there_is_what_runs(tmp_path) -> None:
    path = copied(tmp_path, "victim")
    with (running := run_copy(path)):
        process = await settled(path, running)
        assert f"unix:path:{path}" in await selectors(process, discover_workload_path=True)
        # Replaced while it runs: the name now belongs to another file.
        path.rename(tmp_path / "old")
        copied(tmp_path, "victim")
        found = await selectors(process, discover_workload_path=True)
        assert f"unix:path:{path}" not in found
        (tmp_path / "old").unlink()
        assert not any(one.startswith("unix:path:") for one in await selectors(process, discover_workload_path=True))


@pytest.mark.bears("A06")
async def test_an_executable_in_memory_has_no_path() -> None:
    code = (
        "import os,sys; data=open(sys.argv[1],'rb').read(); fd=os.memfd_create('legit',0); os.write(fd,data);"
        "print('x',flush=True); os.execve(fd,['/usr/bin/sleep','60'],{})"
    )
    running = Running(sys.executable, "-I", "-S", "-c", code, str(SLEEP))
    with running:
        while not os.readlink(f"/proc/{running.child.pid}/exe").startswith("/memfd:"):
            await asyncio.sleep(0.01)
        running.process.close()
        pidfd = os.pidfd_open(running.child.pid)
        running.process = Process.open(pid=running.child.pid, uid=os.geteuid(), gid=os.getegid(), pidfd=pidfd)
        os.close(pidfd)
        found = await selectors(running.process, discover_workload_path=True)
        assert not any(one.startswith("unix:path:") for one in found)


@pytest.mark.bears("A06")
async def test_a_path_forged_by_a_mount_namespace_is_not_given(tmp_path) -> None:
    evil = copied(tmp_path, "evil")
    victim = copied(tmp_path, "victim")
    script = f"mount --bind {evil} {victim} && echo x && exec {victim} 60"
    probe = subprocess.run(["unshare", "-Urm", "true"], capture_output=True, check=False)
    if probe.returncode != 0:
        pytest.skip("user and mount namespaces are not allowed here")
    child = subprocess.Popen(
        ["unshare", "-Urm", "/bin/sh", "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        if not child.stdout.readline():
            pytest.skip("bind mounts are not allowed here")
        wanted = evil.stat()
        while True:
            pidfd = os.pidfd_open(child.pid)
            process = Process.open(pid=child.pid, uid=os.geteuid(), gid=os.getegid(), pidfd=pidfd)
            os.close(pidfd)
            if process.facts.exe == (wanted.st_dev, wanted.st_ino):
                break
            process.close()
            await asyncio.sleep(0.01)
        assert os.readlink(f"/proc/{child.pid}/exe") == str(victim)  # the forgery
        found = await selectors(process, discover_workload_path=True)
        assert f"unix:path:{victim}" not in found
        process.close()
    finally:
        child.kill()
        child.communicate()


@pytest.mark.bears("A06")
async def test_a_script_is_its_interpreter(tmp_path) -> None:
    script = tmp_path / "script.sh"
    script.write_text("#!/bin/sh\necho x\nread y\n")
    script.chmod(0o755)
    with Running(str(script), stdin=subprocess.PIPE) as process:
        found = await selectors(process, discover_workload_path=True)
        assert f"unix:path:{script}" not in found
        assert f"unix:path:{Path('/bin/sh').resolve()}" in found
