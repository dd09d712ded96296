"""When what is kept is written, and that nothing is left of what was forgotten."""

import asyncio
import threading

from broker.agent.estate_file import FILE
from tests.fakes.fake_server import entry_message
from tests.fakes.running_agent import ME, estate, until


async def test_a_change_is_on_the_disk_soon_and_many_are_one_write(monkeypatch) -> None:
    async with estate() as agent:
        file = agent.agent.keeping._file
        writes = []
        store = file.store
        monkeypatch.setattr(file, "store", lambda kept: writes.append(len(kept.entries)) or store(kept))
        for number in range(50):
            agent.server.put(entry_message(f"n{number}", f"/n/{number}", [ME]))
        await until(lambda: writes and writes[-1] == 51)
        assert len(writes) < 10
        await until((agent.settings.private_dir / FILE).exists)


async def test_what_is_forgotten_during_its_writing_is_not_left_behind(monkeypatch) -> None:
    async with estate() as agent:
        await until((agent.settings.private_dir / FILE).exists)
        keeping = agent.agent.keeping
        begun, go = threading.Event(), threading.Event()
        store = keeping._file.store

        def slow(kept) -> None:
            begun.set()
            go.wait(10)
            store(kept)

        monkeypatch.setattr(keeping._file, "store", slow)
        writing = asyncio.create_task(keeping.save())
        await until(begun.is_set)
        agent.agent.node.lose()
        go.set()
        await writing
        assert not (agent.settings.private_dir / FILE).exists()


async def test_a_disk_that_is_full_is_told_once_and_harms_nobody(monkeypatch) -> None:
    async with estate() as agent:

        def full(kept) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(agent.agent.keeping._file, "store", full)
        await agent.agent.keeping.save()
        await agent.agent.keeping.save()
        assert (await agent.x509()).svids
