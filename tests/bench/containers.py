"""The first X.509-SVID of a new process in a container: what it costs to ask the runtime who that is."""

import asyncio
import os
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from broker.client import Entries, dial_socket
from broker.dev.configuration import NODE_ALIAS, Plan
from broker.dev.estate import Estate
from broker.dev.stage import Process
from tests.bench.answers import first, side_by_side
from tests.bench.house import House
from tests.bench.measure import Item
from tests.integration.control_groups import made

LABEL = ("bench", "yes")


async def first_fetch_x509_svid_docker(house: House, seconds: float) -> list[Item]:
    """Milliseconds to the first message of a process in a container; the limit is a process in none, on a node without docker.

    Needs root, for the control group that the processes are put into: measures nothing without.
    """
    if os.geteuid() != 0:
        house.tell("  needs root, for a container's control group: not measured")
        return []
    container = secrets.token_hex(32)
    with made(f"/docker/{container}") as group:
        async with house.program("newcomer") as inside:
            (group / "cgroup.procs").write_text(str(inside.pid))
            async with house.program("runtime", container, str(inside.pid), *LABEL) as runtime:
                socket = Path((await runtime.hear())["socket"])
                return await beside(house, seconds, socket, inside)


async def beside(house: House, seconds: float, runtime: Path, inside: Process) -> list[Item]:
    """Measure newcomers of ``inside``, which is in a container of that runtime, beside newcomers of the house."""
    async with docker_node(house, runtime) as socket, house.program("newcomer") as outside:
        for program, at in ((inside, socket), (outside, house.agent_socket)):
            await first(program, at, 5)
        return await side_by_side(
            "first_fetch_x509_svid_docker", seconds, (inside, socket), (outside, house.agent_socket)
        )


@asynccontextmanager
async def docker_node(house: House, runtime: Path) -> AsyncIterator[str]:
    """Start an estate whose agent asks that runtime, with one entry for the label; give the workload socket."""
    docker = {"docker_socket_path": f"unix://{runtime}", "podman_socket_path": ""}
    estate = Estate(house.directory / "docker", plan=Plan(workload_attestors={"docker": docker}))
    try:
        await estate.up(house.tell)
        admin = dial_socket(estate.layout.server_socket)
        try:
            await Entries(admin).create(
                house.entry("/bench/container", NODE_ALIAS, ("docker", "label:" + ":".join(LABEL)))
            )
        finally:
            await admin.close()
        yield str(estate.layout.agent_socket)
    finally:
        await asyncio.to_thread(estate.down)
