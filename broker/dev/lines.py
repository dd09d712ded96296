"""How the demo talks with its processes: one JSON object a line, on standard input and output."""

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Mapping
from typing import Any

MAX_LINE = 1 << 20
"""Bytes: an answer with a token and its claims has a few thousand."""


def say(message: Mapping[str, Any]) -> None:
    """Write one line."""
    sys.stdout.write(json.dumps(message) + "\n")
    sys.stdout.flush()


async def heard() -> AsyncIterator[Mapping[str, Any]]:
    """Give each line of standard input until it ends."""
    reader = await _stdin()
    while line := await reader.readline():
        yield json.loads(line)


async def stdin_closed() -> None:
    """Wait until whoever started this process has closed its standard input, or is gone."""
    reader = await _stdin()
    while await reader.readline():
        pass


async def _stdin() -> asyncio.StreamReader:
    reader = asyncio.StreamReader(limit=MAX_LINE)
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    return reader
