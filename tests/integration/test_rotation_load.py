"""Rotation under load: workloads of three agents shake hands and check tokens while authorities come and go.

Server and agents are this process; the workloads of each agent are a process of their own, which calls those of all.

Scaled for CI. ``BROKER_LOAD=WORKLOADS:SECONDS``, the workloads of all agents together, runs it larger, with the lives and the
rate of reliability line K01 (an authority 60 s, an SVID 20 s, 200 handshakes and token checks a second): ``BROKER_LOAD=51:1200``
is the line itself. It prints what was done; ``least left`` is how near to its end an SVID in use ever came, and ``ahead`` how long an
authority was in every bundle before its first signature came, at least, both in seconds.
"""

import asyncio
import json
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import timedelta
from pathlib import Path

import pytest

from tests.fakes.loaded_workloads import PATIENCE, SOURCES, watch_lag
from tests.fakes.running_agent import until
from tests.fakes.small_estate import running_agent, running_server

SCALE = os.environ.get("BROKER_LOAD", "")
WORKLOADS, SECONDS = (int(one) for one in SCALE.split(":")) if SCALE else (24, 27)
CA_TTL, SVID_TTL = (timedelta(seconds=60), 20) if SCALE else (timedelta(seconds=24), 8)
FORCE_AFTER = 90 if SCALE else 22  # seconds: in CI after the one rotation that is due by itself
AGENTS = 3
HANDSHAKES, TOKENS = (60, 7) if SCALE else (20, 5)  # a second, by the workloads of each agent
EACH = -(-WORKLOADS // AGENTS)  # workloads of one agent


class Workloads:
    """A process of workloads, and what it said last."""

    def __init__(self, process):
        self.process = process
        self.told = {"held": 0, "issuers": [], "seen": [], "counts": {}, "failures": [], "is over": False}

    async def listen(self):
        async for line in self.process.stdout:
            self.told = json.loads(line)

    def do(self):
        """Have it begin to call, or end."""
        self.process.stdin.write(b"\n")


@asynccontextmanager
async def workloads(agent, directory, number):
    command = (sys.executable, "-m", "tests.fakes.loaded_workloads", agent.socket, directory, number, AGENTS, EACH)
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        *map(str, (*command, HANDSHAKES, TOKENS)), stdin=pipe, stdout=pipe, cwd=SOURCES, limit=1 << 20
    )
    one = Workloads(process)
    listening = asyncio.create_task(one.listen())
    try:
        yield one
        process.stdin.close()
        async with asyncio.timeout(PATIENCE):
            assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
        await listening


async def force(server, clients, counts):
    """Prepare, activate, taint, wait until nothing of the old one is in use, revoke."""
    for kind in ("x509", "jwt"):
        made = await server.authorities.prepare(kind)
        await asyncio.sleep(0.5)
        old = next(one for one in await server.authorities.list(kind) if one.state == 2)
        if old.id == made.id:
            continue  # it was due by itself in the meantime
        await server.authorities.activate(kind, made.id)
        await server.authorities.taint(kind, old.id)
        began = time.monotonic()
        if kind == "x509":
            await until(lambda gone=old.id: all(gone not in client.told["issuers"] for client in clients), 20)
        else:
            await asyncio.sleep(1)
        counts[f"{kind} replaced, ms"] = round((time.monotonic() - began) * 1000)
        await server.authorities.revoke(kind, old.id)
        counts[f"{kind} forced"] += 1


def failures_of(clients):
    return [failure for one in clients for failure in one.told["failures"]]


async def rotate(server, clients):
    """While the clients call: force a rotation now and then, beside those that are due by themselves. Gives counts."""
    counts = Counter()
    lagging = asyncio.create_task(watch_lag(counts))
    began, forced_at = time.monotonic(), FORCE_AFTER
    while (passed := time.monotonic() - began) < SECONDS and not failures_of(clients):
        if passed > forced_at:
            await force(server, clients, counts)
            forced_at += FORCE_AFTER
        assert all(one.process.returncode is None for one in clients)
        await asyncio.sleep(0.2)
    lagging.cancel()
    return counts


@pytest.mark.timeout(SECONDS + 120)
@pytest.mark.bears("K01", "K04", "WA-03", "WA-15")
async def test_no_handshake_fails_and_no_stream_ends_while_authorities_come_and_go():
    directory = Path(tempfile.mkdtemp(dir="/tmp"))
    directory.chmod(0o755)
    async with AsyncExitStack() as stack:
        stack.callback(shutil.rmtree, directory)
        server = await stack.enter_async_context(
            running_server(directory, ca_ttl=CA_TTL, agent_ttl=timedelta(seconds=SVID_TTL * 2))
        )
        clients = []
        for number in range(AGENTS):
            agent = await stack.enter_async_context(running_agent(server, directory, f"agent{number}"))
            for one in range(EACH):
                path = f"/wl/{number}/{one}"
                await server.register(agent.agent.node.id.path, path, x509_svid_ttl=SVID_TTL, jwt_svid_ttl=SVID_TTL)
            clients.append(await stack.enter_async_context(workloads(agent, directory, number)))
        await until(lambda: all(one.told["held"] == EACH for one in clients), 30)
        for client in clients:
            client.do()
        counts = await rotate(server, clients)
        for client in clients:
            client.do()
        await until(lambda: all(one.told["is over"] for one in clients), PATIENCE)
    done = {kind: sum(one.told["counts"].get(kind, 0) for one in clients) for kind in ("handshakes", "tokens")}
    lag = max(one.told["counts"]["lag, ms"] for one in clients)
    seen = set().union(*(one.told["seen"] for one in clients))
    rate = (done["handshakes"] + done["tokens"]) / SECONDS
    least = min(one.told["least left"] for one in clients)
    ahead = min(one.told["ahead"] for one in clients)
    print(
        dict(counts),
        done,
        f"authorities={len(seen)} a second: {rate:.1f} least left: {least:.1f} s ahead: {ahead:.1f} s lag of workloads: {lag} ms",
    )
    assert failures_of(clients) == []
    assert len(seen) >= 3
    assert 0 < ahead < SECONDS, "whose signature came before it was in the bundle"
    assert counts["x509 forced"] >= 1
    assert min(done["handshakes"], done["tokens"]) >= 50
    assert not SCALE or rate > 195
