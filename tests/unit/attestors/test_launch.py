"""The launch attestor with real launched processes: who has the name, who has not, and whose word counts."""

import hashlib
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from pydantic import ValidationError

from attestors.workload.launch import LaunchAttestor, LaunchSettings
from broker.attestation.catalogue import Catalogue
from broker.attestation.contract import AttestorFailed
from broker.attestation.launches import MAX_LAUNCH, Exe, Launch, boot_id, pid_namespace
from broker.attestation.process import Process
from broker.attestation.testing import WorkloadAttestorContract, check_workload_attestor, started_process
from tests.fakes.launching import Launched, held, launched, private, script

FORK = """
import os, subprocess, sys
print(os.getpid(), flush=True)
child = subprocess.Popen(["/bin/sh", "-c", "echo $$; read -r nothing"], stdin=subprocess.PIPE)
sys.stdin.readline()
child.kill()
"""
SAME_INTERPRETER = """
import os, sys
print(os.getpid(), flush=True)
sys.stdin.readline()
os.execv(sys.executable, [sys.executable, "-I", "-c", "import sys; print('other', flush=True); sys.stdin.readline()"])
"""


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return private(tmp_path)


def attestor(directory: Path) -> LaunchAttestor:
    return LaunchAttestor(LaunchSettings(directory=directory))


async def says(directory: Path, process: Process) -> set[str]:
    return set(map(str, await check_workload_attestor(attestor(directory), process)))


@contextmanager
def started(directory: Path, text: str, name: str = "one") -> Iterator[Launched]:
    path = script(directory.parent.parent, text)
    with launched("--as", name, "--directory", str(directory), "--", sys.executable, path) as found:
        yield found


class TestContract(WorkloadAttestorContract):
    @pytest.fixture(autouse=True)
    def _directory(self, tmp_path: Path) -> None:
        self.directory = private(tmp_path)

    def make_attestor(self) -> LaunchAttestor:
        return attestor(self.directory)


async def test_a_launched_script_has_its_name_and_its_digest(directory: Path) -> None:
    text = "import sys, os; print(os.getpid(), flush=True); sys.stdin.readline()"
    with started(directory, text) as found, found.process() as process:
        digest = hashlib.sha256(f"{text}\n".encode()).hexdigest()
        assert await says(directory, process) == {"launch:name:one", f"launch:code:{digest}"}
        # Not the interpreter: its own executable is like no other's.
        with started_process([sys.executable, "-c", "print(flush=True); input()"]) as other:
            assert other.facts.exe != process.facts.exe


async def test_two_scripts_of_one_user_and_interpreter_differ(directory: Path) -> None:
    with (
        started(directory, FORK) as one,
        started(directory, SAME_INTERPRETER, "two") as two,
        one.process() as first,
        two.process() as second,
    ):
        assert first.facts.exe != second.facts.exe
        mine, other = await says(directory, first), await says(directory, second)
    assert "launch:name:one" in mine and "launch:name:two" in other
    assert mine & other == set()


async def test_a_process_started_by_hand_has_none(directory: Path) -> None:
    with started(directory, FORK), started_process() as process:
        assert await says(directory, process) == set()


async def test_a_child_has_none(directory: Path) -> None:
    with started(directory, FORK) as found:
        child = int(found.line())
        with held(child) as process:
            assert await says(directory, process) == set()


async def test_what_it_becomes_has_none(directory: Path) -> None:
    """Under the same number and start time, and even by the same interpreter."""
    with started(directory, SAME_INTERPRETER) as found, found.process() as before:
        assert "launch:name:one" in await says(directory, before)
        found.say()
        assert found.line() == "other"
        with found.process() as process:
            assert process.facts.start_time == before.facts.start_time
            assert await says(directory, process) == set()


async def test_a_program_that_is_no_script_is_known_by_its_file(directory: Path) -> None:
    given = ("--as", "tool", "--directory", str(directory), "--", "/bin/cat")
    with launched(*given, registered=directory) as found, found.process() as process:
        digest = hashlib.sha256(Path("/bin/cat").resolve().read_bytes()).hexdigest()
        assert await says(directory, process) == {"launch:name:tool", f"launch:code:{digest}"}


@contextmanager
def registered(directory: Path, **changed: object) -> Iterator[tuple[Process, Path]]:
    """A process by hand, and a registration that would be its own but for what is changed."""
    directory.mkdir(mode=0o700)
    with started_process() as process:
        launch = Launch(
            boot_id=boot_id(), pid_namespace=pid_namespace(), pid=process.pid, start_time=process.facts.start_time, name="one",
            exe=Exe(device=process.facts.exe.device, inode=process.facts.exe.inode), uid=process.uid, gid=process.gid,
            sha256="a" * 64, size=1,
        )  # fmt: skip
        path = directory / launch.file_name
        path.write_text(json.dumps({**launch.model_dump(), **changed}))
        path.chmod(0o600)
        yield process, path


async def test_a_whole_registration_counts(directory: Path) -> None:
    with registered(directory) as (process, _):
        assert await says(directory, process) == {"launch:name:one", f"launch:code:{'a' * 64}"}


@pytest.mark.parametrize(
    "changed",
    [
        {"boot_id": "00000000-0000-4000-8000-000000000000"},
        {"uid": os.geteuid() + 1},
        {"gid": os.getegid() + 1},
        {"exe": {"device": 1, "inode": 1}},
    ],
)
async def test_a_registration_of_something_else_is_none(directory: Path, changed: dict) -> None:
    with registered(directory, **changed) as (process, _):
        assert await says(directory, process) == set()


@pytest.mark.parametrize(
    "changed",
    [
        {"version": 2},
        {"version": True},
        {"name": "One"},
        {"name": ""},
        {"name": "a\n"},
        {"name": "a" * 65},
        {"sha256": "A" * 64},
        {"uid": -1},
        {"uid": "0"},
        {"pid": 1},
        {"start_time": 1},
        {"size": 1.5},
        {"exe": {"device": 1}},
        {"exe": {"device": 1, "inode": 1, "more": 1}},
        {"more": 1},
        {"boot_id": "x"},
    ],
)
async def test_a_malformed_registration_refuses(directory: Path, changed: dict) -> None:
    with registered(directory, **changed) as (process, _):
        assert await refusal(directory, process) == "launch_malformed"


@pytest.mark.parametrize(
    "text", ["", "{}", "null", "[]", '{"version":1,"version":1}', "nonsense", " " * (MAX_LAUNCH + 1)]
)
async def test_a_registration_that_is_none_refuses(directory: Path, text: str) -> None:
    with registered(directory) as (process, path):
        path.write_text(text)
        assert await refusal(directory, process) in {
            "launch_malformed", "invalid_json", "json_duplicate_name", "json_too_large",
        }  # fmt: skip


async def test_another_pid_namespace_refuses(directory: Path) -> None:
    with registered(directory, pid_namespace="pid:[1]") as (process, _):
        assert await refusal(directory, process) == "launch_namespace"


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o602, 0o610])
async def test_a_registration_open_to_others_refuses(directory: Path, mode: int) -> None:
    with registered(directory) as (process, path):
        path.chmod(mode)
        assert await refusal(directory, process) == "launches_unsafe"


@pytest.mark.parametrize("mode", [0o750, 0o705, 0o770, 0o777, 0o1777])
async def test_a_directory_open_to_others_refuses_everybody(directory: Path, mode: int) -> None:
    with registered(directory) as (process, path):
        path.unlink()
        directory.chmod(mode)
        assert await refusal(directory, process) == "launches_unsafe"


async def test_no_link_and_no_pipe_stands_for_a_registration(directory: Path) -> None:
    with registered(directory) as (process, path):
        elsewhere = directory / "elsewhere"
        path.rename(elsewhere)
        path.symlink_to(elsewhere)
        assert await refusal(directory, process) == "launches_unsafe"
        path.unlink()
        os.mkfifo(path, 0o600)
        assert await refusal(directory, process) == "launches_unsafe"


async def test_no_link_stands_for_the_directory(directory: Path) -> None:
    with registered(directory) as (process, _):
        other = directory.parent / "other"
        other.symlink_to(directory)
        assert await refusal(other, process) == "launches_unsafe"


@pytest.mark.root("gives a file to another user")
async def test_another_users_file_refuses(directory: Path) -> None:
    with registered(directory) as (process, path):
        os.chown(path, 65534, 65534)
        assert await refusal(directory, process) == "launches_unsafe"
        os.chown(path, 0, 0)
        os.chown(directory, 65534, 65534)
        assert await refusal(directory, process) == "launches_unsafe"


async def refusal(directory: Path, process: Process) -> str:
    with pytest.raises(AttestorFailed) as refused:
        await attestor(directory).attest(process)
    return refused.value.reason


def test_settings() -> None:
    assert str(LaunchSettings().directory) == "/run/broker/agent/private/launches"
    for table in ({"directory": "launches"}, {"path": "/x"}):
        with pytest.raises(ValidationError):
            LaunchSettings.model_validate(table)


def test_is_found_by_its_entry_point(directory: Path) -> None:
    ready, broken = Catalogue().workload({"launch": {"directory": str(directory)}})
    assert isinstance(ready[0], LaunchAttestor) and not broken
