"""A process as the kernel describes it: who it is, that it is still the same, and when it is not."""

import asyncio
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.attestation import process as module
from broker.attestation.kernel import FileId, file_id, filesystem_type, has_exited
from broker.attestation.process import Process, require_procfs, status_lines
from broker.errors import NotAttested

needs_root = pytest.mark.root("other users' processes")


def opened(pid: int, *, uid: int | None = None, gid: int | None = None) -> Process:
    pidfd = os.pidfd_open(pid)
    try:
        return Process.open(
            pid=pid, uid=os.geteuid() if uid is None else uid, gid=os.getegid() if gid is None else gid, pidfd=pidfd
        )
    finally:
        os.close(pidfd)


@pytest.fixture
def sleeper():
    process = subprocess.Popen(["/bin/sleep", "60"])
    yield process
    process.kill()
    process.wait()


def test_describes_the_program_that_runs(sleeper) -> None:
    process = opened(sleeper.pid)
    facts = os.stat(shutil.which("sleep"))
    assert process.facts.exe == (facts.st_dev, facts.st_ino)
    assert process.facts.uids == (os.geteuid(),) * 4
    assert process.facts.groups == frozenset(os.getgroups())
    assert process.facts.start_time > 0
    process.still_same()
    process.still_there()
    assert not process.is_gone()
    process.close()


STATUS = (
    b"Name:\tPid:\\nUid:\t0\t0\nUmask:\t0022\nState:\tS (sleeping)\nTgid:\t7\nNgid:\t0\nPid:\t7\nPPid:\t1\n"
    b"Uid:\t0\t1\t2\t3\nGid:\t4\t5\t6\t7\nFDSize:\t64\nGroups:\t1 22 333 \nNStgid:\t7\n"
)
LINE = re.compile(rb"^(Pid|Uid|Gid|Groups):\t([0-9\t ]*)$", re.MULTILINE)


def test_finds_the_lines_that_facts_are_read_from() -> None:
    expected = ((b"Pid", b"7"), (b"Uid", b"0\t1\t2\t3"), (b"Gid", b"4\t5\t6\t7"), (b"Groups", b"1 22 333 "))
    assert status_lines(STATUS) == expected
    assert status_lines(STATUS.removesuffix(b"\nNStgid:\t7\n")) == expected
    assert status_lines(b"") == ()


@given(
    st.lists(st.sampled_from([b"Pid", b"Uid", b"Groups", b":", b"\t", b" ", b"\n", b"7", b"x", b"\\n"]), max_size=40)
)
def test_finds_what_an_expression_over_all_lines_would(parts: list[bytes]) -> None:
    # But for the first line, which is the name's.
    status = b"Name:\t" + b"".join(parts)
    assert sorted(status_lines(status)) == sorted(LINE.findall(status))


@pytest.mark.parametrize("size", [0, 1, module._ONE_READ - 1, module._ONE_READ, module._ONE_READ + 1, 200_000])
def test_reads_a_file_whole_however_long(tmp_path: Path, size: int) -> None:
    (tmp_path / "status").write_bytes(bytes(number % 251 for number in range(size)))
    directory = os.open(tmp_path, os.O_RDONLY)
    try:
        assert module._read_single(directory, "status", 1) == module._read_file(directory, "status", 1)
        with pytest.raises(NotAttested):
            module._read_single(directory, "gone", 1)
    finally:
        os.close(directory)


def test_what_is_too_long_to_be_read_whole_is_not_read_in_part(tmp_path: Path) -> None:
    (tmp_path / "status").write_bytes(bytes(module.MAX_PROC_FILE))
    directory = os.open(tmp_path, os.O_RDONLY)
    try:
        with pytest.raises(NotAttested, match="too long"):
            module._read_single(directory, "status", 1)
    finally:
        os.close(directory)


def test_a_dead_process_is_refused(sleeper) -> None:
    process = opened(sleeper.pid)
    sleeper.kill()
    sleeper.wait()
    assert process.is_gone()
    for check in (process.still_same, process.still_there, process.snapshot):
        with pytest.raises(NotAttested):
            check()
    process.close()


def test_a_readable_pidfd_refuses_whatever_proc_says(sleeper) -> None:
    process = opened(sleeper.pid)
    with subprocess.Popen(["/bin/true"]) as other:
        pidfd = os.pidfd_open(other.pid)
    gone = replace(process, pidfd=pidfd)
    for check in (gone.still_same, gone.still_there):
        with pytest.raises(NotAttested) as refused:
            check()
        assert refused.value.reason == "process_gone"
    os.close(pidfd)
    process.close()


@pytest.mark.bears("A08")
def test_a_zombie_is_refused(sleeper) -> None:
    pidfd = os.pidfd_open(sleeper.pid)
    os.kill(sleeper.pid, signal.SIGKILL)
    os.waitid(os.P_PID, sleeper.pid, os.WEXITED | os.WNOWAIT)
    assert Path(f"/proc/{sleeper.pid}/stat").exists()
    with pytest.raises(NotAttested):
        Process.open(pid=sleeper.pid, uid=os.geteuid(), gid=os.getegid(), pidfd=pidfd)
    os.close(pidfd)


@pytest.mark.bears("A05")
async def test_an_exec_is_seen_by_both_checks(tmp_path) -> None:
    child = await asyncio.create_subprocess_exec("/bin/sh", "-c", "read x; exec sleep 60", stdin=subprocess.PIPE)
    process = opened(child.pid)
    process.still_there()
    child.stdin.write(b"\n")
    await child.stdin.drain()
    sleep = os.stat(shutil.which("sleep"))
    while process.snapshot().exe != (sleep.st_dev, sleep.st_ino):
        await asyncio.sleep(0.01)
    for check in (process.still_same, process.still_there):
        with pytest.raises(NotAttested) as refused:
            check()
        assert refused.value.reason == "process_changed"
    process.close()
    child.kill()
    await child.wait()
    child._transport.close()


def test_another_pid_than_the_handles_is_refused(sleeper) -> None:
    pidfd = os.pidfd_open(sleeper.pid)
    with pytest.raises(NotAttested):
        Process.open(pid=os.getpid(), uid=os.geteuid(), gid=os.getegid(), pidfd=pidfd)
    os.close(pidfd)


@pytest.mark.bears("A14")
def test_another_processs_directory_under_this_number_is_refused(sleeper, monkeypatch) -> None:
    """As where another directory of /proc is mounted over the caller's."""
    real = module._open_directory
    monkeypatch.setattr(module, "_open_directory", lambda pid: real(sleeper.pid))
    with pytest.raises(NotAttested, match="another process"):
        opened(os.getpid())


@pytest.mark.bears("A11")
def test_credentials_of_connect_that_are_no_longer_true_are_refused(sleeper) -> None:
    with pytest.raises(NotAttested) as refused:
        opened(sleeper.pid, uid=os.geteuid() + 1)
    assert refused.value.reason == "process_changed"
    with pytest.raises(NotAttested):
        opened(sleeper.pid, gid=os.getegid() + 1)


@pytest.mark.bears("A13")
def test_a_caller_outside_the_pid_namespace_is_refused(sleeper) -> None:
    pidfd = os.pidfd_open(sleeper.pid)
    with pytest.raises(NotAttested, match="pid namespace"):
        Process.open(pid=0, uid=0, gid=0, pidfd=pidfd)
    os.close(pidfd)


@pytest.mark.bears("A12")
def test_an_unmapped_user_is_nobody_in_particular(sleeper, monkeypatch) -> None:
    monkeypatch.setattr(module, "is_in_user_namespace", lambda: True)
    assert module.OVERFLOW_ID == 65534
    # Whoever runs the tests may be nobody: another number stands for it.
    nobody = os.geteuid() + 1
    monkeypatch.setattr(module, "OVERFLOW_ID", nobody)
    with pytest.raises(NotAttested, match="user namespace"):
        opened(sleeper.pid, uid=nobody)
    opened(sleeper.pid).close()


@pytest.mark.bears("A12")
@needs_root
@pytest.mark.skipif(module.is_in_user_namespace(), reason="a user namespace, where not every user has a number")
def test_where_every_user_has_a_number_nobody_is_one_of_them() -> None:
    with subprocess.Popen(["/bin/sleep", "60"], user=65534) as nobody:
        try:
            opened(nobody.pid, uid=65534).close()
        finally:
            nobody.kill()


CHANGES_ITS_RIGHTS = """
import os, sys
sys.stdin.readline()
getattr(os, sys.argv[1])(4001)
print("changed", flush=True)
sys.stdin.readline()
"""


@pytest.mark.bears("A11")
@needs_root
@pytest.mark.parametrize("change", ["setuid", "setgid"])
def test_other_rights_after_connect_are_seen(change: str) -> None:
    child = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", CHANGES_ITS_RIGHTS, change], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    with child:
        process = opened(child.pid)
        child.stdin.write(b"\n")
        child.stdin.flush()
        child.stdout.readline()
        for check in (process.still_same, process.still_there):
            with pytest.raises(NotAttested):
                check()
        process.close()
        child.kill()


@pytest.mark.bears("A11")
@needs_root
def test_a_process_that_hides_its_memory_is_described_all_the_same() -> None:
    code = "import ctypes,os,time; os.setgid(4001); os.setuid(4001); ctypes.CDLL(None).prctl(4,0); print('x',flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-I", "-S", "-c", code], stdout=subprocess.PIPE) as child:
        child.stdout.readline()
        process = opened(child.pid, uid=4001, gid=4001)
        process.still_same()
        process.still_there()
        process.close()
        child.kill()


def test_a_name_full_of_parentheses_does_not_move_the_start_time() -> None:
    code = "import ctypes,sys,time; ctypes.CDLL(None).prctl(15, b') S 1 (\\n'); print('x', flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-I", "-S", "-c", code], stdout=subprocess.PIPE) as child:
        child.stdout.readline()
        named, plain = opened(child.pid), opened(os.getpid())
        assert named.facts.start_time >= plain.facts.start_time
        named.still_same()
        named.close()
        plain.close()
        child.kill()


@pytest.mark.bears("A21", "A22")
def test_descriptors_are_closed_and_never_inherited(sleeper) -> None:
    before = set(os.listdir("/proc/self/fd"))
    process = opened(sleeper.pid)
    assert not os.get_inheritable(process.pidfd)
    assert not os.get_inheritable(process._dir)
    with pytest.raises(NotAttested):
        opened(sleeper.pid, uid=os.geteuid() + 1)
    process.close()
    assert set(os.listdir("/proc/self/fd")) == before


@pytest.mark.bears("A14")
def test_a_directory_that_is_not_procfs_is_refused(tmp_path, monkeypatch, sleeper) -> None:
    require_procfs()
    monkeypatch.setattr(module, "filesystem_type", lambda fd: 0x01021994)
    with pytest.raises(NotAttested, match="procfs"):
        opened(sleeper.pid)
    with pytest.raises(Exception, match="procfs"):
        require_procfs()


def test_statx_agrees_with_stat(tmp_path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x")
    facts = path.stat()
    directory = os.open(tmp_path, os.O_RDONLY)
    assert file_id(directory, "file") == FileId(facts.st_dev, facts.st_ino)
    with pytest.raises(FileNotFoundError):
        file_id(directory, "other")
    assert filesystem_type(directory) != module.PROC_SUPER_MAGIC
    os.close(directory)
    assert has_exited(directory)  # a bad descriptor counts as gone
