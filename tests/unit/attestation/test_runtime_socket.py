"""What is taken from a runtime's socket, and what ends the conversation."""

import asyncio
import json
import os
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import repeat
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from broker.attestation.contract import AttestorFailed
from broker.attestation.runtime_socket import MAX_ANSWER, NotThere, RuntimeSocket
from tests.fakes.runtime import FakeRuntime, answer, chunked, inspected

GOOD = json.dumps(inspected("0" * 64, Labels={"a": "b" * 3000})).encode()


@pytest.fixture(scope="module")
def shared():
    with FakeRuntime() as fake:
        yield fake


@pytest.fixture
def runtime(shared):
    yield shared
    shared.faults.clear()
    shared.requests.clear()


def get(runtime: FakeRuntime, seconds: float = 30.0, *, prefix: str = "") -> bytes:
    return asyncio.run(asked(RuntimeSocket(str(runtime.path), os.geteuid(), prefix), seconds))


async def asked(runtime: RuntimeSocket, seconds: float = 30.0) -> bytes:
    async with asyncio.timeout(seconds):
        return await runtime.get("/containers/x/json")


def reason(runtime: FakeRuntime) -> str:
    with pytest.raises(AttestorFailed) as refused:
        get(runtime)
    return refused.value.reason


def is_late(runtime: FakeRuntime, seconds: float) -> bool:
    with pytest.raises(TimeoutError):
        get(runtime, seconds)
    return True


def test_an_answer(runtime) -> None:
    runtime.fault(answer(GOOD))
    assert get(runtime) == GOOD
    runtime.faults.clear()
    runtime.fault(chunked(GOOD), "/v1.43/")
    assert get(runtime, prefix="/v1.43") == GOOD
    assert runtime.requests == ["/containers/x/json", "/v1.43/containers/x/json"]


def test_nothing_there(runtime) -> None:
    with pytest.raises(NotThere):
        get(runtime)


@pytest.mark.bears("A16")
@pytest.mark.parametrize(
    "frame",
    [answer, chunked, lambda body: b"HTTP/1.0 200 OK\r\n\r\n" + body],
    ids=["length", "chunks", "until the end"],
)
def test_an_answer_has_a_limit(runtime, frame) -> None:
    runtime.fault(frame(b"x" * MAX_ANSWER))
    assert len(get(runtime)) == MAX_ANSWER
    runtime.fault(frame(b"x" * (MAX_ANSWER + 1)))
    assert reason(runtime) == "runtime_answer"
    runtime.fault(frame(b"x" * (2 * MAX_ANSWER)))
    assert reason(runtime) == "runtime_answer"


@pytest.mark.bears("A16")
def test_a_deadline_holds_for_the_whole(runtime) -> None:
    started = time.monotonic()
    runtime.hang()
    assert is_late(runtime, 0.1)
    runtime.drip(iter([b"HTTP/1.1 200 OK\r\n\r\n", *repeat(b" ", 1000)]), 0.02)
    assert is_late(runtime, 0.2)
    runtime.drip(iter([b"HTTP/1.1 200 OK\r\n", *repeat(b"A: b\r\n", 1000)]), 0.02)
    assert is_late(runtime, 0.2)
    assert time.monotonic() - started < 15


def test_what_nobody_waits_for_any_more_is_hung_up() -> None:
    with listening() as (path, listener):

        async def given_up() -> None:
            asking = asyncio.create_task(asked(RuntimeSocket(str(path), os.geteuid())))
            loop = asyncio.get_running_loop()
            accepted, _ = await loop.sock_accept(listener)
            with accepted:
                assert await loop.sock_recv(accepted, 1024)
                asking.cancel()
                assert await loop.sock_recv(accepted, 1024) == b""
            assert asking.cancelled()

        asyncio.run(given_up())


def test_a_runtime_whose_queue_is_full_is_waited_for() -> None:
    with listening(queue=0) as (path, listener), socket.socket(socket.AF_UNIX) as before:
        before.connect(str(path))

        async def waited() -> bytes:
            asking = asyncio.create_task(asked(RuntimeSocket(str(path), os.geteuid())))
            await asyncio.sleep(0)
            loop = asyncio.get_running_loop()
            for reply in (b"", answer(GOOD)):
                accepted, _ = await loop.sock_accept(listener)
                with accepted:
                    await loop.sock_sendall(accepted, reply)
            return await asking

        assert asyncio.run(waited()) == GOOD


def test_only_the_first_answer_counts(runtime) -> None:
    runtime.fault(answer(GOOD) + answer(b"{}", "500 Later"))
    assert get(runtime) == GOOD
    runtime.fault(answer(b"{}", "500 First") + answer(GOOD))
    assert reason(runtime) == "runtime_answer"
    runtime.fault(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n" + answer(GOOD))
    assert reason(runtime) == "runtime_answer"


@pytest.mark.parametrize(
    ("raw", "code"),
    [
        (b"", "runtime_unreachable"),
        (b"HTTP/1.1 200 OK\r\n", "runtime_unreachable"),
        (answer(GOOD)[:-1], "runtime_unreachable"),
        (chunked(GOOD)[:-5], "runtime_unreachable"),
        (b"HTTP/1.1 100 Continue\r\n\r\n", "runtime_unreachable"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n{}", "runtime_unreachable"),
    ],
    ids=["nothing", "half a head", "a length", "chunks", "continue", "two lengths"],
)
def test_an_answer_that_is_cut_short_is_none(runtime, raw: bytes, code: str) -> None:
    runtime.fault(raw)
    assert reason(runtime) == code


@contextmanager
def listening(queue: int = 8) -> Iterator[tuple[Path, socket.socket]]:
    with tempfile.TemporaryDirectory(dir="/tmp") as directory, socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{directory}/s")
        listener.listen(queue)
        listener.setblocking(False)
        yield Path(directory) / "s", listener


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.one_of(
        st.binary(max_size=300),
        st.binary(max_size=200).map(lambda body: b"HTTP/1.1 200 OK\r\n" + body),
        st.binary(max_size=200).map(lambda body: b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + body),
        st.tuples(st.integers(0, 120), st.binary(max_size=4)).map(lambda at: chunked(GOOD)[: at[0]] + at[1] + chunked(GOOD)[at[0] :]),
    )
)  # fmt: skip
def test_any_answer_is_taken_or_refused(runtime, raw: bytes) -> None:
    runtime.fault(raw)
    with suppress(AttestorFailed, NotThere):
        assert len(get(runtime)) <= MAX_ANSWER
