"""What is encrypted: only its own key opens it, only for its purpose, and only whole."""

import os

import pytest

from broker.agent.sealed import KEY_SIZE, OVERHEAD, SealedFile, SealingKey, is_sealed
from broker.errors import InvalidJson

KEY = SealingKey(bytes(range(KEY_SIZE)))
SECRET = b"what nobody may read" * 10


def test_what_is_opened_is_what_was_sealed() -> None:
    sealed = KEY.seal("a", SECRET)
    assert KEY.open("a", sealed) == SECRET
    assert len(sealed) == len(SECRET) + OVERHEAD
    assert is_sealed(sealed)
    assert SECRET[:8] not in sealed
    assert KEY.seal("a", SECRET) != sealed
    assert KEY.open("a", KEY.seal("a", b"")) == b""


@pytest.mark.bears("O02")
def test_another_key_another_purpose_or_another_bit_opens_nothing() -> None:
    sealed = KEY.seal("a", SECRET)
    for key, purpose in ((SealingKey(os.urandom(KEY_SIZE)), "a"), (KEY, "b")):
        with pytest.raises(InvalidJson):
            key.open(purpose, sealed)
    for place in (0, 7, 8, 19, 20, 100, len(sealed) - 1):
        spoilt = bytearray(sealed)
        spoilt[place] ^= 1
        with pytest.raises(InvalidJson):
            KEY.open("a", bytes(spoilt))
    for part in (sealed[:-1], sealed[: OVERHEAD - 1], sealed[:8], b"", SECRET, sealed + b"\0"):
        with pytest.raises(InvalidJson):
            KEY.open("a", part)


@pytest.mark.parametrize("size", [0, 16, 31, 33])
def test_a_key_has_one_size_and_is_not_shown(size) -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        SealingKey(bytes(size))
    assert "0x00" not in repr(KEY)
    assert "\\x01\\x02" not in repr(KEY)


@pytest.mark.bears("O02")
def test_a_file_is_never_read_or_written_in_clear(tmp_path) -> None:
    path = tmp_path / "a.bin"
    file = SealedFile(path, KEY, max_size=1000)
    assert file.read() is None
    file.write(SECRET)
    assert file.read() == SECRET
    assert SECRET[:8] not in path.read_bytes()
    assert path.stat().st_mode & 0o777 == 0o600
    path.write_bytes(SECRET)
    with pytest.raises(InvalidJson, match="not encrypted"):
        file.read()
    file.write(SECRET)
    path.rename(tmp_path / "b.bin")
    with pytest.raises(InvalidJson, match="another key"):
        SealedFile(tmp_path / "b.bin", KEY, max_size=1000).read()


@pytest.mark.bears("O02")
def test_without_a_key_nothing_is_written_and_nothing_read(tmp_path) -> None:
    path = tmp_path / "a.bin"
    none = SealedFile(path, None, max_size=1000)
    with pytest.raises(OSError, match="no key"):
        none.write(SECRET)
    assert not path.exists()
    assert none.read() is None
    SealedFile(path, KEY, max_size=1000).write(SECRET)
    with pytest.raises(InvalidJson, match="no key"):
        none.read()
    none.remove()
    assert not path.exists()


def test_a_file_of_the_longest_content_is_read(tmp_path) -> None:
    file = SealedFile(tmp_path / "a.bin", KEY, max_size=len(SECRET))
    file.write(SECRET)
    assert file.read() == SECRET
    file.write(SECRET + b"x")
    with pytest.raises(InvalidJson):
        file.read()
