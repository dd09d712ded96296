"""Counting costly frames, however they are cut into chunks."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.errors import Refused
from broker.transport.flood import (
    CONTROL_BURST,
    LARGE_BLOCK,
    LARGE_BURST,
    MAX_CONTINUATIONS,
    MAX_HEADER_BLOCK,
    MAX_SENDING,
    PREFACE,
    RESET_BURST,
    RESET_RATE,
    WINDOW_BURST,
    FrameMeter,
)

DATA, HEADERS, PRIORITY, RST, SETTINGS, PING, WINDOW, CONTINUATION = 0, 1, 2, 3, 4, 6, 8, 9


def frame(kind: int, length: int = 4, flags: int = 0, stream: int = 1) -> bytes:
    return length.to_bytes(3, "big") + bytes((kind, flags)) + stream.to_bytes(4, "big") + b"z" * length


OPENED = PREFACE + frame(HEADERS)


def calls(number: int, *rest: tuple[int, ...]) -> bytes:
    """So many streams, one after the other, each with these frames behind its headers."""
    streams = range(3, 2 * number + 3, 2)
    return b"".join(
        frame(HEADERS, stream=stream) + b"".join(frame(*one, stream=stream) for one in rest) for stream in streams
    )


def refusal(meter: FrameMeter, data: bytes) -> str:
    with pytest.raises(Refused) as caught:
        meter(data)
    return caught.value.reason


class Hand:
    """A clock that is moved by hand."""

    time = 0.0

    def __call__(self) -> float:
        return self.time


def test_honest_traffic_passes() -> None:
    meter = FrameMeter(Hand())
    meter(OPENED + frame(WINDOW, stream=0))
    meter(calls(5 * RESET_BURST, (DATA, 16384), (WINDOW,), (DATA, 0, 1)))


@pytest.mark.bears("W07")
@pytest.mark.parametrize("kind", [SETTINGS, PING, PRIORITY, DATA, 0xFF])
def test_a_flood_of_frames_that_do_nothing_is_cut(kind: int) -> None:
    meter = FrameMeter(Hand())
    meter(OPENED + frame(kind, 0) * CONTROL_BURST)
    assert refusal(meter, frame(kind, 0)) == "http2_flood"


@pytest.mark.bears("W07")
def test_rapid_resets_are_cut_and_slow_ones_are_not() -> None:
    hand = Hand()
    meter = FrameMeter(hand)
    meter(OPENED + calls(RESET_BURST, (RST,)))
    hand.time = 1.0
    meter(frame(RST) * int(RESET_RATE))
    assert refusal(meter, frame(RST)) == "http2_flood"


@pytest.mark.bears("W07")
def test_windows_opened_without_end_are_cut() -> None:
    meter = FrameMeter(Hand())
    meter(OPENED + frame(WINDOW) * WINDOW_BURST)
    assert refusal(meter, frame(WINDOW)) == "http2_flood"


@pytest.mark.bears("W07")
def test_a_header_block_without_end_is_cut() -> None:
    meter = FrameMeter(Hand())
    meter(OPENED + frame(CONTINUATION, 0) * MAX_CONTINUATIONS)
    assert refusal(meter, frame(CONTINUATION, 0)) == "http2_flood"


@pytest.mark.bears("W06", "W07")
def test_a_header_block_is_bounded_over_all_its_frames() -> None:
    meter = FrameMeter(Hand())
    half = MAX_HEADER_BLOCK // 2
    meter(PREFACE + frame(HEADERS, half, stream=1) + frame(CONTINUATION, half))
    meter(frame(HEADERS, half, stream=3) + frame(CONTINUATION, half))  # each block by itself
    assert refusal(meter, frame(CONTINUATION, 1)) == "http2_flood"


@pytest.mark.bears("W07")
def test_large_header_blocks_are_for_once_in_a_while() -> None:
    meter = FrameMeter(Hand())
    meter(PREFACE + b"".join(frame(HEADERS, LARGE_BLOCK + 1, stream=2 * n + 1) for n in range(LARGE_BURST)))
    meter(frame(HEADERS, LARGE_BLOCK, stream=1001))  # as large as is usual
    assert refusal(meter, frame(CONTINUATION, 1)) == "http2_flood"  # now it is larger


@pytest.mark.bears("W07")
@pytest.mark.parametrize(
    "data",
    [
        frame(HEADERS, stream=1), frame(HEADERS, stream=2), frame(HEADERS, stream=0), calls(2) + frame(HEADERS, stream=3),
        frame(RST, stream=3), frame(RST, stream=0), frame(DATA, stream=3), frame(DATA, stream=0), frame(WINDOW, stream=5),
        calls(1) + frame(RST, stream=2),
    ],
)  # fmt: skip
def test_streams_are_opened_once_in_order_and_before_they_are_used(data: bytes) -> None:
    meter = FrameMeter(Hand())
    meter(OPENED)
    assert refusal(meter, data) == "http2_violation"


@pytest.mark.bears("W07")
@pytest.mark.parametrize("end", [frame(RST), frame(DATA, 0, 1), frame(DATA, 5, 1)])
def test_nothing_is_sent_on_a_stream_that_its_sender_has_ended(end: bytes) -> None:
    meter = FrameMeter(Hand())
    meter(OPENED + frame(DATA, 9) + end)
    assert refusal(meter, frame(DATA, 9)) == "http2_violation"
    meter = FrameMeter(Hand())
    meter(PREFACE + frame(HEADERS, flags=1, stream=1))
    assert refusal(meter, frame(DATA, 9)) == "http2_violation"


def test_a_stream_that_was_forgotten_is_not_held_against_anybody() -> None:
    meter = FrameMeter(Hand())
    meter(OPENED + calls(MAX_SENDING + 5))
    assert len(meter._sending) == MAX_SENDING
    meter(frame(DATA, 9, stream=1) + frame(DATA, 9, stream=2 * MAX_SENDING + 1))


def test_the_reserved_bit_of_a_stream_means_nothing() -> None:
    meter = FrameMeter(Hand())
    meter(OPENED + frame(DATA, 1, stream=1 | 1 << 31))


@pytest.mark.bears("W12")
@pytest.mark.parametrize("garbage", [b"GET / HTTP/1.1\r\n", b"\x16\x03\x01", b"\0", PREFACE[:-1] + b"x"])
def test_what_does_not_speak_http2_is_cut_at_its_first_wrong_byte(garbage: bytes) -> None:
    assert refusal(FrameMeter(Hand()), garbage) == "not_http2"
    meter = FrameMeter(Hand())
    for byte in garbage[:-1]:
        if not PREFACE.startswith(garbage[:1]):
            break
        meter(bytes((byte,)))
    assert refusal(meter, garbage[-1:] if PREFACE.startswith(garbage[:1]) else garbage) == "not_http2"


@given(
    st.lists(st.tuples(st.sampled_from([DATA, HEADERS, RST, PING, CONTINUATION]), st.integers(0, 40)), max_size=30),
    st.lists(st.integers(1, 50), min_size=1, max_size=40),
)
def test_where_chunks_are_cut_does_not_matter(frames: list[tuple[int, int]], cuts: list[int]) -> None:
    stream = OPENED + b"".join(
        frame(*one, stream=number if one[0] == HEADERS else 1)
        for number, one in zip(range(3, 1000, 2), frames, strict=False)
    )
    whole, cut = FrameMeter(Hand()), FrameMeter(Hand())

    def feed(meter: FrameMeter, chunks: list[bytes]) -> object:
        try:
            for chunk in chunks:
                meter(chunk)
        except Refused:
            return "cut"
        return meter._resets._left, meter._controls._left, meter._continuations, meter._block, meter._opened

    pieces, position, turn = [], 0, 0
    while position < len(stream):
        size = cuts[turn % len(cuts)]
        pieces.append(stream[position : position + size])
        position, turn = position + size, turn + 1
    assert feed(whole, [stream]) == feed(cut, pieces)
