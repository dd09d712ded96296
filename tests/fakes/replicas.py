"""Servers in processes of their own over one PostgreSQL, whose leases and waits are seconds where they are a minute."""

import asyncio
import os
import re
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from broker.client import dial_socket
from tests.fakes.small_estate import RunningServer

# As the command runs it, but for how long it waits before it takes another for dead, and its authorities away.
PROGRAM = """
import asyncio, os
from datetime import timedelta
from broker.server.authority import plan, rotation
plan.LEASE = rotation.LEASE = timedelta(seconds=4)
plan.AHEAD, plan.PRUNE_GRACE = timedelta(seconds=2), timedelta(seconds=1)
rotation.CHECK_EVERY = 0.5
from broker.server.app import run
from broker.server.settings import load
asyncio.run(run(load(None, os.environ)))
"""
ROOT = Path(__file__).resolve().parents[2]
READY = re.compile(rb"server_ready.*?port=(\d+)")
START = 60.0  # seconds


class Port:
    """Where a replica listens, as :class:`broker.server.app.Server` says it."""

    def __init__(self, port: int, socket_path: Path) -> None:
        self.port, self.socket_path = port, socket_path


class Replica(RunningServer):
    """A server in a process of its own, and an operator's clients on its admin socket."""

    process: asyncio.subprocess.Process


def environment(home: Path, url: str, **more: str) -> dict[str, str]:
    plain = {name: value for name, value in os.environ.items() if not name.startswith("BROKER_")}
    return plain | {
        "BROKER_SERVER__TRUST_DOMAIN": "example.org",
        "BROKER_SERVER__BIND_ADDRESS": "127.0.0.1",
        "BROKER_SERVER__BIND_PORT": "0",
        "BROKER_SERVER__DATA_DIR": str(home / "data"),
        "BROKER_SERVER__RUNTIME_DIR": str(home / "run"),
        "BROKER_SERVER__STORE__URL": url,
        "BROKER_SERVER__OPERATIONS__ENABLED": "false",
        "BROKER_SERVER__RATELIMIT__ATTESTATION": "false",
        **more,
    }


@asynccontextmanager
async def process(
    directory: Path, name: str, url: str, **more: str
) -> AsyncIterator[tuple[asyncio.subprocess.Process, Path]]:
    """The process, and the file that it writes its log to."""
    home = directory / name
    home.mkdir(exist_ok=True)
    log = home / "log"
    with log.open("wb") as output:
        one = await asyncio.create_subprocess_exec(
            sys.executable, "-c", PROGRAM, env=environment(home, url, **more), stdout=output, stderr=output, cwd=ROOT
        )
    try:
        yield one, log
    finally:
        if one.returncode is None:
            one.kill()
        await one.wait()


@asynccontextmanager
async def replica(directory: Path, name: str, url: str, **more: str) -> AsyncIterator[Replica]:
    """A replica that serves."""
    async with process(directory, name, url, **more) as (started, log):
        async with asyncio.timeout(START):
            while (ready := READY.search(log.read_bytes())) is None:
                assert started.returncode is None, log.read_text(errors="replace")
                await asyncio.sleep(0.05)
        socket = directory / name / "run" / "private" / "api.sock"
        channel = dial_socket(socket)
        one = Replica(Port(int(ready[1]), socket), channel, directory / name)
        one.process = started
        try:
            yield one
        finally:
            await channel.close()
