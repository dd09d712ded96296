"""Connections to the private socket: dialled for a caller, or ahead of the next one."""

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from broker.errors import NotAttested, Unavailable
from broker.transport import backend as module
from broker.transport.backend import Backend
from broker.transport.callers import CallerIndex
from broker.transport.splice import Splice

NAME = "0" * 32
GREETING = b"settings"


class Served:
    """What a backend has accepted: names in their order, and those that are open."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.open: dict[str, asyncio.StreamWriter] = {}

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        name = writer.get_extra_info("peername")[1:].decode()
        self.names.append(name)
        self.open[name] = writer
        try:
            writer.write(GREETING)
            while chunk := await reader.read(1024):
                writer.write(name.encode() + chunk)
        except ConnectionResetError:
            pass  # who let go of it had not read the greeting
        finally:
            del self.open[name]
            writer.close()


@asynccontextmanager
async def kept(directory: Path) -> AsyncIterator[tuple[Backend, Served]]:
    """A backend that keeps a spare, and the server behind it."""
    served = Served()
    server = await asyncio.start_unix_server(served.serve, directory / "s")
    backend = Backend(directory / "s")
    backend.keep_spare()
    try:
        yield backend, served
    finally:
        backend.close()
        await until(lambda: not served.open)
        server.close()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.002)


async def first_words(backend: Backend, said: bytes = b"hello") -> bytes:
    """Take what was dialled ahead for a caller who says this; give what the caller hears."""
    loop = asyncio.get_running_loop()
    ended = loop.create_future()
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    splice = Splice(backend.buffer, ended.set_result)
    spare = backend.take()
    assert spare is not None
    spare.join(splice)
    await loop.connect_accepted_socket(lambda: splice.front, ours)
    reader, writer = await asyncio.open_unix_connection(sock=theirs)
    writer.write(said)
    writer.write_eof()
    try:
        async with asyncio.timeout(30):
            return await reader.read()
    finally:
        writer.close()
        splice.abort()
        await ended


async def test_what_was_dialled_ahead_is_the_next_callers_with_all_that_was_said(short: Path) -> None:
    async with kept(short) as (backend, served):
        for turn in range(1, 4):
            await until(lambda turn=turn: len(served.names) == turn and backend._spare is not None)
            name = served.names[-1]
            assert await first_words(backend) == GREETING + name.encode() + b"hello"
        assert len(set(served.names)) == len(served.names)
        assert backend.take() is None, "one at a time: the next is dialled when this one has had its answer"


async def test_it_is_nobodys_before_a_caller_has_it(short: Path) -> None:
    async with kept(short) as (backend, _):
        await until(lambda: backend._spare is not None)
        spare = backend.take()
        assert spare is not None
        index: CallerIndex[int] = CallerIndex()
        with pytest.raises(NotAttested):
            index.of(f"unix-abstract:{spare.name}")
        assert index.admit(7, name=spare.name) == spare.name
        assert index.of(f"unix-abstract:{spare.name}") == 7
        spare.abort()


async def test_none_grows_old(short: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SPARE_LIFE", 0.03)
    async with kept(short) as (_, served):
        await until(lambda: len(served.names) >= 4)
        await until(lambda: len(served.open) <= 1)


async def test_one_that_the_backend_let_go_is_given_to_nobody(short: Path) -> None:
    async with kept(short) as (backend, served):
        await until(lambda: backend._spare is not None)
        served.open[served.names[0]].close()
        await until(lambda: backend._spare.is_lost)
        assert backend.take() is None
        await until(lambda: len(served.names) == 2 and backend._spare is not None)
        assert (await first_words(backend)).startswith(GREETING)


async def test_a_backend_that_says_too_much_keeps_no_spare(short: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_HEARD", len(GREETING) - 1)
    async with kept(short) as (backend, served):
        await until(lambda: len(served.names) == 1 and not served.open)
        assert backend.take() is None


async def test_without_a_backend_there_is_none_and_later_there_is(short: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SPARE_LIFE", 0.03)
    backend = Backend(short / "s")
    backend.keep_spare()
    await asyncio.sleep(0)
    assert backend.take() is None
    served = Served()
    server = await asyncio.start_unix_server(served.serve, short / "s")
    await until(lambda: backend._spare is not None)
    backend.close()
    backend.close()
    await until(lambda: not served.open)
    assert backend.take() is None
    server.close()


async def test_nobody_behind_it_is_unavailable(short: Path) -> None:
    backend = Backend(short / "nobody")
    with pytest.raises(Unavailable):
        await backend.join(Splice(backend.buffer, lambda _: None), NAME)


async def test_a_full_queue_of_the_backend_is_waited_for(short: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "DIAL_DEADLINE", 0.3)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(short / "s"))
        listening.listen(0)
        fillers = []
        while True:
            filler = socket.socket(socket.AF_UNIX)
            filler.setblocking(False)
            fillers.append(filler)
            if filler.connect_ex(str(short / "s")):
                break
        backend = Backend(short / "s")
        with pytest.raises(Unavailable):
            await backend._dial(NAME)

        async def make_place() -> None:
            await asyncio.sleep(0.02)
            listening.accept()[0].close()

        place = asyncio.create_task(make_place())
        dialled = await backend._dial(NAME)
        await place
        for sock in (dialled, *fillers):
            sock.close()
