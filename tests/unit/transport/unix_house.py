"""A Unix listener with a real gRPC server behind it, whose callers are known by their pid."""

import asyncio
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from broker._proto.service import handler
from broker._proto.spiffe import workload_pb2
from broker.transport.callers import CallerIndex
from broker.transport.grpc_server import CallGuard, PrivateGrpcServer
from broker.transport.peercred import KernelPeer
from broker.transport.unix_listener import UnixListener
from tests.unit.transport.services import STREAM, UNARY, WORKLOAD, WhoAmI

ASK = workload_pb2.JWTSVIDRequest(audience=["x"])
WATCH = workload_pb2.X509SVIDRequest()
SOURCES = Path(__file__).parents[3]


@dataclass
class House:
    path: Path
    service: WhoAmI = field(default_factory=WhoAmI)
    refusals: list[str] = field(default_factory=list)
    closed: list[int] = field(default_factory=list)
    index: CallerIndex[int] = field(default_factory=CallerIndex)
    listener: UnixListener[int] = field(init=False)

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(30):
            while not condition():
                await asyncio.sleep(0.005)

    def channel(self) -> grpc.aio.Channel:
        return grpc.aio.insecure_channel(f"unix:{self.path}", options=[("grpc.use_local_subchannel_pool", 1)])


@asynccontextmanager
async def house(
    directory: Path,
    admit: Callable[[KernelPeer], int] = lambda peer: peer.pid,
    service: WhoAmI | None = None,
    **options: Any,
) -> AsyncIterator[House]:
    """Callers are known by their pid."""
    one = House(directory / "api.sock", service or WhoAmI())
    guard = CallGuard(one.index, {UNARY: lambda _: None, STREAM: lambda _: None})
    server = PrivateGrpcServer(directory / "private" / "s", [handler(WORKLOAD, one.service, guard)])
    one.listener = UnixListener(
        one.path,
        mode=0o777,
        backend=server.path,
        index=one.index,
        admit=admit,
        on_closed=one.closed.append,
        on_refusal=lambda error, _: one.refusals.append(error.reason),
        **options,
    )
    await server.start()
    await one.listener.start()
    try:
        yield one
    finally:
        await one.listener.stop()
        await server.stop(0)


async def run(*argv: str) -> str:
    process = await asyncio.create_subprocess_exec(*argv, stdout=subprocess.PIPE, cwd=SOURCES)
    out, _ = await process.communicate()
    assert process.returncode == 0
    return out.decode().strip()


async def connect(path: Path) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    return await asyncio.open_unix_connection(path)
