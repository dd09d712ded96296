"""Counting costly frames, however they are cut into chunks."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.errors import Refused
from broker.transport.flood import CONTROL_BURST, MAX_CONTINUATIONS, PREFACE_BYTES, RESET_BURST, RESET_RATE, FrameMeter

DATA, HEADERS, PRIORITY, RST, SETTINGS, PING, WINDOW, CONTINUATION = 0, 1, 2, 3, 4, 6, 8, 9
PREFACE = b"x" * PREFACE_BYTES


def frame(kind: int, length: int = 4, flags: int = 0) -> bytes:
    return length.to_bytes(3, "big") + bytes((kind, flags)) + b"\0\0\0\1" + b"z" * length


class Hand:
    """A clock that is moved by hand."""

    time = 0.0

    def __call__(self) -> float:
        return self.time


def test_honest_traffic_passes() -> None:
    meter = FrameMeter(Hand())
    meter(PREFACE)
    for _ in range(5 * RESET_BURST):
        meter(frame(HEADERS) + frame(DATA, 16384) + frame(WINDOW) + frame(DATA, 0, flags=1))


@pytest.mark.bears("W07")
@pytest.mark.parametrize("kind", [SETTINGS, PING, PRIORITY, DATA, 0xFF])
def test_a_flood_of_frames_that_do_nothing_is_cut(kind: int) -> None:
    meter = FrameMeter(Hand())
    meter(PREFACE + frame(kind, 0) * CONTROL_BURST)
    with pytest.raises(Refused) as caught:
        meter(frame(kind, 0))
    assert caught.value.reason == "http2_flood"


@pytest.mark.bears("W07")
def test_rapid_resets_are_cut_and_slow_ones_are_not() -> None:
    hand = Hand()
    meter = FrameMeter(hand)
    meter(PREFACE + (frame(HEADERS) + frame(RST)) * RESET_BURST)
    hand.time = 1.0
    meter((frame(HEADERS) + frame(RST)) * int(RESET_RATE))
    with pytest.raises(Refused):
        meter(frame(RST))


@pytest.mark.bears("W07")
def test_a_header_block_without_end_is_cut() -> None:
    meter = FrameMeter(Hand())
    meter(PREFACE + frame(HEADERS) + frame(CONTINUATION, 16384) * MAX_CONTINUATIONS)
    with pytest.raises(Refused):
        meter(frame(CONTINUATION))


@given(
    st.lists(st.tuples(st.sampled_from([DATA, HEADERS, RST, PING, CONTINUATION]), st.integers(0, 40)), max_size=30),
    st.lists(st.integers(1, 50), min_size=1, max_size=40),
)
def test_where_chunks_are_cut_does_not_matter(frames: list[tuple[int, int]], cuts: list[int]) -> None:
    stream = PREFACE + b"".join(frame(*one) for one in frames)
    whole, cut = FrameMeter(Hand()), FrameMeter(Hand())

    def feed(meter: FrameMeter, chunks: list[bytes]) -> object:
        try:
            for chunk in chunks:
                meter(chunk)
        except Refused:
            return "cut"
        return meter._resets._left, meter._controls._left, meter._continuations

    pieces, position, turn = [], 0, 0
    while position < len(stream):
        size = cuts[turn % len(cuts)]
        pieces.append(stream[position : position + size])
        position, turn = position + size, turn + 1
    assert feed(whole, [stream]) == feed(cut, pieces)
