"""Files of secrets: whole or not there, with their own mode, and no link followed."""

import os
import stat
from pathlib import Path

import pytest

from broker.cli.credential_files import MAX_NAME, CredentialDirectory, NewFile, file_name
from broker.errors import Invalid, Misconfigured


@pytest.mark.parametrize("name", ["", ".", "..", ".hidden", "a/b", "/a", "a\0", "a\nb", "x" * (MAX_NAME + 1), "é"])
def test_what_is_no_plain_name(name: str) -> None:
    with pytest.raises(Invalid, match="not a plain file name"):
        file_name(name)


@pytest.mark.parametrize("name", ["svid.pem", "a", "x" * MAX_NAME, "tls-key_1.pem"])
def test_names(name: str) -> None:
    assert file_name(name) == name


def test_modes_hold_whatever_the_umask_says(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        with CredentialDirectory.opened(tmp_path / "new") as directory:
            directory.write([NewFile("a", b"1", 0o644), NewFile("b", b"2", 0o600)])
    finally:
        os.umask(before)
    modes = {one.name: stat.S_IMODE(one.lstat().st_mode) for one in (tmp_path / "new").iterdir()}
    assert modes == {"a": 0o644, "b": 0o600}
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o700


def test_a_reader_of_the_old_file_keeps_it(tmp_path: Path) -> None:
    with CredentialDirectory.opened(tmp_path) as directory:
        directory.write([NewFile("a", b"old", 0o600)])
        with (tmp_path / "a").open("rb") as held:
            directory.write([NewFile("a", b"new", 0o600)])
            assert held.read() == b"old"
    assert (tmp_path / "a").read_bytes() == b"new"


def test_nothing_is_changed_when_one_of_them_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"old")
    with CredentialDirectory.opened(tmp_path) as directory:
        beside = directory._create

        def full(name: str, one: NewFile) -> None:
            if one.name == "b":
                raise OSError(28, "No space left on device")
            beside(name, one)

        directory._create = full  # type: ignore[method-assign]
        with pytest.raises(Misconfigured, match="No space left"):
            directory.write([NewFile("a", b"new", 0o600), NewFile("b", b"new", 0o600)])
    assert (tmp_path / "a").read_bytes() == b"old"
    assert [one.name for one in tmp_path.iterdir()] == ["a"]


def test_a_directory_in_the_place_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    with CredentialDirectory.opened(tmp_path) as directory, pytest.raises(Misconfigured, match="directory"):
        directory.write([NewFile("a", b"new", 0o600)])
    assert [one.name for one in tmp_path.iterdir()] == ["a"]


def test_the_directory_stays_the_one_that_was_opened(tmp_path: Path) -> None:
    """Also where somebody puts a link in its place meanwhile."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "other").mkdir()
    with CredentialDirectory.opened(tmp_path / "mine") as directory:
        (tmp_path / "mine").rename(tmp_path / "moved")
        (tmp_path / "mine").symlink_to(tmp_path / "other")
        directory.write([NewFile("a", b"1", 0o600)])
    assert (tmp_path / "moved" / "a").exists()
    assert list((tmp_path / "other").iterdir()) == []


def test_sweeping_takes_what_is_ours(tmp_path: Path) -> None:
    for name in (f".a.{'0' * 16}.new", f".other.{'0' * 16}.new", "a", ".a.new"):
        (tmp_path / name).write_bytes(b"")
    with CredentialDirectory.opened(tmp_path) as directory:
        directory.sweep(["a"])
        directory.remove(["a", "never there"])
    assert sorted(one.name for one in tmp_path.iterdir()) == [".a.new", f".other.{'0' * 16}.new"]


def test_no_content_is_shown() -> None:
    assert "secret" not in repr(NewFile("a", b"secret", 0o600))
