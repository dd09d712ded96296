"""The relay, over real sockets: names, bytes, back-pressure, half-close, abort."""

import asyncio
import hashlib
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from broker.errors import Refused
from broker.transport import splice as splice_module
from broker.transport.backend import Backend
from broker.transport.splice import Splice

NAME = "ab" * 16
MIB = 1024 * 1024
Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], object]


class Spliced:
    """A client socket that is spliced to a served backend."""

    def __init__(self) -> None:
        self.ended: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()
        self.splice: Splice
        self.reader: asyncio.StreamReader
        self.writer: asyncio.StreamWriter
        self.peer: object = None


@asynccontextmanager
async def spliced(
    directory: Path, serve: Serve, watch: Callable[[bytes], None] | None = None
) -> AsyncIterator[Spliced]:
    one = Spliced()
    handlers: list[asyncio.Task[None]] = []

    async def on_connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        handlers.append(asyncio.current_task())
        one.peer = writer.get_extra_info("peername")
        try:
            await serve(reader, writer)
        except ConnectionError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_unix_server(on_connection, directory / "backend")
    ours, theirs = socket.socketpair()
    loop = asyncio.get_running_loop()
    backend = Backend(directory / "backend")
    one.splice = Splice(backend.buffer, one.ended.set_result, watch)
    ours.setblocking(False)
    await loop.connect_accepted_socket(lambda: one.splice.front, ours)
    await backend.join(one.splice, NAME)
    one.reader, one.writer = await asyncio.open_unix_connection(sock=theirs)
    try:
        yield one
    finally:
        one.splice.abort()
        one.writer.close()
        async with asyncio.timeout(30):
            await one.ended
            await asyncio.gather(*handlers, return_exceptions=True)
        server.close()


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while chunk := await reader.read(65536):
        writer.write(chunk)
        await writer.drain()


async def test_the_backend_sees_the_name_and_bytes_go_both_ways(short: Path) -> None:
    async with spliced(short, echo) as one:
        one.writer.write(b"hello")
        assert await one.reader.readexactly(5) == b"hello"
        assert one.peer == b"\0" + NAME.encode()


async def test_bytes_that_come_before_the_backend_is_there_are_kept_in_order(short: Path) -> None:
    got: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        got.set_result(await reader.read())
        writer.close()

    server = await asyncio.start_unix_server(serve, short / "backend")
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    ended: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()
    backend = Backend(short / "backend")
    splice = Splice(backend.buffer, ended.set_result)
    transport, _ = await asyncio.get_running_loop().connect_accepted_socket(lambda: splice.front, ours)
    transport.resume_reading()  # as a loop does that does not heed pause_reading() in connection_made()
    theirs.sendall(b"first ")
    async with asyncio.timeout(30):
        while not splice.front.spoke:
            await asyncio.sleep(0.001)
        assert not transport.is_reading()
        theirs.sendall(b"second")
        theirs.shutdown(socket.SHUT_WR)
        await backend.join(splice, NAME)
        assert await got == b"first second"
        await ended
    theirs.close()
    server.close()


async def test_half_close_of_the_caller_lets_the_answer_come(short: Path) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = await reader.read()  # until the caller's end of file
        writer.write(request[::-1])
        await writer.drain()

    async with spliced(short, answer) as one:
        one.writer.write(b"abc")
        one.writer.write_eof()
        assert await one.reader.read() == b"cba"
        async with asyncio.timeout(30):
            assert await one.ended is None


async def test_half_close_of_the_backend_lets_the_caller_go_on(short: Path) -> None:
    got: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"bye")
        writer.write_eof()
        got.set_result(await reader.read())

    async with spliced(short, greet) as one:
        assert await one.reader.read() == b"bye"
        one.writer.write(b"last words")
        one.writer.write_eof()
        async with asyncio.timeout(30):
            assert await got == b"last words"


async def test_a_caller_that_stays_silent_after_the_backend_ended_is_cut(
    short: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(splice_module, "LINGER", 0.1)

    async def greet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write_eof()
        await reader.read()

    async with spliced(short, greet) as one:
        async with asyncio.timeout(30):
            await one.ended


async def test_abort_ends_both_sides_at_once(short: Path) -> None:
    served: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    async def wait(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        served.set_result(await reader.read())

    async with spliced(short, wait) as one:
        one.splice.abort()
        async with asyncio.timeout(30):
            assert await one.reader.read() == b""
            assert await served == b""
            assert await one.ended is None


async def test_what_the_watch_raises_cuts_and_is_told(short: Path) -> None:
    def watch(chunk: bytes) -> None:
        if b"!" in chunk:
            raise Refused("no", code="http2_flood")

    async with spliced(short, echo, watch) as one:
        one.writer.write(b"fine")
        assert await one.reader.readexactly(4) == b"fine"
        one.writer.write(b"!")
        async with asyncio.timeout(30):
            error = await one.ended
        assert isinstance(error, Refused)
        assert await one.reader.read() == b""


async def test_close_sends_what_is_buffered_first(short: Path) -> None:
    payload = bytes(range(256)) * (MIB // 256)
    sent = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(payload)
        sent.set()
        await writer.drain()

    async with spliced(short, serve) as one:
        await sent.wait()
        got = await one.reader.read()  # the backend closes; nothing of what it wrote may be lost
        assert hashlib.sha256(got).digest() == hashlib.sha256(payload).digest()


@pytest.mark.bears("W09")
async def test_a_hundred_mib_both_ways_past_slow_readers_keep_memory_flat(short: Path) -> None:
    size, chunk = 100 * MIB, bytes(64 * 1024)

    async def pump(writer: asyncio.StreamWriter) -> None:
        for _ in range(size // len(chunk)):
            writer.write(chunk)
            await writer.drain()

    async def drain(reader: asyncio.StreamReader) -> int:
        total = turn = 0
        while total < size and (got := await reader.read(64 * 1024)):
            total += len(got)
            turn += 1
            if turn % 100 == 0:
                await asyncio.sleep(0.002)  # slower than the writer, so that buffers fill
        return total

    served: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def both(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        served.set_result((await asyncio.gather(drain(reader), pump(writer)))[0])

    async with spliced(short, both) as one:
        before = resident()
        peak = 0

        async def watch() -> None:
            nonlocal peak
            while True:
                peak = max(peak, resident() - before)
                await asyncio.sleep(0.01)

        watcher = asyncio.create_task(watch())
        async with asyncio.timeout(50):
            assert await asyncio.gather(served, drain(one.reader), pump(one.writer)) == [size, size, None]
        watcher.cancel()
        assert peak < 16 * MIB


async def test_a_reader_that_never_reads_stops_the_sender(short: Path) -> None:
    async def flood(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            writer.write(bytes(64 * 1024))
            await writer.drain()

    async with spliced(short, flood) as one:
        one.writer.transport.pause_reading()
        front = one.splice.front.transport
        back = one.splice.back.transport
        async with asyncio.timeout(30):
            while back.is_reading():
                await asyncio.sleep(0.005)
        assert front.get_write_buffer_size() <= splice_module.HIGH_WATER + splice_module.CHUNK
