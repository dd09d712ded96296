"""A server with a hundred thousand entries: its memory, how soon it is ready, and what one change costs it."""

import asyncio
import os
import re
import sys
import time
from pathlib import Path
from typing import Self

from broker._proto.broker.server.v1 import entries_pb2
from broker.client import Entries, dial_socket
from broker.dev.programs import program_environment
from broker.spiffe import SpiffeId
from tests.bench.house import House
from tests.bench.measure import Item, cpu_seconds, percentile, within

ENTRIES = 100_000
NODES = 100
BATCH = 500
CHANGES = 100
READY_DEADLINE = 60.0
MEMORY_MIB = 600.0
READY_SECONDS = 10.0
CHANGE_MS = 5.0
"""Of processor time: a change among so many costs what it costs among few, which is far below this."""
_RSS = re.compile(r"VmRSS:\s+([0-9]+) kB")


async def server_with_many_entries(house: House, seconds: float) -> list[Item]:
    """Fill a server of its own, start it again, and change it; MiB, seconds, and milliseconds of its processor time."""
    del seconds
    directory = house.directory / "many"
    directory.mkdir()
    config, socket = directory / "server.toml", directory / "run" / "private" / "api.sock"
    config.write_text(
        f"[server]\ntrust_domain = 'many.test'\nbind_address = '127.0.0.1'\nbind_port = 0\n"
        f"data_dir = '{directory}/data'\nruntime_dir = '{directory}/run'\noperations.enabled = false\n"
        "log_level = 'warning'\n"
    )
    async with _Server(config, socket, directory) as first:
        few = await _change_cost(first, socket)
        await _fill(house, socket)
        house.tell(f"{ENTRIES} entries; {_mib(first.pid):.0f} MiB after they were made")
    async with _Server(config, socket, directory) as again:
        ready, memory = again.ready_after, _mib(again.pid)
        many = await _change_cost(again, socket)
        memory = max(memory, _mib(again.pid))
    return [
        within("server_100k_entries_memory", memory, "MiB", MEMORY_MIB, MEMORY_MIB),
        within("server_100k_entries_ready", ready, "s", READY_SECONDS, READY_SECONDS),
        within("server_100k_entries_change_cpu", many, "ms", few, CHANGE_MS),
    ]


class _Server:
    """One server process, ready when the block begins."""

    def __init__(self, config: Path, socket: Path, directory: Path) -> None:
        self._config = config
        self._socket = socket
        self._directory = directory
        self.ready_after = 0.0
        self.pid = 0

    async def __aenter__(self) -> Self:
        began = time.monotonic()
        with (self._directory / "server.log").open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "broker.cli.main", "server", "run", "--config", str(self._config),
                stdout=log, stderr=log, env=program_environment(os.environ),
            )  # fmt: skip
        self.pid = self._process.pid
        try:
            async with asyncio.timeout(READY_DEADLINE):
                while not self._socket.exists() and self._process.returncode is None:
                    await asyncio.sleep(0.02)
            await Entries(dial_socket(self._socket), timeout=READY_DEADLINE).count()
        except BaseException:
            await self.__aexit__()
            raise
        self.ready_after = time.monotonic() - began
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._process.returncode is None:
            self._process.terminate()
        await self._process.wait()


async def _fill(house: House, socket: Path) -> None:
    channel = dial_socket(socket)
    operator = Entries(channel, timeout=60)
    each = ENTRIES // NODES
    for node in range(NODES):
        paths = [f"/n{node}/{number}" for number in range(each)]
        made = [_entry(house, path, node, number) for number, path in enumerate(paths)]
        if any(status.code for status in await operator.create_many(made)):
            raise RuntimeError("an entry was not created")
    await channel.close()


def _entry(house: House, path: str, node: int, number: int) -> entries_pb2.RegisteredEntry:
    entry = house.entry(path, f"spiffe://many.test/node/{node}", ("unix", f"uid:{number}"), ("k8s", f"ns:team-{node}"))
    entry.entry.spiffe_id.trust_domain = SpiffeId("spiffe://many.test/x").trust_domain.name
    return entry


async def _change_cost(server: _Server, socket: Path) -> float:
    """Give the median milliseconds of processor time that creating and deleting one entry costs the server, halved."""
    channel = dial_socket(socket)
    operator = Entries(channel, timeout=30)
    took: list[float] = []
    for number in range(CHANGES):
        wanted = entries_pb2.RegisteredEntry()
        wanted.entry.spiffe_id.trust_domain, wanted.entry.spiffe_id.path = "many.test", f"/change/{number}"
        wanted.entry.parent_id.trust_domain, wanted.entry.parent_id.path = "many.test", "/node/0"
        wanted.entry.selectors.add(type="unix", value="uid:0")
        began = cpu_seconds(server.pid)
        made = await operator.create(wanted)
        await operator.delete(made.entry.id)
        took.append((cpu_seconds(server.pid) - began) * 1000 / 2)
    await channel.close()
    return percentile(took, 50)


def _mib(pid: int) -> float:
    found = _RSS.search(Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return int(found[1]) / 1024
