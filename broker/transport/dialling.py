"""HTTP connections that are not left behind when whoever dials is cancelled.

The client library closes a connection whose TLS handshake fails. One whose handshake is cancelled (a time limit, a program that
stops) it drops as it is: the socket then stays open until the garbage collector finds it.
"""

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, TypeAlias

Trace: TypeAlias = Callable[[str, Mapping[str, Any]], Awaitable[None]]
"""What httpx2 calls for each step of a request, as its extension ``trace``."""


@asynccontextmanager
async def dialling(inner: Trace | None = None) -> AsyncIterator[Trace]:
    """Give the ``trace`` of the one request in the block; ``inner`` is told every step, too.

    Left by an error or a cancellation, the block closes a connection that was still being made.
    """
    half_open: list[Any] = []

    async def traced(event: str, facts: Mapping[str, Any]) -> None:
        if event == "connection.connect_tcp.complete":
            half_open[:] = [facts["return_value"]]
        elif event == "connection.start_tls.complete":
            half_open.clear()
        if inner is not None:
            await inner(event, facts)

    try:
        yield traced
    except BaseException:
        for stream in half_open:
            await stream.aclose()
        raise
