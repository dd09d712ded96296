import asyncio
import os
import pickle
import stat
import threading
from contextlib import suppress

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from broker.errors import Conflict, Misconfigured, NotFound, Unavailable
from broker.keys import DiskKeys
from broker.keys.disk import ASIDE, MAX_FILE
from tests.fakes.running_agent import until


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


async def test_a_key_outlives_the_process_that_made_it(directory):
    made = await DiskKeys(directory).generate("a")
    again = DiskKeys(directory)
    assert list(again.ids()) == ["a"]
    assert again.signer("a").public_key == made.public_key
    signature = again.signer("a").sign_der(b"x")
    made.public_key.verify(signature, b"x", ec.ECDSA(hashes.SHA256()))
    await again.remove("a")
    assert list(DiskKeys(directory).ids()) == []
    assert list(directory.iterdir()) == []
    await again.remove("a")
    with pytest.raises(NotFound):
        again.signer("a")


@pytest.mark.bears("S10")
async def test_only_its_user_can_read_it_whatever_the_umask_says(directory):
    before = os.umask(0)
    try:
        await DiskKeys(directory).generate("a")
    finally:
        os.umask(before)
    assert stat.S_IMODE((directory / "a.pem").stat().st_mode) == 0o600
    before = os.umask(0o777)
    try:
        await DiskKeys(directory).generate("b")
    finally:
        os.umask(before)
    assert stat.S_IMODE((directory / "b.pem").stat().st_mode) == 0o600


async def test_names(directory):
    keys = DiskKeys(directory)
    await keys.generate("a")
    with pytest.raises(Conflict):
        await keys.generate("a")
    for name in ("", "../x", "a/b", "a.pem", "x" * 200):
        with pytest.raises(ValueError):
            await keys.generate(name)
    named = await keys.generate(lambda public: f"{public.public_numbers().x:x}"[:16])
    assert named.id == f"{named.public_key.public_numbers().x:x}"[:16]


@pytest.mark.parametrize("mode", [0o755, 0o770, 0o701])
def test_a_directory_that_others_may_enter_is_refused(directory, mode):
    DiskKeys(directory)
    directory.chmod(mode)
    assert refused(directory).reason == "keys_unsafe"


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o620])
async def test_a_key_that_others_may_read_is_refused(directory, mode):
    await DiskKeys(directory).generate("a")
    (directory / "a.pem").chmod(mode)
    error = refused(directory)
    assert error.reason == "keys_unsafe"
    assert "taint" in error.hint


async def test_links_and_other_things_are_refused(directory, tmp_path):
    await DiskKeys(directory).generate("a")
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


async def test_a_disk_that_takes_nothing_makes_no_key(directory, monkeypatch):
    keys = DiskKeys(directory)

    def full(*_args, **_more):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(Unavailable) as caught:
        await keys.generate("a")
    assert caught.value.reason == "keys_not_written"
    assert list(keys.ids()) == []
    monkeypatch.undo()
    assert list(DiskKeys(directory).ids()) == []


async def test_a_key_whose_name_may_not_be_on_the_disk_is_not_left_there(directory, monkeypatch):
    keys, flush = DiskKeys(directory), os.fsync

    def fails_for_directories(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(5, "Input/output error")
        flush(descriptor)

    monkeypatch.setattr(os, "fsync", fails_for_directories)
    with pytest.raises(Unavailable):
        await keys.generate("a")
    monkeypatch.undo()
    assert list(directory.iterdir()) == []
    await keys.generate("a")


class SlowDisk:
    """A disk that flushes when it is told to."""

    def __init__(self, monkeypatch):
        self.begun, self.go, flush = threading.Semaphore(0), threading.Semaphore(0), os.fsync

        def slowly(descriptor):
            self.begun.release()
            assert self.go.acquire(timeout=30)
            flush(descriptor)

        monkeypatch.setattr(os, "fsync", slowly)

    async def is_flushing(self):
        await until(lambda: self.begun.acquire(blocking=False))

    def goes_on(self):
        self.go.release(100)

    def stops(self):
        while self.go.acquire(blocking=False):
            pass


@pytest.fixture
def disk(monkeypatch):
    return SlowDisk(monkeypatch)


async def test_the_loop_goes_on_while_a_key_is_written_and_nobody_has_the_key_yet(directory, disk):
    keys = DiskKeys(directory)
    coming = asyncio.create_task(keys.generate("a"))
    await disk.is_flushing()  # which this loop is told of
    assert list(keys.ids()) == []
    with pytest.raises(Conflict):
        await keys.generate("a")
    disk.goes_on()
    assert (await coming) is keys.signer("a")
    assert list(DiskKeys(directory).ids()) == ["a"]


async def test_a_key_is_forgotten_before_its_file_is_and_a_later_one_of_its_name_stays(directory, disk):
    disk.goes_on()
    keys = DiskKeys(directory)
    first = await keys.generate("a")
    disk.stops()
    going = asyncio.create_task(keys.remove("a"))
    await until(lambda: not (directory / "a.pem").exists())
    assert list(keys.ids()) == []
    coming = asyncio.create_task(keys.generate("a"))
    await asyncio.sleep(0)
    assert not going.done()
    disk.goes_on()
    await going
    second = await coming
    assert DiskKeys(directory).signer("a").public_key == second.public_key != first.public_key


async def test_a_key_that_nobody_waits_for_any_more_does_not_stay(directory, disk):
    keys = DiskKeys(directory)
    under_way = asyncio.create_task(keys.generate("a"))
    await disk.is_flushing()
    waiting = asyncio.create_task(keys.generate("b"))
    await asyncio.sleep(0)
    for one in (under_way, waiting):
        one.cancel()
        with suppress(asyncio.CancelledError):
            await one
    disk.goes_on()
    third = await keys.generate("a")  # comes after all that is left to do
    assert [one.name for one in directory.iterdir()] == ["a.pem"]
    assert DiskKeys(directory).signer("a").public_key == third.public_key


async def test_a_file_goes_also_if_nobody_waits_for_that(directory, disk):
    disk.goes_on()
    keys = DiskKeys(directory)
    await keys.generate("a")
    going = asyncio.create_task(keys.remove("a"))
    await asyncio.sleep(0)
    going.cancel()
    with suppress(asyncio.CancelledError):
        await going
    await until(lambda: not (directory / "a.pem").exists())


async def test_nothing_shows_a_key(directory):
    keys = DiskKeys(directory)
    assert "secret" in repr(keys) and "secret" in repr(await keys.generate("a"))
    with pytest.raises(TypeError):
        pickle.dumps(keys.signer("a"))
