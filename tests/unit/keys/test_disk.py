import os
import pickle
import stat

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from broker.errors import Conflict, Misconfigured, NotFound, Unavailable
from broker.keys import DiskKeys
from broker.keys.disk import ASIDE, MAX_FILE


@pytest.fixture
def directory(tmp_path):
    return tmp_path / "keys"


def pem(key):
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def refused(directory):
    with pytest.raises(Misconfigured) as caught:
        DiskKeys(directory)
    assert "PRIVATE" not in str(caught.value)
    return caught.value


def test_a_key_outlives_the_process_that_made_it(directory):
    made = DiskKeys(directory).generate("a")
    again = DiskKeys(directory)
    assert list(again.ids()) == ["a"]
    assert again.signer("a").public_key == made.public_key
    signature = again.signer("a").sign_der(b"x")
    made.public_key.verify(signature, b"x", ec.ECDSA(hashes.SHA256()))
    again.remove("a")
    assert list(DiskKeys(directory).ids()) == []
    assert list(directory.iterdir()) == []
    again.remove("a")
    with pytest.raises(NotFound):
        again.signer("a")


@pytest.mark.bears("S10")
def test_only_its_user_can_read_it_whatever_the_umask_says(directory):
    before = os.umask(0)
    try:
        DiskKeys(directory).generate("a")
    finally:
        os.umask(before)
    assert stat.S_IMODE((directory / "a.pem").stat().st_mode) == 0o600
    before = os.umask(0o777)
    try:
        DiskKeys(directory).generate("b")
    finally:
        os.umask(before)
    assert stat.S_IMODE((directory / "b.pem").stat().st_mode) == 0o600


def test_names(directory):
    keys = DiskKeys(directory)
    keys.generate("a")
    with pytest.raises(Conflict):
        keys.generate("a")
    for name in ("", "../x", "a/b", "a.pem", "x" * 200):
        with pytest.raises(ValueError):
            keys.generate(name)
    named = keys.generate(lambda public: f"{public.public_numbers().x:x}"[:16])
    assert named.id == f"{named.public_key.public_numbers().x:x}"[:16]


@pytest.mark.parametrize("mode", [0o755, 0o770, 0o701])
def test_a_directory_that_others_may_enter_is_refused(directory, mode):
    DiskKeys(directory)
    directory.chmod(mode)
    assert refused(directory).reason == "keys_unsafe"


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o620])
def test_a_key_that_others_may_read_is_refused(directory, mode):
    DiskKeys(directory).generate("a")
    (directory / "a.pem").chmod(mode)
    error = refused(directory)
    assert error.reason == "keys_unsafe"
    assert "taint" in error.hint


def test_links_and_other_things_are_refused(directory, tmp_path):
    DiskKeys(directory).generate("a")
    (directory / "a.pem").rename(tmp_path / "elsewhere.pem")
    (directory / "a.pem").symlink_to(tmp_path / "elsewhere.pem")
    assert refused(directory).reason == "keys_unavailable"
    (directory / "a.pem").unlink()
    os.mkfifo(directory / "a.pem", 0o600)
    assert refused(directory).reason == "keys_unsafe"
    (directory / "a.pem").unlink()
    directory.rename(tmp_path / "real")
    directory.symlink_to(tmp_path / "real")
    assert refused(directory).reason == "keys_unavailable"


@pytest.mark.bears("K06")
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n",
        pem(ec.generate_private_key(ec.SECP384R1())),
        pem(rsa.generate_private_key(65537, 2048)),
        pem(ec.generate_private_key(ec.SECP256R1()))[:-40],
        pem(ec.generate_private_key(ec.SECP256R1())) + b"\n" * MAX_FILE,
    ],
)
def test_a_damaged_file_is_refused_with_its_name(directory, content):
    DiskKeys(directory)
    path = directory / "a.pem"
    path.write_bytes(content)
    path.chmod(0o600)
    error = refused(directory)
    assert error.reason == "key_damaged"
    assert str(path) in error.message


def test_what_was_never_finished_is_cleared_away(directory):
    DiskKeys(directory)
    (directory / f"{ASIDE}1234").write_bytes(b"half")
    assert list(DiskKeys(directory).ids()) == []
    assert list(directory.iterdir()) == []


def test_a_disk_that_takes_nothing_makes_no_key(directory, monkeypatch):
    keys = DiskKeys(directory)

    def full(*_args, **_more):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(Unavailable) as caught:
        keys.generate("a")
    assert caught.value.reason == "keys_not_written"
    assert list(keys.ids()) == []
    monkeypatch.undo()
    assert list(DiskKeys(directory).ids()) == []


def test_nothing_shows_a_key(directory):
    keys = DiskKeys(directory)
    assert "secret" in repr(keys) and "secret" in repr(keys.generate("a"))
    with pytest.raises(TypeError):
        pickle.dumps(keys.signer("a"))
