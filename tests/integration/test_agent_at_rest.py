"""What an agent keeps is encrypted at rest: real agents, their files, and restarts of processes in an outage."""

import errno
import os
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from broker.agent import keyring
from broker.agent.app import Agent
from broker.agent.at_rest import KEY_FILE, in_memory
from broker.agent.estate_file import FILE
from broker.agent.identity_file import FILE as IDENTITY_FILE
from broker.agent.settings import load
from broker.errors import Misconfigured
from tests.fakes.outage import House, joined, served
from tests.fakes.processes import agent_process
from tests.fakes.sealing import has_keyring, key_file

CLEAR = (
    bytes.fromhex("2a8648ce3d0201"),
    b"spiffe://",
    b"example.org",
)  # id-ecPublicKey: in each key and certificate of ours
NO_KEYRING = (sys.executable, "-m", "tests.fakes.sealing")

needs_keyring = pytest.mark.skipif(not has_keyring(), reason="needs the kernel's keyrings: a filter refuses them here")


@asynccontextmanager
async def house_in(place: str) -> AsyncIterator[House]:
    directory = Path(tempfile.mkdtemp(dir=place))
    directory.chmod(0o755)
    house = House(directory)
    try:
        yield house
    finally:
        await house.line.cut()
        shutil.rmtree(directory)


@pytest.fixture
async def house() -> AsyncIterator[House]:
    async with house_in("/tmp") as house:
        if in_memory(house.directory):
            pytest.skip("needs a temporary directory on a disk")
        yield house


@pytest.fixture
def no_keyring(monkeypatch) -> None:
    def refused(description, fresh):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(keyring, "shared", refused)


async def lived(house: House, **settings: str) -> str:
    """Let an agent join, serve this user, and stop; nobody answers it from then on."""
    async with house.server():
        text = await house.settings(**settings)
        async with house.agent() as agent:
            await joined(agent, house)
    return text


def private(house: House) -> Path:
    return house.directory / "a" / "private"


def files(house: House) -> set[str]:
    return {name for name in os.listdir(private(house)) if not name.startswith(".")}


@asynccontextmanager
async def again(house: House, text: str, *, inside: tuple[str, ...] = ()) -> AsyncIterator[object]:
    """Start it in a process, and give what it serves; it is still there afterwards."""
    async with agent_process(house.directory, text, inside=inside) as process:
        yield await served(house.directory / "a" / "public" / "api.sock")
        assert process.returncode is None


def said(house: House) -> str:
    return (house.directory / "agent.log").read_text()


@needs_keyring
@pytest.mark.bears("O02")
async def test_by_default_what_is_kept_is_encrypted_under_a_key_of_the_kernel(house) -> None:
    text = await lived(house, at_rest_key_path="")
    content = (private(house) / FILE).read_bytes()
    assert not [word for word in CLEAR if word in content]
    assert files(house) == {FILE, IDENTITY_FILE}
    async with again(house, text) as svid:
        assert svid.spiffe_id == "spiffe://example.org/wl/me"
        assert "source=keyring" in said(house)
        # A key of the boot would strand a node that cannot join twice: the agent's own waits for the operator's.
        assert "agent_key_in_clear" in said(house)


@pytest.mark.bears("O02")
async def test_with_a_named_key_nothing_is_in_clear_and_a_restart_serves(house) -> None:
    text = await lived(house)
    for name in (FILE, IDENTITY_FILE):
        content = (private(house) / name).read_bytes()
        assert not [word for word in CLEAR if word in content]
    async with again(house, text) as svid:
        assert svid.spiffe_id == "spiffe://example.org/wl/me"
        assert "agent_key_in_clear" not in said(house)


@pytest.mark.bears("O02")
@pytest.mark.parametrize("spoilt", [lambda sealed: sealed[:-1] + bytes([sealed[-1] ^ 1]), lambda sealed: sealed[8:]])
async def test_what_was_changed_on_the_disk_is_not_served_and_it_stays_up(house, spoilt) -> None:
    text = await lived(house)
    file = private(house) / FILE
    file.write_bytes(spoilt(file.read_bytes()))
    async with again(house, text) as svid:
        assert svid is None
        assert "kept_estate_unusable" in said(house)
        assert not file.exists()


@pytest.mark.bears("O02")
async def test_under_another_key_it_knows_nothing_of_before_and_stays_up(house) -> None:
    text = await lived(house)
    key_file(house.directory).write_bytes(os.urandom(32))
    async with again(house, text) as svid:
        assert svid is None
        assert "stored_identity_unusable" in said(house)


@pytest.mark.bears("O02")
@pytest.mark.usefixtures("no_keyring")
async def test_without_a_place_for_a_key_nothing_is_kept_and_it_stays_up(house) -> None:
    async with house.server():
        text = await house.settings(at_rest_key_path="")
        async with house.agent() as agent:
            await house.register(agent.agent.node.id.path)
            assert (await agent.x509()).svids
            await agent.agent.keeping.save()
    assert files(house) == {IDENTITY_FILE}
    async with again(house, text, inside=NO_KEYRING) as svid:
        assert svid is None
        assert "at_rest_key_missing" in said(house)
        assert "at_rest_key_path" in said(house)
        async with house.server():
            while (svid := await served(house.directory / "a" / "public" / "api.sock")) is None:
                pass
            assert svid.spiffe_id == "spiffe://example.org/wl/me"


@pytest.mark.bears("O02")
@pytest.mark.usefixtures("no_keyring")
async def test_in_memory_it_needs_no_keyring() -> None:
    async with house_in("/dev/shm") as house:
        text = await lived(house, at_rest_key_path="")
        assert files(house) == {FILE, IDENTITY_FILE, KEY_FILE}
        async with again(house, text, inside=NO_KEYRING) as svid:
            assert svid.spiffe_id == "spiffe://example.org/wl/me"
            assert "source=memory" in said(house)
            assert "agent_key_in_clear" not in said(house)


@pytest.mark.bears("O02")
async def test_a_key_given_later_takes_the_agents_own_key_out_of_the_clear(house) -> None:
    async with house.server():
        await house.settings(at_rest_key_path="")
        async with house.agent():
            pass
    file = private(house) / IDENTITY_FILE
    assert b'"key"' in file.read_bytes()
    text = (house.directory / "a.toml").read_text() + f"at_rest_key_path = '{key_file(house.directory)}'\n"
    async with again(house, text):
        assert b'"key"' not in file.read_bytes()
        assert "stored_identity_unusable" not in said(house)


async def test_a_named_key_that_is_not_there_stops_the_start(house) -> None:
    async with house.server():
        await house.settings(at_rest_key_path=str(house.directory / "none"))
    with pytest.raises(Misconfigured) as refused:
        async with Agent(load(house.directory / "a.toml", {})):
            pass
    assert refused.value.reason == "at_rest_key_unusable"
