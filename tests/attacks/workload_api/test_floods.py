"""Frames that cost their sender nothing (W07), and bytes that are no HTTP/2 at all (W12)."""

import os
import random
import struct
import time
from collections.abc import Callable

import pytest

from tests.attacks.workload_api.frames import (
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    GOAWAY,
    HEADERS,
    PING,
    PREFACE,
    PRIORITY,
    RST,
    SETTINGS,
    WIDE,
    WINDOW,
    Connection,
    Heard,
    frame,
    integer,
    literal,
    request_headers,
    settings,
)
from tests.attacks.workload_api.rig import JWT, MIB, SCALE, SERVICE, Bystander, Rig, unharmed, wait_for

pytestmark = pytest.mark.alone("how long others wait is measured")
GROWTH = 64 * MIB
SECONDS = SCALE  # of one attack, connection after connection, so that bystanders live through many of them
BLOCK = request_headers(SERVICE + "FetchX509SVID")


def u32(number: int) -> bytes:
    return struct.pack(">I", number)


def opened(number: int, *behind: Callable[[int], bytes]) -> bytes:
    return b"".join(
        frame(HEADERS, END_HEADERS, stream, BLOCK) + b"".join(one(stream) for one in behind)
        for stream in range(1, 2 * number, 2)
    )


def hpack_bomb() -> bytes:
    """One entry of nearly 4 KiB in the table, then twenty blocks of sixteen thousand references to it each."""
    entry = b"\x40" + integer(1, 7) + b"a" + integer(3900, 7) + b"v" * 3900
    first = frame(HEADERS, END_HEADERS, 1, BLOCK + entry)
    return first + b"".join(frame(HEADERS, END_HEADERS, stream, BLOCK + b"\xbe" * 16_000) for stream in range(3, 43, 2))


def reset(stream: int) -> bytes:
    return frame(RST, 0, stream, u32(8))


FLOODS: dict[str, Callable[[], bytes]] = {
    "rapid reset": lambda: opened(60_000, reset),
    "continuation": lambda: (
        frame(HEADERS, 0, 1, BLOCK)
        + b"".join(frame(CONTINUATION, 0, 1, literal([(f"x{n}", "v" * 16_000)])) for n in range(1_000))
    ),
    "continuation, empty": lambda: frame(HEADERS, 0, 1, BLOCK) + frame(CONTINUATION, 0, 1) * 100_000,
    "settings": lambda: settings((4, 70_000)) * 100_000,
    "settings acknowledged": lambda: frame(SETTINGS, 1, 0) * 100_000,
    "ping": lambda: frame(PING, 0, 0, b"12345678") * 200_000,
    "unknown frames": lambda: frame(0x20, 0, 0, b"x") * 100_000,
    "goaway": lambda: frame(GOAWAY, 0, 0, u32(0) + u32(0)) * 100_000,
    "priority loop": lambda: (
        b"".join(frame(PRIORITY, 0, one, u32(other) + b"\x10") for one, other in ((1, 3), (3, 5), (5, 1))) * 30_000
    ),
    "hpack nonsense": lambda: frame(HEADERS, END_HEADERS, 1, b"\xff" * 8),
    "a stream opened twice": lambda: opened(1) * 2,
    "a stream below the last": lambda: frame(HEADERS, END_HEADERS, 101, BLOCK) + frame(HEADERS, END_HEADERS, 99, BLOCK),
    "a stream of the server's": lambda: frame(HEADERS, END_HEADERS, 2, BLOCK),
    "reset of an idle stream": lambda: reset(99),
    "reset of no stream": lambda: reset(0),
    "data on an idle stream": lambda: frame(DATA, 0, 77, b"x"),
    "data on a closed stream": lambda: opened(1, reset) + frame(DATA, 0, 1, b"x" * 100) * 3_000,
    "empty data": lambda: opened(1) + frame(DATA, 0, 1) * 100_000,
    "data after the end": lambda: opened(60_000, lambda one: frame(DATA, END_STREAM, one) + frame(DATA, 0, one, b"x")),
    "window of zero added": lambda: opened(2_000, lambda one: frame(WINDOW, 0, one, u32(0))),
    "window beyond its limit": lambda: opened(60_000, lambda one: frame(WINDOW, 0, one, u32(WIDE)) * 2),
    "windows without end": lambda: opened(1) + frame(WINDOW, 0, 1, u32(1)) * 200_000,
    "a frame larger than allowed": lambda: opened(1) + frame(DATA, 0, 1, bytes(1 << 23)),
}  # fmt: skip


@pytest.mark.bears("W07")
@pytest.mark.parametrize("flood", FLOODS)
def test_a_flood_is_cut_and_costs_nobody_else_anything(agent: Rig, bystander: Bystander, flood: str) -> None:
    attack = FLOODS[flood]()
    with unharmed(agent, bystander, rss=GROWTH):
        until = time.monotonic() + SECONDS
        while True:
            with Connection(agent.socket, wait=5, window=False) as one:
                one.send(attack)
                assert one.wait_closed(), flood
            if time.monotonic() > until:
                break


@pytest.mark.bears("W07")
def test_an_hpack_bomb_is_cut_or_refused_block_by_block(agent: Rig, bystander: Bystander) -> None:
    attack = hpack_bomb()
    with unharmed(agent, bystander, rss=GROWTH):
        for _ in range(3):
            with Connection(agent.socket, wait=5, window=False) as one:
                blown = [one.streams.setdefault(stream, Heard()) for stream in range(3, 43, 2)]
                one.send(attack)
                assert one.until(lambda one=one, blown=blown: one.closed or all(each.status == 8 for each in blown))


@pytest.mark.bears("W07")
def test_memory_goes_back_after_all_of_them(agent: Rig, bystander: Bystander) -> None:
    start = agent.facts().rss
    for attack in (FLOODS["rapid reset"](), FLOODS["window beyond its limit"](), hpack_bomb()):
        for _ in range(5):
            with Connection(agent.socket, wait=5, window=False) as one:
                one.send(attack)
                one.wait_closed(2)
    wait_for(lambda: agent.facts().rss - start < GROWTH, 30)


GARBAGE: dict[str, Callable[[random.Random], bytes]] = {
    "random": lambda chance: chance.randbytes(chance.randrange(1, 2_000)),
    "http/1.1": lambda _: b"GET / HTTP/1.1\r\nhost: x\r\n\r\n",
    "tls": lambda _: b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500),
    "zeros": lambda _: bytes(65_536),
    "almost a preface": lambda _: PREFACE[:-1] + b"!" + bytes(100),
    "a preface, then noise": lambda chance: PREFACE + settings() + chance.randbytes(500),
}


@pytest.mark.bears("W12")
def test_ten_thousand_connections_of_garbage_are_a_line_of_log_for_each_cause(agent: Rig, bystander: Bystander) -> None:
    chance = random.Random(20261128)
    before = len(agent.said().splitlines())
    began = time.monotonic()
    with unharmed(agent, bystander, rss=GROWTH):
        for number in range(int(10_000 * min(SCALE, 1))):
            name = list(GARBAGE)[number % len(GARBAGE)]
            with Connection(agent.socket, say=GARBAGE[name](chance), wait=10) as one:
                if number % 50 == 0 and name != "a preface, then noise":
                    assert one.wait_closed(), name
    lines = agent.said().splitlines()[before:]
    periods = 2 + (time.monotonic() - began) / 10
    causes = {"not_http2", "http2_violation", "http2_flood"}
    assert {cause for cause in causes if any(cause in line for line in lines)} >= {"not_http2"}
    assert len(lines) <= 2 * len(causes) * periods, lines  # a line, and the number of those not shown
    assert not any("Traceback" in line or '"error"' in line for line in lines)
    assert not any("E1" in line[:2] for line in lines)  # nor does gRPC's core say anything


@pytest.mark.bears("W12")
def test_headers_that_grpc_itself_complains_of_leave_no_line(agent: Rig) -> None:
    before = agent.said()
    with Connection(agent.socket) as one:
        for metadata in ((("grpc-encoding", "gzip"),), (("grpc-timeout", "x"),), (("grpc-encoding", "snappy"),)):
            one.call(SERVICE + "FetchJWTSVID", JWT, (("workload.spiffe.io", "true"), *metadata))
    assert agent.said() == before


def test_the_bystander_sees_an_agent_that_stands_still(agent: Rig, bystander: Bystander) -> None:
    """The control: what every other test asserts is false when it should be."""
    assert agent.process is not None
    bystander.lap()
    os.kill(agent.process.pid, 19)
    try:
        time.sleep(1.5)
    finally:
        os.kill(agent.process.pid, 18)
    # The call that stood still is told of when it is answered.
    wait_for(lambda: max(bystander.lap().warm, default=0) > 1, 30)
