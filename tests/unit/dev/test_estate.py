"""What an estate refuses before anything runs, and how a part that fails is named."""

import fcntl
import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from broker.dev.estate import Estate, _clean, _free
from broker.errors import Conflict, NotFound, Unavailable


@pytest.fixture
def directory() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        yield Path(name) / "e"


async def test_nothing_was_started(directory: Path) -> None:
    estate = Estate(directory)
    assert [part.state for part in await estate.status()] == ["stopped"] * 3
    assert estate.down() == []
    assert not directory.exists()
    for act in (estate.environment, estate.purge, lambda: estate.user_token("alice")):
        with pytest.raises(NotFound):
            act()


async def test_an_interpreter_that_is_not_there_is_named(directory: Path) -> None:
    estate = Estate(directory, python="/nonexistent/python")
    with pytest.raises(Unavailable, match="cannot be run") as caught:
        await estate.up(lambda _: None)
    assert caught.value.reason == "issuer_failed"
    assert estate.down() == []


async def test_a_part_that_ends_is_named_with_its_log(directory: Path) -> None:
    script = directory.parent / "python"
    script.write_text("#!/bin/sh\necho this is why >&2\nexit 3\n")
    script.chmod(0o700)
    estate = Estate(directory, python=str(script))
    with pytest.raises(Unavailable, match="this is why") as caught:
        await estate.up(lambda _: None)
    assert "the issuer ended with exit code 3" in caught.value.message
    assert "issuer.log" in caught.value.hint
    estate.down()


async def test_two_at_once_are_refused(directory: Path) -> None:
    estate = Estate(directory)
    directory.mkdir(mode=0o700)
    with estate.layout.lock.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(Conflict):
            await estate.up(lambda _: None)


def test_ports() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert _free(port) != port
    assert _free(port) == port


def test_no_setting_of_the_caller_s_reaches_the_programs() -> None:
    assert _clean({"BROKER_SERVER__ISSUER": "x", "BROKER_CONFIG": "y", "HOME": "/h"}) == {"HOME": "/h"}
    assert "PATH" in _clean(os.environ)
