"""The files of a task's token: whole sets, for their owner alone, and nothing left."""

import os
import subprocess
from pathlib import Path

import pytest

from broker.attestation.launches import start_time_of
from broker.cli.task_files import FILES, TaskFiles, place
from broker.sdk.workload import Identity
from broker.spiffe import Bundle, SpiffeId
from tests.fakes.fake_server import TD, FakeCa


@pytest.fixture
def identity() -> Identity:
    me = SpiffeId.of(TD, "/me")
    return Identity(me, FakeCa().identity(me), "", "x")


@pytest.fixture
def bundle() -> Bundle:
    return FakeCa().bundle


def test_a_set_replaces_a_set(tmp_path: Path, identity: Identity, bundle: Bundle) -> None:
    with TaskFiles(tmp_path) as files:
        paths = {variable: Path(path) for variable, path in files.environment.items()}
        assert set(paths) == set(FILES)
        for number in range(4):
            files.write(f"token-{number}", identity, bundle)
            assert paths["BROKER_TASK_TOKEN_FILE"].read_text() == f"token-{number}"
            assert {path.stat().st_mode & 0o7777 for path in paths.values()} == {0o600}
            assert files.directory.stat().st_mode & 0o7777 == 0o700
            assert len([one for one in files.directory.iterdir() if one.name.isdigit()]) <= 2
        assert "BEGIN PRIVATE KEY" in paths["BROKER_SVID_KEY_FILE"].read_text()
        assert "BEGIN CERTIFICATE" in paths["BROKER_SVID_FILE"].read_text()
        assert "token" not in " ".join(map(str, files.environment.values())).replace("/current/token", "")
    assert list(tmp_path.iterdir()) == []


def test_who_looked_a_moment_ago_still_finds_his_set(tmp_path: Path, identity: Identity, bundle: Bundle) -> None:
    with TaskFiles(tmp_path) as files:
        files.write("old", identity, bundle)
        looked_up = (files.directory / "current").resolve()
        files.write("new", identity, bundle)
        assert (looked_up / "token").read_text() == "old"


def test_only_what_ended_commands_left_is_removed(tmp_path: Path) -> None:
    with subprocess.Popen(["/bin/true"]) as ended:
        pass
    dead = tmp_path / f"broker-task-{ended.pid}-1-abcdefgh"
    mine = tmp_path / f"broker-task-{os.getpid()}-{start_time_of(os.getpid())}-abcdefgh"
    other = tmp_path / "broker-task-notes"
    for directory in (dead, mine, other):
        directory.mkdir()
        (directory / "x").touch()
    target = tmp_path / "target"
    target.mkdir()
    link = tmp_path / f"broker-task-{ended.pid}-2-abcdefgh"
    link.symlink_to(target)
    with TaskFiles(tmp_path):
        assert not dead.exists()
        assert mine.is_dir() and other.is_dir() and link.is_symlink() and target.is_dir()


@pytest.mark.root("gives a directory to another user")
def test_what_others_left_is_theirs(tmp_path: Path) -> None:
    theirs = tmp_path / "broker-task-999999999-1-abcdefgh"
    theirs.mkdir()
    os.chown(theirs, 65534, 65534)
    with TaskFiles(tmp_path):
        assert theirs.is_dir()


def test_the_place(tmp_path: Path) -> None:
    assert place({"XDG_RUNTIME_DIR": str(tmp_path)}) == (tmp_path, True)
    for environ in ({}, {"XDG_RUNTIME_DIR": "relative"}, {"XDG_RUNTIME_DIR": str(tmp_path / "none")}):
        path, in_memory = place(environ)
        assert path.is_dir() and in_memory == (path == Path("/dev/shm"))


def test_what_was_withdrawn_is_gone_and_what_comes_next_is_found(
    tmp_path: Path, identity: Identity, bundle: Bundle
) -> None:
    with TaskFiles(tmp_path) as files:
        token = Path(files.environment["BROKER_TASK_TOKEN_FILE"])
        files.withdraw()  # nothing was written yet
        for number in range(4):
            files.write(f"token-{number}", identity, bundle)
        files.withdraw()
        assert list(files.directory.iterdir()) == []
        files.withdraw()
        files.write("next", identity, bundle)
        assert token.read_text() == "next"
