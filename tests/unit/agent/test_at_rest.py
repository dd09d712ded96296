"""Where the key at rest is: what is named, else what ends with the boot, else nowhere."""

import errno
import os
import shutil
import tempfile
from pathlib import Path

import pytest

from broker.agent import at_rest, keyring
from broker.agent.at_rest import KEY_FILE, boot_key, chosen, in_memory, named_key
from broker.agent.sealed import KEY_SIZE
from broker.errors import Misconfigured
from tests.fakes.sealing import key_file

MEMORY = Path("/dev/shm")


@pytest.fixture
def memory():
    directory = Path(tempfile.mkdtemp(dir=MEMORY))
    yield directory
    shutil.rmtree(directory)


@pytest.fixture
def no_keyring(monkeypatch) -> None:
    def refused(description, fresh):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(keyring, "shared", refused)


def test_a_named_key_is_read_through_a_link_as_kubernetes_mounts_secrets(tmp_path) -> None:
    path = key_file(tmp_path)
    (tmp_path / "link").symlink_to(path)
    sealed = named_key(path).seal("a", b"secret")
    assert named_key(tmp_path / "link").open("a", sealed) == b"secret"
    path.chmod(0o440)  # a group that the operator chose
    assert named_key(path).open("a", sealed) == b"secret"


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.unlink(),
        lambda path: path.write_bytes(bytes(KEY_SIZE - 1)),
        lambda path: path.write_bytes(bytes(KEY_SIZE + 1)),
        lambda path: path.write_bytes(b""),
        lambda path: path.chmod(0o604),
        lambda path: path.chmod(0o602),
        lambda path: path.chmod(0o620),
        lambda path: (path.unlink(), path.mkdir()),
        lambda path: (path.unlink(), os.mkfifo(path, 0o600)),
    ],
    ids=["none", "short", "long", "empty", "readable", "writable", "writable by a group", "directory", "fifo"],
)
def test_a_named_key_that_is_not_usable_says_how_to_make_one(tmp_path, spoil) -> None:
    path = key_file(tmp_path)
    spoil(path)
    with pytest.raises(Misconfigured) as refused:
        named_key(path)
    assert refused.value.reason == "at_rest_key_unusable"
    assert "openssl rand" in refused.value.hint


def test_the_name_goes_before_everything(tmp_path) -> None:
    named = named_key(key_file(tmp_path))
    assert chosen(named, tmp_path) is named


def test_memory_and_disk_are_told_apart(tmp_path, memory) -> None:
    assert in_memory(memory)
    assert not in_memory(Path(__file__).parent)


@pytest.mark.usefixtures("no_keyring")
@pytest.mark.bears("O02")
def test_without_a_keyring_the_key_lies_in_memory_beside_what_it_seals_and_is_found_again(memory) -> None:
    first = boot_key(memory)
    sealed = first.seal("a", b"secret")
    assert (memory / KEY_FILE).stat().st_mode & 0o777 == 0o600
    assert boot_key(memory).open("a", sealed) == b"secret"
    (memory / KEY_FILE).chmod(0o644)  # others may have read it
    again = boot_key(memory).seal("a", b"secret")
    assert first._secret not in (memory / KEY_FILE).read_bytes()
    assert boot_key(memory).open("a", again) == b"secret"


@pytest.mark.usefixtures("no_keyring")
@pytest.mark.bears("O02")
def test_on_a_disk_no_key_is_written_beside(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(at_rest, "in_memory", lambda directory: False)
    assert boot_key(tmp_path) is None
    assert os.listdir(tmp_path) == []


def test_what_is_in_the_keyring_and_is_no_key_of_ours_is_not_used(monkeypatch, tmp_path) -> None:
    monkeypatch.setattr(keyring, "shared", lambda description, fresh: b"short")
    monkeypatch.setattr(at_rest, "in_memory", lambda directory: False)
    assert boot_key(tmp_path) is None
