"""Writes of one turn of the loop leave as one, in order, and none is lost at the end."""

import asyncio
from typing import Any

import pytest
from typing_extensions import override

from broker.transport import joining
from broker.transport.joining import JoinedWrites

pytestmark = pytest.mark.asyncio


class Wire(asyncio.Transport):
    """What leaves, write by write."""

    def __init__(self) -> None:
        super().__init__({"peername": ("127.0.0.1", 1)})
        self.sent: list[bytes] = []
        self.calls: list[str] = []
        self.protocol: Any = None

    @override
    def write(self, data: bytes | bytearray | memoryview) -> None:
        assert not self.calls, "closed already"
        self.sent.append(bytes(data))

    @override
    def close(self) -> None:
        self.calls.append("close")

    @override
    def abort(self) -> None:
        self.calls.append("abort")

    @override
    def is_closing(self) -> bool:
        return bool(self.calls)

    @override
    def pause_reading(self) -> None:
        self.calls.append("pause")

    @override
    def resume_reading(self) -> None:
        self.calls.append("resume")

    @override
    def get_write_buffer_size(self) -> int:
        return 100


@pytest.fixture
def wire() -> Wire:
    return Wire()


@pytest.fixture
async def joined(wire: Wire) -> JoinedWrites:
    return JoinedWrites(wire, asyncio.get_running_loop())


async def test_pieces_of_one_turn_are_one(wire: Wire, joined: JoinedWrites) -> None:
    joined.write(b"head ")
    joined.writelines([b"bo", bytearray(b"d"), memoryview(b"y")])
    assert (wire.sent, joined.get_write_buffer_size()) == ([], 109)
    await asyncio.sleep(0)
    assert wire.sent == [b"head body"]
    joined.write(b"next")
    await asyncio.sleep(0)
    assert wire.sent == [b"head body", b"next"]


async def test_flushing_sends_at_once_and_nothing_twice(wire: Wire, joined: JoinedWrites) -> None:
    joined.write(b"a")
    joined.flush()
    joined.flush()
    joined.write(b"b")
    assert wire.sent == [b"a"]
    await asyncio.sleep(0)
    assert wire.sent == [b"a", b"b"]


async def test_much_is_not_held_back(wire: Wire, joined: JoinedWrites, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joining, "JOINED_BYTES", 3)
    joined.write(b"abc")
    assert wire.sent == []
    joined.write(b"d")
    assert (wire.sent, joined.get_write_buffer_size()) == ([b"abcd"], 100)


async def test_what_was_written_is_sent_before_the_end(wire: Wire, joined: JoinedWrites) -> None:
    joined.write(b"last")
    joined.close()
    assert (wire.sent, wire.calls, joined.is_closing()) == ([b"last"], ["close"], True)
    await asyncio.sleep(0)
    assert wire.sent == [b"last"]


async def test_an_abort_drops_it(wire: Wire, joined: JoinedWrites) -> None:
    joined.write(b"last")
    joined.abort()
    await asyncio.sleep(0)
    assert (wire.sent, wire.calls) == ([], ["abort"])


async def test_the_rest_is_the_transports_own(wire: Wire, joined: JoinedWrites) -> None:
    assert joined.get_extra_info("peername") == ("127.0.0.1", 1)
    assert joined.get_extra_info("nothing", 7) == 7
    joined.pause_reading()
    joined.resume_reading()
    assert wire.calls == ["pause", "resume"]
