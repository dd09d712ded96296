"""A fleet of node agents whose server was away and is back: each finds it in time, and they do not come all at once.

Scaled for CI, with an interval of a few seconds. ``BROKER_FLEET=AGENTS:SECONDS`` runs it with the interval of the product and an
outage of so long: ``BROKER_FLEET=500:120`` is the fleet of reliability line O01.
"""

import asyncio
import os
import shutil
import tempfile
from collections import Counter
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from broker.agent.cache import EstateCache
from broker.agent.sync import Sync
from broker.agent.trust import read_trust_bundle
from broker.transport import redial
from tests.bench.fleet import AT_ONCE, light_agent
from tests.fakes.outage import House
from tests.fakes.running_agent import until
from tests.fakes.small_estate import TD

SCALE = os.environ.get("BROKER_FLEET", "")
AGENTS, OUTAGE = (int(one) for one in SCALE.split(":")) if SCALE else (40, 7)
LONGEST = redial.LONGEST if SCALE else 3.0
SLACK = 2.0 if SCALE else 10.0  # seconds: 30 in all; in CI for machines that are busy with something else


class Fleet:
    """Agents that follow a server, and when each was heard to be online."""

    def __init__(self, house: House) -> None:
        self.house, self.online, self.syncs = house, {}, []
        self.loop = asyncio.get_running_loop()

    async def join(self, stack: AsyncExitStack, group: asyncio.TaskGroup) -> list[asyncio.Task]:
        room = asyncio.Semaphore(AT_ONCE)
        following = []

        async def one(number: int) -> None:
            async with room:
                token = (await self.house.nodes.create_join_token(ttl=600)).value
                directory = self.house.directory / f"n{number}"
                address = f"127.0.0.1:{self.house.line.port}"
                bundle = read_trust_bundle(self.house.trust, TD)
                agent = await stack.enter_async_context(light_agent(address, bundle, token, directory))
            sync = Sync(
                agent.upstream,
                EstateCache(TD),
                on_online=lambda: self.online.__setitem__(number, self.loop.time()),
                on_bundle=lambda _: None,
                on_refused=lambda _: None,
                on_heard=lambda: None,
            )
            self.syncs.append(sync)
            following.append(group.create_task(sync.run()))
            following.append(group.create_task(agent.upstream.watch_connection(sync.hurry)))

        await asyncio.gather(*map(one, range(AGENTS)))
        await until(lambda: all(sync.is_online for sync in self.syncs), 60)
        return following


@pytest.mark.timeout(OUTAGE + 180)
@pytest.mark.bears("O01")
async def test_a_fleet_finds_its_server_again_within_half_a_minute_and_one_after_the_other(monkeypatch) -> None:
    monkeypatch.setattr(redial, "LONGEST", LONGEST)
    directory = Path(tempfile.mkdtemp(dir="/tmp"))
    directory.chmod(0o755)
    async with AsyncExitStack() as stack:
        stack.callback(shutil.rmtree, directory)
        house = House(directory)
        stack.push_async_callback(house.line.cut)
        more = "[server.ratelimit]\nattestation = false\n"  # all nodes have the same address
        await stack.enter_async_context(house.server(more=more))
        await house.publish()
        fleet = Fleet(house)
        group = await stack.enter_async_context(asyncio.TaskGroup())
        following = await fleet.join(stack, group)
        await house.line.hang_up()
        await until(lambda: not any(sync.is_online for sync in fleet.syncs), 30)
        await asyncio.sleep(OUTAGE)
        knocks = [moment for moment in house.line.refused if moment > fleet.loop.time() - LONGEST]
        fleet.online.clear()
        house.line.answer()
        back = fleet.loop.time()
        await until(lambda: len(fleet.online) == AGENTS, LONGEST + SLACK)
        took = sorted(moment - back for moment in fleet.online.values())
        for task in following:
            task.cancel()
    seconds = Counter(int(one * 10 / LONGEST) for one in took)
    print(
        f"attempts of one interval {len(knocks)}, found again after {took[0]:.1f} to {took[-1]:.1f} s, by tenths: {seconds}"
    )
    # One attempt of each agent in an interval, however many of its loops are waiting.
    assert AGENTS * 0.4 <= len(knocks) <= AGENTS * 1.5
    assert took[-1] - took[0] >= 0.75 * LONGEST
    assert max(seconds.values()) <= AGENTS * 0.4
