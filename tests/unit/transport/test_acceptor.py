"""The accept loop: batches, room, and rest."""

import asyncio
import errno
import os
import resource
import socket
from collections.abc import Callable, Iterator

import pytest

from broker.transport import acceptor as module
from broker.transport.acceptor import Acceptor, raise_file_limit


@pytest.fixture
def listening() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0), backlog=128) as sock:
        yield sock


@pytest.fixture
def callers(listening: socket.socket) -> Iterator[Callable[[int], None]]:
    made: list[socket.socket] = []

    def call(number: int) -> None:
        made.extend(socket.create_connection(listening.getsockname()) for _ in range(number))

    yield call
    for sock in made:
        sock.close()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.002)


async def test_a_burst_is_taken_whole_and_nothing_is_inherited(
    listening: socket.socket, callers: Callable[[int], None]
) -> None:
    got: list[socket.socket] = []
    callers(100)
    acceptor = Acceptor(listening, got.append, lambda: True)
    acceptor.start()
    await until(lambda: len(got) == 100)
    assert not any(sock.get_inheritable() or sock.getblocking() for sock in got)
    acceptor.close()
    acceptor.close()
    for sock in got:
        sock.close()


async def test_without_room_callers_wait_and_room_is_made_only_for_them(
    listening: socket.socket, callers: Callable[[int], None]
) -> None:
    got: list[socket.socket] = []
    asked: list[int] = []
    acceptor = Acceptor(listening, got.append, lambda: len(got) < 2, lambda: asked.append(len(got)))
    acceptor.start()
    callers(2)
    await until(lambda: len(got) == 2)
    await asyncio.sleep(0.02)
    assert asked == []  # full, but nobody waits
    callers(1)
    await until(lambda: asked == [2])
    await asyncio.sleep(0.02)
    assert asked == [2]  # asked once, not in a loop
    got.pop().close()
    acceptor.resume()
    await until(lambda: len(got) == 2)
    acceptor.close()
    acceptor.resume()
    for sock in got:
        sock.close()


class Exhausted(socket.socket):
    """A listening socket in a process that ran out of descriptors."""

    tries = 0
    error = errno.EMFILE

    def accept(self) -> tuple[socket.socket, object]:
        self.tries += 1
        if self.error:
            raise OSError(self.error, os.strerror(self.error))
        return super().accept()


@pytest.mark.bears("W11")
async def test_without_descriptors_it_rests_instead_of_spinning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "REST", 0.05)
    got: list[socket.socket] = []
    with Exhausted(socket.AF_INET) as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        acceptor = Acceptor(listening, got.append, lambda: True)
        acceptor.start()
        with socket.create_connection(listening.getsockname()):
            await asyncio.sleep(0.22)
            assert 2 <= listening.tries <= 6
            acceptor.resume()  # a connection that ends does not cut the rest short
            listening.error = 0
            await until(lambda: len(got) == 1)
        acceptor.close()
        got[0].close()


async def test_a_connection_that_failed_before_it_was_taken_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    got: list[socket.socket] = []
    with Exhausted(socket.AF_INET) as listening:
        listening.error = errno.EPROTO
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        acceptor = Acceptor(listening, got.append, lambda: True)
        acceptor.start()
        with socket.create_connection(listening.getsockname()):
            await until(lambda: listening.tries > 0)
            listening.error = 0
            await until(lambda: len(got) == 1)
        acceptor.close()
        got[0].close()


def test_the_soft_limit_is_lifted_to_the_hard_one() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, 512), hard))
    try:
        assert raise_file_limit() == hard
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
