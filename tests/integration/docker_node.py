"""A node whose agent has the docker attestor, before its server, as processes of their own: what docker tests stand on."""

import asyncio
import json
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

from broker._proto.broker.server.v1 import entries_pb2
from broker._proto.spire.api.types import entry_pb2, selector_pb2
from broker.client import Entries, dial_socket
from broker.client.calls import spiffe_id_message
from broker.dev.configuration import NODE_ALIAS, TRUST_DOMAIN, Plan
from broker.dev.estate import Estate
from broker.spiffe import SpiffeId

CLIENT = "tests.fakes.workload_client"


class Node:
    """An estate, its operator, and its callers."""

    def __init__(self, estate: Estate) -> None:
        self.estate = estate

    @property
    def socket(self) -> Path:
        return self.estate.layout.agent_socket

    async def register(self, path: str, *selectors: str) -> str:
        """Register an entry; give the identity."""
        identity = f"spiffe://{TRUST_DOMAIN}{path}"
        channel = dial_socket(self.estate.layout.server_socket)
        try:
            entry = entry_pb2.Entry(
                spiffe_id=spiffe_id_message(SpiffeId(identity)),
                parent_id=spiffe_id_message(SpiffeId(NODE_ALIAS)),
                selectors=[
                    selector_pb2.Selector(type=kind, value=value)
                    for kind, _, value in (one.partition(":") for one in selectors)
                ],
            )
            await Entries(channel).create(entries_pb2.RegisteredEntry(entry=entry))
        finally:
            await channel.close()
        return identity


class Asking:
    """A process of this host that asks for its identities as often as it is told to."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self.pid = process.pid

    async def fetch(self) -> dict:
        """What it is given on a new connection."""
        self._process.stdin.write(b"{}\n")
        return json.loads(await asyncio.wait_for(self._process.stdout.readline(), 40))


@asynccontextmanager
async def asking(socket: Path) -> AsyncIterator[Asking]:
    """Start one; it has not connected yet."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", CLIENT, "fetch-each", str(socket), stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )  # fmt: skip
    try:
        yield Asking(process)
    finally:
        process.kill()
        process.stdin.close()
        await process.wait()


@contextmanager
def node_with_docker(socket: Path) -> Iterator[Node]:
    """Start server and agent; the agent asks the runtime at ``socket``."""
    directory = Path(tempfile.mkdtemp(dir="/tmp"))
    docker = {"docker_socket_path": f"unix://{socket}", "podman_socket_path": ""}
    estate = Estate(directory, plan=Plan(first_identity_wait="300ms", workload_attestors={"docker": docker}))
    try:
        asyncio.run(estate.up(lambda line: None))
        yield Node(estate)
    finally:
        estate.down()
        shutil.rmtree(directory)
