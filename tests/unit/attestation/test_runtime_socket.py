"""What is taken from a runtime's socket, and what ends the conversation."""

import json
import os
import time
from contextlib import suppress
from itertools import repeat

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from broker.attestation.contract import AttestorFailed
from broker.attestation.runtime_socket import MAX_ANSWER, Deadline, NotThere, RuntimeSocket
from broker.clock import SystemClock
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


def get(runtime: FakeRuntime, seconds: float = 5.0, *, gone: bool = False, prefix: str = "") -> bytes:
    deadline = Deadline(SystemClock().monotonic() + seconds, lambda: gone)
    return RuntimeSocket(str(runtime.path), os.geteuid(), prefix).get("/containers/x/json", deadline)


def reason(runtime: FakeRuntime, **options) -> str:
    with pytest.raises(AttestorFailed) as refused:
        get(runtime, **options)
    return refused.value.reason


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
    assert reason(runtime, seconds=0.1) == "attestor_timeout"
    runtime.drip(iter([b"HTTP/1.1 200 OK\r\n\r\n", *repeat(b" ", 1000)]), 0.02)
    assert reason(runtime, seconds=0.2) == "attestor_timeout"
    runtime.drip(iter([b"HTTP/1.1 200 OK\r\n", *repeat(b"A: b\r\n", 1000)]), 0.02)
    assert reason(runtime, seconds=0.2) == "attestor_timeout"
    assert time.monotonic() - started < 3


def test_nobody_waits_any_more(runtime) -> None:
    assert reason(runtime, gone=True) == "attestor_timeout"
    assert runtime.requests == []


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
