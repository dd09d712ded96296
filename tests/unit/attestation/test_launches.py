"""A registration as it is written and read; when a process started."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from broker.attestation.launches import (
    FILE_NAME,
    MAX_LAUNCH,
    Exe,
    Launch,
    boot_id,
    file_name,
    pid_namespace,
    start_time_of,
)
from broker.attestation.process import Process
from broker.errors import BrokerError, Invalid

NUMBERS = st.integers(0, 2**64 - 1)


SLOW_MACHINE = settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@SLOW_MACHINE
@given(
    st.builds(
        Launch,
        boot_id=st.uuids().map(str), pid_namespace=NUMBERS.map(lambda n: f"pid:[{n}]"), pid=st.integers(1, 2**31 - 1),
        start_time=NUMBERS, name=st.text("az09_-", min_size=1, max_size=64),
        exe=st.builds(Exe, device=NUMBERS, inode=NUMBERS), uid=st.integers(0, 2**32 - 2), gid=st.integers(0, 2**32 - 2),
        sha256=st.binary(min_size=32, max_size=32).map(bytes.hex), size=NUMBERS,
    )
)  # fmt: skip
def test_what_is_written_is_read(launch: Launch) -> None:
    text = launch.serialise()
    assert len(text) < MAX_LAUNCH
    assert Launch.parse(text) == launch
    match = FILE_NAME.fullmatch(launch.file_name)
    assert match is not None and tuple(map(int, match.groups())) == (launch.pid, launch.start_time)


@SLOW_MACHINE
@given(st.binary(max_size=200))
def test_nothing_else_is_read(text: bytes) -> None:
    with pytest.raises(Invalid):
        Launch.parse(text)


def test_start_times_are_those_of_attested_processes() -> None:
    process = Process.of_pid(os.getpid())
    try:
        assert start_time_of(os.getpid()) == process.facts.start_time
        assert file_name(process.pid, process.facts.start_time) == f"{os.getpid()}-{process.facts.start_time}.json"
    finally:
        process.close()
    assert start_time_of(2**30) is None


def test_a_name_does_not_move_the_numbers() -> None:
    code = "open('/proc/self/comm', 'w').write(') S 1 1 1'); print(open('/proc/self/stat').read().rsplit(')', 1)[1].split()[19], flush=True); input()"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout is not None
        assert start_time_of(child.pid) == int(child.stdout.readline())
        child.kill()


def test_the_kernels_names() -> None:
    assert len(boot_id()) == 36
    assert pid_namespace() == str(Path("/proc/self/ns/pid").readlink())


def test_an_oversized_text() -> None:
    with pytest.raises(BrokerError):
        Launch.parse(b"{}" + b" " * MAX_LAUNCH)
