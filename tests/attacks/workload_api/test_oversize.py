"""Requests that are too large, or say that they are (W06): refused at once, by whoever sees it first."""

import time
import zlib

import pytest

from tests.attacks.workload_api.frames import (
    CONTINUATION,
    END_HEADERS,
    HEADERS,
    SECURITY,
    Connection,
    Heard,
    frame,
    message,
    request_headers,
)
from tests.attacks.workload_api.rig import JWT, MIB, SERVICE, Bystander, Rig, unharmed

PATH = SERVICE + "FetchJWTSVID"
GROWTH = 10 * MIB
DEADLINE = 20  # seconds: one, on a machine of one's own


def bomb(mebibytes: int = 256) -> bytes:
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    return b"".join(packer.compress(bytes(MIB)) for _ in range(mebibytes)) + packer.flush()


def begun(connection: Connection, block: bytes) -> int:
    """Open a stream with a header block of any size, in frames of an allowed one."""
    stream, connection.next = connection.next, connection.next + 2
    connection.streams[stream] = Heard()
    pieces = [block[start : start + 16384] for start in range(0, len(block), 16384)]
    connection.send(
        b"".join(
            frame(CONTINUATION if number else HEADERS, END_HEADERS if number == len(pieces) - 1 else 0, stream, piece)
            for number, piece in enumerate(pieces)
        )
    )
    return stream


CASES = {
    "a message of 4 MiB + 1": (SECURITY, message(bytes(4 * MIB + 1)), {8}),
    "200 MiB declared": (SECURITY, message(b"", length=200 * MIB) + bytes(16), {8}),
    "200 MiB sent": (SECURITY, message(bytes(200 * MIB)), {8}),
    "the largest length": (SECURITY, message(b"", length=0xFFFFFFFF) + bytes(16), {8}),
    "compressed without an encoding": (SECURITY, message(JWT, compressed=1), {13}),
    "a gzip bomb of 256 MiB": ((*SECURITY, ("grpc-encoding", "gzip")), message(bomb(), compressed=1), {12}),
    "an encoding nobody knows": ((*SECURITY, ("grpc-encoding", "snappy")), message(JWT, compressed=1), {12, 13}),
    "a thousand metadata keys": ((*SECURITY, *((f"k{n}", "v") for n in range(1000))), message(JWT), {3, 8}),
    "metadata of 20 KiB": ((*SECURITY, ("big", "v" * 20_480)), message(JWT), {3, 8}),
}


@pytest.mark.bears("W06")
@pytest.mark.parametrize("case", CASES)
def test_what_is_too_large_is_refused_with_a_status(agent: Rig, bystander: Bystander, case: str) -> None:
    metadata, body, codes = CASES[case]
    with unharmed(agent, bystander, rss=GROWTH), Connection(agent.socket) as one:
        stream = begun(one, request_headers(PATH, metadata))
        began = time.monotonic()
        one.upload(stream, body)
        assert one.finish(stream).status in codes
        assert time.monotonic() - began < DEADLINE
        # The connection is not to blame for one call: the next is served.
        assert one.call(PATH, JWT).status == 0


@pytest.mark.bears("W06")
@pytest.mark.parametrize("what", ["header", "path"])
def test_a_header_block_of_64_kib_cuts_the_connection(agent: Rig, bystander: Bystander, what: str) -> None:
    large = "v" * 65_536
    block = request_headers(PATH, (*SECURITY, ("big", large))) if what == "header" else request_headers(f"/{large}")
    with unharmed(agent, bystander, rss=GROWTH), Connection(agent.socket) as one:
        began = time.monotonic()
        begun(one, block)
        assert one.wait_closed()
        assert time.monotonic() - began < DEADLINE


@pytest.mark.bears("W06")
def test_what_just_fits_is_served(agent: Rig) -> None:
    with Connection(agent.socket) as one:
        stream = begun(one, request_headers(PATH, (*SECURITY, ("big", "v" * 12_000))))
        one.upload(stream, message(JWT))
        assert one.finish(stream).status == 0
        # 4 MiB are a message: what is wrong with this one is what it says.
        stream = begun(one, request_headers(PATH))
        one.upload(stream, message(bytes(4 * MIB)))
        assert one.finish(stream).status == 3
