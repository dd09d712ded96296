"""Crowds at the agent's socket: connections that die at every stage, and many users at once.

Full scale, 100,000 connections and five minutes: BROKER_ATTACK_SCALE=1.
"""

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fakes.agent_estate import running
from tests.fakes.fake_server import entry_message
from tests.fakes.running_agent import until

SCRIPT = Path(__file__).parents[1] / "fakes" / "raw_workload.py"
SCALE = float(os.environ.get("BROKER_ATTACK_SCALE", "0.04"))  # CI has seconds, not minutes
DYING = {
    stage: int(count * SCALE)
    for stage, count in {"connected": 37_500, "preface": 37_500, "attesting": 12_500, "streaming": 12_500}.items()
}
"""A process for each of the last two: they cost the machine more than the agent."""
AT_ONCE = 5_000  # die before the agent is looked at
SLACK = 5  # descriptors and threads
MAX_GROWTH = 20 * 1024  # KiB
FIRST_UID, USERS = 4100, 64
CROWD_SECONDS = max(1.0, 300 * SCALE - 5)
PATIENCE = 120  # seconds more, for what a script of callers has begun


async def raw(*arguments: object, seconds: float = 0) -> str:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-I", "-S", str(SCRIPT), *map(str, arguments), stdout=subprocess.PIPE
    )
    try:
        out, _ = await asyncio.wait_for(process.communicate(), seconds + PATIENCE)
    except TimeoutError:
        process.kill()
        await process.wait()
        raise
    assert process.returncode == 0
    return out.decode()


class Costs:
    """What a process holds now."""

    def __init__(self, pid: int) -> None:
        directory = Path(f"/proc/{pid}")
        status = dict(line.split(":\t", 1) for line in (directory / "status").read_text().splitlines() if ":\t" in line)
        self.descriptors = len(os.listdir(directory / "fd"))
        self.threads = int(status["Threads"])
        self.memory = int(status["VmRSS"].split()[0])

    def is_near(self, before: "Costs") -> bool:
        return self.descriptors <= before.descriptors + SLACK and self.threads <= before.threads + SLACK


@pytest.mark.timeout(240 + 2000 * SCALE)
@pytest.mark.root("descriptors of a process that is not dumpable")
@pytest.mark.bears("A22")
async def test_thousands_of_connections_that_die_leave_nothing_behind() -> None:
    async with running() as agent:
        assert (await agent.fetch()).svids
        for stage in DYING:  # what is made once and kept: threads, spares, memory of the allocator
            await raw("die", stage, 100, agent.socket)
        await until(lambda: len(agent.server.sessions) <= 1, 30)
        before = Costs(agent.process.pid)
        for stage, count in DYING.items():
            for begun in range(0, count, AT_ONCE):
                await raw("die", stage, min(AT_ONCE, count - begun), agent.socket)
                await until(lambda: Costs(agent.process.pid).is_near(before), 30)
        assert (await agent.fetch()).svids
        await until(lambda: len(agent.server.sessions) <= 1, 30)  # this process's own; all others are told as ended
        assert len(agent.server.ended) >= DYING["streaming"]
        assert Costs(agent.process.pid).memory - before.memory < MAX_GROWTH


@pytest.mark.timeout(240 + 1000 * SCALE)
@pytest.mark.root("processes of many users")
@pytest.mark.bears("A24", "A23", "A01")
async def test_no_user_of_many_ever_gets_anothers_identity() -> None:
    async with running(first_identity_wait="10s") as agent:
        for uid in range(FIRST_UID, FIRST_UID + USERS):
            agent.server.put(entry_message(f"u{uid}", f"/wl/{uid}/x", [f"unix:uid:{uid}"]))
        said = await raw("crowd", FIRST_UID, USERS, CROWD_SECONDS, agent.socket, seconds=CROWD_SECONDS)
        rows = [json.loads(line) for line in said.splitlines()]
        assert [row["uid"] for row in rows] == list(range(FIRST_UID, FIRST_UID + USERS))
        assert [row for row in rows if row["foreign"] or "error" in row] == []
        assert [
            row for row in rows if not row["answers"] or row["answers"] != row["asked"]
        ] == []  # nobody was left out
        print(f"{sum(row['answers'] for row in rows)} answers in {CROWD_SECONDS:g} s, none of them another's")
