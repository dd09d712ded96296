"""Memory that nobody can change any more, and that runs."""

import hashlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from broker.attestation.sealed import TooLarge, digest, executable_memory, fill, seal


@pytest.fixture
def memory() -> Iterator[int]:
    fd = executable_memory("test")
    yield fd
    os.close(fd)


def filled(memory: int, path: Path, limit: int = 1 << 24) -> None:
    with path.open("rb") as source:
        fill(memory, source.fileno(), limit)


def test_its_content_is_the_files_and_stays(memory: int, tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"content" * 1000)
    filled(memory, path)
    seal(memory)
    assert digest(memory) == hashlib.sha256(b"content" * 1000).hexdigest()
    for change in (
        lambda: os.pwrite(memory, b"x", 0),
        lambda: os.truncate(memory, 1),
        lambda: os.truncate(memory, 1 << 20),
    ):
        with pytest.raises(PermissionError):
            change()
    with pytest.raises(PermissionError):
        seal(memory)


def test_it_runs(memory: int) -> None:
    filled(memory, Path("/bin/echo"))
    seal(memory)
    ran = subprocess.run(
        ["echo", "it runs"], executable=f"/proc/self/fd/{memory}", pass_fds=(memory,), capture_output=True, check=True
    )
    assert ran.stdout == b"it runs\n"


def test_two_of_them_are_two_files(memory: int) -> None:
    other = executable_memory("test")
    assert os.fstat(other).st_ino != os.fstat(memory).st_ino
    os.close(other)


def test_more_than_may_be_held(memory: int, tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"12345678")
    filled(memory, path, 8)
    with pytest.raises(TooLarge):
        filled(memory, path, 7)
