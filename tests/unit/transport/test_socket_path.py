"""Claiming a socket's path."""

import os
import socket
import stat
from pathlib import Path

import pytest

from broker.errors import Misconfigured
from broker.transport.socket_path import ClaimedSocket, claim_socket

pytestmark = pytest.mark.bears("A19", "A20")  # one way to claim a place, for every socket


def claim(path: Path, mode: int = 0o600) -> ClaimedSocket:
    return claim_socket(path, mode=mode, directory_mode=0o755)


def refused(path: Path) -> str:
    with pytest.raises(Misconfigured) as caught:
        claim(path)
    return caught.value.reason


@pytest.mark.parametrize("umask", [0, 0o077])
def test_makes_directories_and_sets_modes_whatever_the_umask(short: Path, umask: int) -> None:
    before = os.umask(umask)
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


@pytest.mark.parametrize("kind", ["file", "directory", "link", "dangling link"])
def test_never_removes_what_is_not_a_socket(short: Path, kind: str) -> None:
    path = short / "s"
    if kind == "file":
        path.write_text("precious")
    elif kind == "directory":
        path.mkdir()
    else:
        path.symlink_to("/dev/null" if kind == "link" else short / "nothing")
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


def again(claimed: ClaimedSocket) -> ClaimedSocket:
    return claimed.claimed_again(mode=0o666, directory_mode=0o755)


def test_a_place_that_was_removed_is_taken_again_under_the_same_lock(short: Path) -> None:
    claimed = claim(short / "s")
    assert claimed.is_in_place()
    (short / "s").unlink()
    assert not claimed.is_in_place()
    second = again(claimed)
    claimed.listening.close()
    assert second.is_in_place()
    assert stat.S_IMODE((short / "s").stat().st_mode) == 0o666
    assert second.lock == claimed.lock
    assert refused(short / "s") == "socket_in_use"
    second.release()
    assert not (short / "s").exists()


def test_a_place_that_went_with_its_directory_is_taken_again_with_a_lock(short: Path) -> None:
    claimed = claim(short / "d" / "s")
    for one in (short / "d").iterdir():
        one.unlink()
    (short / "d").rmdir()
    second = again(claimed)
    claimed.listening.close()
    assert refused(short / "d" / "s") == "socket_in_use"
    second.release()
    claim(short / "d" / "s").release()


@pytest.mark.parametrize("who", ["served", "file", "unsafe"])
def test_a_place_that_is_somebody_elses_is_not_taken_from_him(short: Path, who: str) -> None:
    claimed = claim(short / "d" / "s")
    (short / "d" / "s").unlink()
    with socket.socket(socket.AF_UNIX) as other:
        if who == "file":
            (short / "d" / "s").write_text("precious")
        else:
            other.bind(str(short / "d" / "s"))
            other.listen()
        if who == "unsafe":
            (short / "d").chmod(0o777)
        before = len(os.listdir("/proc/self/fd"))
        with pytest.raises(Misconfigured):
            again(claimed)
        assert len(os.listdir("/proc/self/fd")) == before
        assert os.path.lexists(short / "d" / "s")
        claimed.release()
        assert os.path.lexists(short / "d" / "s")
