"""A secret in the kernel's keyring: one for all of a user's processes, and for nobody else."""

import errno
import os
import subprocess
import sys
import uuid

import pytest

from broker.agent import keyring
from tests.fakes.sealing import has_keyring

_UNLINK, _USER = 9, -4
ASK = "import sys; from broker.agent import keyring; sys.stdout.buffer.write(keyring.shared(sys.argv[1], sys.argv[2].encode()))"

needs_keyring = pytest.mark.skipif(not has_keyring(), reason="needs the kernel's keyrings: a filter refuses them here")


@pytest.fixture
def name():
    """Give a name that nobody has, and take away what was put under it: a user has 200."""
    name = f"identity-broker:test:{uuid.uuid4()}"
    yield name
    try:
        key = keyring._keyctl(keyring._SEARCH, _USER, b"user", name.encode(), 0)
    except OSError:
        return
    keyring._keyctl(_UNLINK, key, _USER)


def asked_elsewhere(name: str, fresh: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", ASK, name, fresh], stdout=subprocess.PIPE)


@needs_keyring
def test_the_first_secret_is_everybodys_and_outlives_whoever_put_it(name) -> None:
    with asked_elsewhere(name, "first") as process:
        assert process.communicate()[0] == b"first"
    assert keyring.shared(name, b"second") == b"first"
    with asked_elsewhere(name, "third") as process:
        assert process.communicate()[0] == b"first"


@needs_keyring
def test_of_many_at_once_one_is_first(name) -> None:
    processes = [asked_elsewhere(name, f"secret {number}") for number in range(8)]
    said = {process.communicate()[0] for process in processes}
    assert len(said) == 1
    assert said.pop().startswith(b"secret ")


@needs_keyring
def test_who_comes_second_does_not_replace_it(name, monkeypatch) -> None:
    found = keyring._found

    def unseen(description):
        monkeypatch.setattr(keyring, "_found", found)
        assert keyring.shared(name, b"first") == b"first"
        raise OSError(errno.ENOKEY, "not yet")

    monkeypatch.setattr(keyring, "_found", unseen)
    assert keyring.shared(name, b"second") == b"first"


@needs_keyring
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: a process of another user")
def test_another_users_process_has_another_keyring(name) -> None:
    keyring.shared(name, b"first")
    found = int(keyring._keyctl(keyring._SEARCH, _USER, b"user", name.encode(), 0))
    text = (
        "import ctypes, os, sys\n"
        "from broker.agent import keyring\n"
        "os.setgroups([]); os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534)\n"
        "try: keyring._keyctl(keyring._READ, int(sys.argv[1]), ctypes.create_string_buffer(9), 9)\n"
        "except OSError as error: print(error.errno)"
    )
    ended = subprocess.run([sys.executable, "-c", text, str(found)], stdout=subprocess.PIPE, check=True)
    assert int(ended.stdout) == errno.EACCES


def test_a_machine_that_is_not_known_has_none(monkeypatch, name) -> None:
    monkeypatch.setattr(keyring.platform, "machine", lambda: "pdp11")
    with pytest.raises(OSError, match="not implemented"):
        keyring.shared(name, b"x")


def test_a_filter_that_refuses_is_an_error(name) -> None:
    text = f"from tests.fakes.sealing import refuse_keyrings; refuse_keyrings(); {ASK}"
    ended = subprocess.run([sys.executable, "-c", text, name, "x"], stderr=subprocess.PIPE, check=False)
    assert ended.returncode == 1
    assert b"PermissionError" in ended.stderr
