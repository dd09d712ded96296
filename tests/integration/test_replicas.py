"""Two servers in processes of their own on one PostgreSQL, and agents before each: one estate, and one of them may die."""

import asyncio
import time
from contextlib import AsyncExitStack
from datetime import UTC, datetime

import pytest
from cryptography import x509

from broker._proto.spiffe import workload_pb2
from broker.errors import InvalidSvid
from broker.spiffe import verify_x509_svid
from broker.spiffe.certificates import split_der
from tests.fakes.outage import Line
from tests.fakes.replicas import process, replica
from tests.fakes.running_agent import HEADER, RunningAgent
from tests.fakes.small_estate import issuer_key_id, leaf_of, running_agent

LONG = 40  # seconds: what takes a few on a quiet machine
LIFE = 25  # seconds that an authority of the replica lives that is going to die


class Following:
    """What one workload is told on one stream: never less than before, and nothing that any agent cannot verify yet."""

    def __init__(self, agent: RunningAgent, judges: list[RunningAgent]) -> None:
        self.agent, self.judges = agent, judges
        self.svids: dict[str, tuple[bytes, ...]] = {}
        self.failures: list[str] = []
        self.leaves: set[bytes] = set()

    async def run(self) -> None:
        async with self.agent.workload() as stub:
            async for message in stub.FetchX509SVID(workload_pb2.X509SVIDRequest(), metadata=HEADER):
                told = {one.spiffe_id: tuple(split_der(one.x509_svid)) for one in message.svids}
                if set(self.svids) - set(told):
                    self.failures.append("an SVID was withdrawn")
                for chain in told.values():
                    self.judge(chain)
                self.svids = told
                self.leaves |= {chain[0] for chain in told.values()}
        self.failures.append("the stream ended")

    def judge(self, chain: tuple[bytes, ...]) -> None:
        # In the moment of its first use: its authority was in the bundle of every agent before.
        for one in self.judges:
            try:
                verify_x509_svid(chain, one.agent.cache.bundles, now=datetime.now(UTC))
            except InvalidSvid as error:
                self.failures.append(f"first use before {one.settings.runtime_dir.name} knew it: {error.reason}")

    async def has(self, path: str) -> None:
        async with asyncio.timeout(LONG):
            while f"spiffe://example.org{path}" not in self.svids:
                await asyncio.sleep(0.001)


async def check_each_other(ends: list[Following], failures: list[str], counts: list[int]) -> None:
    """Each agent's bundle against every SVID of the other, again and again."""
    while True:
        for shown, judge in (ends, ends[::-1]):
            for name, chain in list(shown.svids.items()):
                try:
                    verify_x509_svid(chain, judge.agent.agent.cache.bundles, now=datetime.now(UTC))
                    counts.append(1)
                except InvalidSvid as error:
                    failures.append(f"{name}: {error.reason}")
        await asyncio.sleep(0.05)


async def authorities_of(one, *, of: str | None = None) -> dict[str, int]:
    """State by id, of one replica or of all."""
    rows = await one.authorities.list("x509")
    return {row.id: row.state for row in rows if of in (None, row.replica)}


async def gone(one, ids: set[str]) -> None:
    async with asyncio.timeout(LONG + LIFE):
        while ids & set(await authorities_of(one)):
            await asyncio.sleep(0.2)


@pytest.mark.timeout(240)
@pytest.mark.bears("I06", "K02", "K05", "K07")
async def test_two_replicas_are_one_estate_and_one_of_them_may_die(directory, postgresql) -> None:
    failures: list[str] = []
    counts: list[int] = []
    async with AsyncExitStack() as stack:
        first = await stack.enter_async_context(
            replica(directory, "first", postgresql, BROKER_SERVER__CA_TTL=f"{LIFE}s")
        )
        second = await stack.enter_async_context(replica(directory, "second", postgresql))
        (name,) = {row.replica for row in await first.authorities.list("x509") if row.is_local}
        line = Line()
        line.to = first.server.port
        await line.mend()
        stack.push_async_callback(line.cut)
        here = await stack.enter_async_context(running_agent(first, directory, "a", server_port=line.port))
        there = await stack.enter_async_context(running_agent(second, directory, "b"))
        # Registered at one, served by the other: at once, and not by a poll.
        began = time.monotonic()
        await second.register(here.agent.node.id.path, "/wl/here")
        ends = [Following(one, [here, there]) for one in (here, there)]
        group = await stack.enter_async_context(asyncio.TaskGroup())
        work = [group.create_task(one.run()) for one in ends]
        await ends[0].has("/wl/here")
        await first.register(there.agent.node.id.path, "/wl/there")
        await ends[1].has("/wl/there")
        for number in range(3):
            began = time.monotonic()
            await first.register(there.agent.node.id.path, f"/wl/there/{number}")
            await ends[1].has(f"/wl/there/{number}")
            print(f"entry at one, SVID at the other: {(time.monotonic() - began) * 1000:.0f} ms")
        # Each signs with its own, and each bundle knows both.
        issuers = [issuer_key_id(leaf_of((await one.x509()).svids[0])) for one in (here, there)]
        assert issuers[0] in await authorities_of(first, of=name)
        assert issuers[1] not in await authorities_of(first, of=name)
        work.append(group.create_task(check_each_other(ends, failures, counts)))

        # A third dies between two steps of its first rotation, and the others do not notice.
        for step in ("after_prepare", "after_activate"):
            async with process(
                directory, step, postgresql,
                BROKER_FAILPOINTS=f"authority.{step}=exit", BROKER_SERVER__ALLOW_FAILPOINTS="true",
            ) as (dying, log):  # fmt: skip
                assert await asyncio.wait_for(dying.wait(), 60) == 137, log.read_text(errors="replace")

        # One of the two dies, and its agent comes to the other, as behind a load balancer.
        first.process.kill()
        await first.process.wait()
        killed = set(await authorities_of(second, of=name))
        assert killed
        await line.cut()
        line.to = second.server.port
        await line.mend()
        await second.register(here.agent.node.id.path, "/wl/here/after")
        await ends[0].has("/wl/here/after")
        # Its authorities sign no more, stay while what they signed may live, and then go everywhere.
        async with asyncio.timeout(LONG):
            while any(state == 2 for state in (await authorities_of(second, of=name)).values()):
                await asyncio.sleep(0.1)
        await gone(second, killed)
        rows = await second.authorities.list("x509")
        assert all(row.is_local for row in rows if row.state in (1, 2)), "what the dying left"
        await second.register(there.agent.node.id.path, "/wl/there/last")
        await ends[1].has("/wl/there/last")
        for one in (here, there):
            known = {one.subject.rfc4514_string() for one in one.agent.cache.own_bundle.x509_authorities}
            assert len(known) == len(rows)
        for task in work:
            task.cancel()
    assert failures + ends[0].failures + ends[1].failures == []
    assert len(counts) > 50
    # Whoever signed, and whoever was killed meanwhile: no serial number twice.
    leaves = ends[0].leaves | ends[1].leaves
    assert len({x509.load_der_x509_certificate(one).serial_number for one in leaves}) == len(leaves) >= 7
