"""How a verb reaches a server or an agent: the admin socket, or mutual TLS as an admin workload (``--addr``).

One event loop per command. Knows no service.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

import grpc
import grpc.aio
from google.protobuf.message import Message

from broker._proto.service import ServiceBinding, Stub
from broker.cli.options import Settings
from broker.client.dial import dial_socket
from broker.errors import BrokerError, Refused, Unavailable
from broker.transport.rpc_errors import from_rpc_error

T = TypeVar("T")

# As broker.sdk.endpoint has it; importing that would load the whole SDK, and a credential helper must answer at once.
SECURITY_HEADER = (("workload.spiffe.io", "true"),)

SERVER_PATH = "/spire/server"
"""The path of a server's own SPIFFE ID, below its trust domain."""


def with_server(settings: Settings, act: Callable[[grpc.aio.Channel], Awaitable[T]]) -> T:
    """Run ``act`` with a channel to the server; give what it gives."""

    async def run() -> T:
        async with server_channel(settings) as channel:
            return await act(channel)

    return asyncio.run(run())


def with_agent(settings: Settings, act: Callable[[grpc.aio.Channel], Awaitable[T]]) -> T:
    """Run ``act`` with a channel to the node agent's workload socket; give what it gives."""

    async def run() -> T:
        async with agent_channel(settings) as channel:
            return await act(channel)

    return asyncio.run(run())


def ask_agent_admin(settings: Settings, method: str, request: Message) -> Any:
    """Make one call on the node agent's admin socket; raises the BrokerError that it means.

    Raises:
        Unavailable: no agent is there.
        Refused: neither root nor the agent's own user.
    """
    from broker._proto.broker.agent.v1 import admin_pb2  # noqa: PLC0415 - the agent's operator alone needs it

    binding = ServiceBinding.of(admin_pb2.DESCRIPTOR, "Admin")

    async def run() -> Any:
        channel = _admin_channel(settings.agent_admin_socket())
        try:
            return await getattr(Stub(channel, binding), method)(request, timeout=settings.timeout)
        except grpc.aio.AioRpcError as error:
            raise from_rpc_error(error) from None
        finally:
            await channel.close()

    return asyncio.run(run())


def _admin_channel(path: str) -> grpc.aio.Channel:
    try:
        return dial_socket(Path(path))
    except Unavailable as error:
        raise Unavailable(
            f"no node agent: {error.message}",
            code=error.reason,
            hint="broker agent run starts one; --socket names its admin socket, private/admin.sock in its runtime_dir",
        ) from None
    except Refused as error:
        raise Refused(error.message, code=error.reason, hint="run this as root, or as the agent's own user") from None


@asynccontextmanager
async def agent_channel(settings: Settings) -> AsyncIterator[grpc.aio.Channel]:
    """Open the workload socket.

    Raises:
        Unavailable: no agent is there.
    """
    path = settings.agent_socket()
    try:
        channel = dial_socket(Path(path))
    except Unavailable as error:
        raise Unavailable(
            f"no node agent: {error.message}",
            code=error.reason,
            hint="broker agent run starts one, broker dev up a whole estate; SPIFFE_ENDPOINT_SOCKET or --socket names it",
        ) from None
    try:
        yield channel
    finally:
        await channel.close()


@asynccontextmanager
async def server_channel(settings: Settings) -> AsyncIterator[grpc.aio.Channel]:
    """Open the server's admin socket; or with ``--addr`` its TLS port, as the identity that this process is given.

    Raises:
        Unavailable: no server is there.
    """
    address = settings.server_address()
    if address:
        async with _admin_workload(settings, address) as channel:
            yield channel
        return
    path = settings.server_socket()
    try:
        channel = dial_socket(Path(path))
    except Unavailable as error:
        raise Unavailable(
            f"no server: {error.message}",
            code=error.reason,
            hint="broker server run starts one, broker dev up a whole estate; BROKER_SERVER_SOCKET or --socket names it",
        ) from None
    try:
        yield channel
    finally:
        await channel.close()


@asynccontextmanager
async def _admin_workload(settings: Settings, address: str) -> AsyncIterator[grpc.aio.Channel]:
    from broker.clock import SystemClock  # noqa: PLC0415 - the slow way alone needs these
    from broker.sdk.workload import Workload  # noqa: PLC0415
    from broker.spiffe import SpiffeId  # noqa: PLC0415
    from broker.transport.dialer import SpiffeDialer  # noqa: PLC0415

    async with Workload.connect(f"unix:{settings.agent_socket()}") as me:
        identity = await me.identity(timeout=settings.timeout)
        expected = SpiffeId.of(identity.id.trust_domain, SERVER_PATH)

        def mine() -> Any:
            return me.current.tls if me.current is not None else None

        dialer = SpiffeDialer(address, identity=mine, bundles=lambda: me.bundles, expect=expected, clock=SystemClock())
        async with dialer as channel:
            yield channel


async def ask_agent(
    channel: grpc.aio.Channel,
    binding: ServiceBinding,
    method: str,
    request: Message,
    *,
    timeout: float,  # noqa: ASYNC109
) -> Any:
    """Make one call on the workload socket, with the metadata that it demands; raises the BrokerError it means."""
    try:
        return await getattr(Stub(channel, binding), method)(request, timeout=timeout, metadata=SECURITY_HEADER)
    except grpc.aio.AioRpcError as error:
        raise from_rpc_error(error) from None


async def first_of(
    channel: grpc.aio.Channel,
    binding: ServiceBinding,
    method: str,
    request: Message,
    *,
    timeout: float,  # noqa: ASYNC109
) -> Any:
    """Give the first message of a stream on the workload socket; raises the BrokerError that its end means."""
    call = getattr(Stub(channel, binding), method)(request, timeout=timeout, metadata=SECURITY_HEADER)
    try:
        async for message in call:
            return message
    except grpc.aio.AioRpcError as error:
        raise from_rpc_error(error) from None
    finally:
        call.cancel()
    raise BrokerError("the agent ended the stream without an answer", code="empty_answer")
