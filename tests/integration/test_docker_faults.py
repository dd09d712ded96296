"""A container runtime that answers wrongly, seen from the sockets of a real agent, with callers in real control groups."""

import asyncio
import json
import os
import secrets
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from itertools import repeat
from pathlib import Path

import pytest

from tests.fakes.runtime import FakeRuntime, answer, inspected
from tests.integration.control_groups import made
from tests.integration.docker_node import Node, asking, node_with_docker

pytestmark = [pytest.mark.root("control groups of a container runtime"), pytest.mark.timeout(120)]

MINE, OTHER = secrets.token_hex(32), secrets.token_hex(32)
MEBIBYTE = 1 << 20
LONGEST = 5.0  # seconds that an attestation may take
SLOW_MACHINE = 3.0


class Place:
    """One caller in a container that the runtime knows, one in none, and the runtime."""

    def __init__(self, runtime: FakeRuntime, mine, bystander, orders: str, host: str) -> None:
        self.runtime, self.mine, self.bystander, self.orders, self.host = runtime, mine, bystander, orders, host
        runtime.containers[MINE] = self.inspected()
        # Another tenant's, with a right that the caller must not come by.
        runtime.containers[OTHER] = inspected(OTHER, pid=1, Labels={"app": "payments"})

    def inspected(self, **changes: object) -> dict:
        return inspected(MINE, pid=self.mine.pid, Labels={"app": "orders"}) | changes

    def state(self, **changes: object) -> bytes:
        state = self.inspected()["State"] | changes
        return answer(json.dumps(self.inspected(State=state)).encode())


@pytest.fixture(scope="module")
def runtime() -> Iterator[FakeRuntime]:
    with FakeRuntime() as fake:
        yield fake


@pytest.fixture(scope="module")
def node(runtime) -> Iterator[Node]:
    with node_with_docker(runtime.path) as running:
        for path, selector in (("/orders", "app:orders"), ("/payments", "app:payments")):
            asyncio.run(running.register(path, f"docker:label:{selector}"))
        asyncio.run(running.register("/host", f"unix:uid:{os.geteuid()}"))
        yield running


@pytest.fixture
async def place(node, runtime) -> AsyncIterator[Place]:
    with made(f"/docker/{MINE}") as group:
        async with asking(node.socket) as mine, asking(node.socket) as bystander:
            (group / "cgroup.procs").write_text(str(mine.pid))
            yield Place(runtime, mine, bystander, "spiffe://dev.test/orders", "spiffe://dev.test/host")
            runtime.faults.clear()


def _raw(make):
    """A fault that is an answer."""

    @contextmanager
    def during(place: Place) -> Iterator[None]:
        place.runtime.fault(make(place))
        yield

    return during


@contextmanager
def _silent(place: Place) -> Iterator[None]:
    # Nothing for longer than the 30 seconds that were asked for: until the test ends.
    place.runtime.hang()
    yield


@contextmanager
def _endless(place: Place) -> Iterator[None]:
    sent = 0

    def pieces() -> Iterator[bytes]:
        nonlocal sent
        yield b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % (100 * MEBIBYTE)
        for piece in repeat(b" " * (1 << 16), 1600):
            yield piece
            sent += len(piece)

    place.runtime.faults["/containers/"] = pieces
    yield
    assert sent < 4 * MEBIBYTE  # the rest was never read


@contextmanager
def _redirect(place: Place) -> Iterator[None]:
    place.runtime.faults[f"/containers/{MINE}"] = lambda: iter(
        [f"HTTP/1.1 307 Moved\r\nLocation: /containers/{OTHER}/json\r\nContent-Length: 0\r\n\r\n".encode()]
    )
    yield
    assert not any(OTHER in path for path in place.runtime.requests)  # not followed


@contextmanager
def _moved(place: Place, put) -> Iterator[None]:
    """Something else lies where the runtime's socket was."""
    path = place.runtime.path
    real = path.rename(path.with_name("real"))
    try:
        put(path, real)
        yield
    finally:
        path.unlink()
        real.rename(path)


@contextmanager
def _symlink(place: Place) -> Iterator[None]:
    with _moved(place, lambda path, real: path.symlink_to(real)):
        yield


@contextmanager
def _file(place: Place) -> Iterator[None]:
    def put(path: Path, real: Path) -> None:
        path.touch()
        os.chown(path, 4002, 4002)

    with _moved(place, put):
        yield


@contextmanager
def _owned(place: Place) -> Iterator[None]:
    os.chown(place.runtime.path, 4002, 4002)
    try:
        yield
    finally:
        os.chown(place.runtime.path, 0, 0)


FAULTS = {
    "silence": _silent,  # first: the bystander is attested for the first time during it
    "500": _raw(lambda place: answer(b'{"message":"oops"}', "500 Internal Server Error")),
    "404": _raw(lambda place: answer(b'{"message":"No such container"}', "404 Not Found")),
    "half JSON": _raw(lambda place: answer(json.dumps(place.inspected()).encode()[:200])),
    "100 MiB": _endless,
    "redirect": _redirect,
    "another container": _raw(lambda place: answer(json.dumps(place.runtime.containers[OTHER]).encode())),
    "not running": _raw(lambda place: place.state(Running=False)),
    "pid 0": _raw(lambda place: place.state(Pid=0)),
    "pid of another control group": _raw(lambda place: place.state(Pid=1)),
    "socket is a symlink": _symlink,
    "socket of another user": _owned,
    "file of another user": _file,
}


@pytest.mark.bears("A16")
async def test_a_faulty_runtime_refuses_its_own_and_nobody_else(place) -> None:
    """The caller's user alone earns an entry: without its docker selectors it must not come by that either."""
    for name, fault in FAULTS.items():
        place.runtime.faults.clear()
        with fault(place):
            waiting = asyncio.create_task(place.mine.fetch())
            served = await place.bystander.fetch()
            told = await waiting
        assert served.get("ids") == [place.host], name
        assert (told.get("error"), told.get("said")) == ("UNAVAILABLE", "workload attestation failed"), name
        assert told["seconds"] < LONGEST + SLOW_MACHINE, name
    place.runtime.faults.clear()
    assert (await place.mine.fetch())["ids"] == [place.host, place.orders]
