"""TLS on one socket, with a context of its own and a deadline, from either side. Judges nobody.

asyncio's ``ssl=`` argument is not used: what is cancelled there between connect and handshake stays open until its
own time-out, and its buffers are made for few connections.
"""

import asyncio
import ipaddress
import socket
import ssl
from asyncio import sslproto
from collections.abc import Awaitable, Callable
from typing import Any

SHUTDOWN_DEADLINE = 3.0  # seconds for a peer to answer our close_notify
HAPPY_EYEBALLS = 0.25  # seconds before the next address of a name is tried beside the first (RFC 8305 section 5)

_BY_NAME: dict[str, Any] = {"happy_eyeballs_delay": HAPPY_EYEBALLS}

_Open = Callable[[Callable[[], asyncio.BaseProtocol]], Awaitable[tuple[asyncio.Transport, Any]]]


class _SmallBuffers(sslproto.SSLProtocol):
    """asyncio's TLS with 16 KiB (one TLS record) for reading instead of 256 KiB: ten thousand idle peers are normal."""

    max_size = 16 * 1024


async def accept_tls(
    accepted: socket.socket, gate: asyncio.Protocol, context: ssl.SSLContext, *, deadline: float
) -> None:
    """Make the server's side of a handshake; ``gate`` gets the TLS transport when it is done, before any data.

    Raises OSError (ssl.SSLError among them) when it fails or takes longer than ``deadline`` seconds; the socket is
    closed then.
    """
    loop = asyncio.get_running_loop()
    await _shake(
        lambda factory: loop.connect_accepted_socket(factory, accepted), gate, context, deadline=deadline, server=True
    )


async def connect_tls(
    host: str, port: int, gate: asyncio.Protocol, context: ssl.SSLContext, *, deadline: float
) -> None:
    """Connect and make the client's side of a handshake; ``gate`` as in :func:`accept_tls`.

    Raises OSError when it fails or takes longer than ``deadline`` seconds altogether.
    """
    loop = asyncio.get_running_loop()
    # uvloop, which applications may bring, does not know the option.
    options: dict[str, Any] = {} if _is_address(host) or not isinstance(loop, asyncio.BaseEventLoop) else _BY_NAME
    async with asyncio.timeout(deadline):
        await _shake(
            lambda factory: loop.create_connection(factory, host, port, **options),
            gate,
            context,
            deadline=deadline,
            name=host,
        )


async def _shake(
    connect: _Open,
    gate: asyncio.Protocol,
    context: ssl.SSLContext,
    *,
    deadline: float,
    server: bool = False,
    name: str | None = None,
) -> None:
    loop = asyncio.get_running_loop()
    done = loop.create_future()

    def make() -> asyncio.BaseProtocol:
        return _SmallBuffers(
            loop,
            gate,
            context,
            done,
            server_side=server,
            server_hostname=name,
            ssl_handshake_timeout=deadline,  # type: ignore[arg-type]  # typeshed says int, asyncio takes any number
            ssl_shutdown_timeout=SHUTDOWN_DEADLINE,
        )

    transport, _ = await connect(make)
    try:
        await done
    except BaseException:
        transport.abort()
        raise


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
