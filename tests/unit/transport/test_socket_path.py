"""Claiming a socket's path."""

import os
import socket
import stat
from pathlib import Path

import pytest

from broker.errors import Misconfigured
from broker.transport.socket_path import ClaimedSocket, claim_socket


def claim(path: Path, mode: int = 0o600) -> ClaimedSocket:
    return claim_socket(path, mode=mode, directory_mode=0o755)


def refused(path: Path) -> str:
    with pytest.raises(Misconfigured) as caught:
        claim(path)
    return caught.value.reason


def test_makes_directories_and_sets_modes_whatever_the_umask(short: Path) -> None:
    before = os.umask(0o077)
    try:
        claimed = claim(short / "a" / "b" / "s", mode=0o777)
    finally:
        os.umask(before)
    assert stat.S_IMODE((short / "a").stat().st_mode) == 0o755
    assert stat.S_IMODE((short / "a/b").stat().st_mode) == 0o755
    assert stat.S_IMODE((short / "a/b/s").stat().st_mode) == 0o777
    claimed.release()
    assert not (short / "a/b/s").exists()


def test_replaces_the_socket_of_a_dead_server(short: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(short / "s"))
    claim(short / "s").release()


def test_refuses_a_second_server(short: Path) -> None:
    first = claim(short / "s")
    assert refused(short / "s") == "socket_in_use"
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(short / "s"))  # the first one is unharmed
    first.release()
    claim(short / "s").release()


def test_refuses_a_path_that_another_program_serves(short: Path) -> None:
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(short / "s"))
        other.listen()
        assert refused(short / "s") == "socket_in_use"
        assert (short / "s").exists()


@pytest.mark.parametrize("kind", ["file", "directory", "link"])
def test_never_removes_what_is_not_a_socket(short: Path, kind: str) -> None:
    path = short / "s"
    if kind == "file":
        path.write_text("precious")
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to("/dev/null")
    assert refused(path) == "socket_path_unsafe"
    assert os.path.lexists(path)


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o1777])
def test_refuses_a_directory_that_others_can_change(short: Path, mode: int) -> None:
    shared = short / "shared"
    shared.mkdir()
    shared.chmod(mode)
    assert refused(shared / "s") == "socket_path_unsafe"


def test_refuses_a_parent_that_others_can_rename(short: Path) -> None:
    shared = short / "shared"
    (shared / "mine").mkdir(parents=True)
    shared.chmod(0o777)
    assert refused(shared / "mine" / "s") == "socket_path_unsafe"
    shared.chmod(0o1777)  # sticky: nobody else can rename what is ours there
    claim(shared / "mine" / "s").release()


@pytest.mark.root("give a directory away")
def test_refuses_a_directory_of_somebody_else(short: Path) -> None:
    theirs = short / "theirs"
    theirs.mkdir()
    os.chown(theirs, 1234, 1234)
    assert refused(theirs / "s") == "socket_path_unsafe"


def test_refuses_a_path_too_long_for_a_socket(short: Path) -> None:
    assert refused(short / ("x" * 100)) == "socket_path_unsafe"


def test_release_leaves_a_socket_that_took_its_place(short: Path) -> None:
    claimed = claim(short / "s")
    (short / "s").unlink()
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(short / "s"))
        claimed.release()
        assert (short / "s").exists()
