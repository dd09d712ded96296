"""Batches to the server; what it answers is judged in test_svids."""

import asyncio

import pytest

from broker.agent import signing as module
from broker.errors import NotFound, Refused, Unavailable
from tests.fakes.fake_server import entry_message
from tests.fakes.running_agent import ME, estate, until


async def test_while_one_batch_is_under_way_the_next_gathers() -> None:
    async with estate() as agent:
        entry = agent.agent.cache.entry("e1")
        agent.server.sign_gate.clear()
        asked = []
        for _ in range(5):
            asked.append(asyncio.create_task(agent.agent._signing.x509(entry)))
            await asyncio.sleep(0.05)
        assert agent.server.batches == [1, 1]
        agent.server.sign_gate.set()
        holdings = await asyncio.gather(*asked)
        assert agent.server.batches == [1, 1, 3]
        assert len({holding.key_der for holding in holdings}) == 5


async def test_large_crowds_are_cut(monkeypatch) -> None:
    monkeypatch.setattr(module, "MAX_BATCH", 10)
    async with estate() as agent:
        entry = agent.agent.cache.entry("e1")
        await asyncio.gather(*(agent.agent._signing.x509(entry) for _ in range(25)))
        assert agent.server.batches == [10, 10, 5]


async def test_one_unknown_entry_fails_alone() -> None:
    async with estate(entries=[entry_message("e1", "/a", [ME]), entry_message("e2", "/b", [ME])]) as agent:
        one, two = (agent.agent.cache.entry(name) for name in ("e1", "e2"))
        del agent.server.entries["e2"]
        good, bad = await asyncio.gather(
            agent.agent._signing.x509(one), agent.agent._signing.x509(two), return_exceptions=True
        )
        assert good.svid.id == one.spiffe_id
        assert isinstance(bad, NotFound)


async def test_a_failed_call_fails_everybody_in_it() -> None:
    async with estate() as agent:
        entry = agent.agent.cache.entry("e1")
        for error in (Unavailable("busy", code="busy"), Refused("no", code="no")):
            agent.server.refuse_signing = error
            outcomes = await asyncio.gather(
                *(agent.agent._signing.x509(entry) for _ in range(3)), return_exceptions=True
            )
            assert [type(outcome) for outcome in outcomes] == [type(error)] * 3


async def test_a_new_connection_of_the_agent_loses_no_request() -> None:
    async with estate() as agent:
        entry = agent.agent.cache.entry("e1")
        asked = asyncio.create_task(agent.agent._signing.x509(entry))
        await asyncio.sleep(0)
        agent.agent._dialer.reconnect()
        assert (await asked).svid.id == entry.spiffe_id


async def test_closing_answers_whoever_waits() -> None:
    async with estate() as agent:
        agent.server.sign_gate.clear()
        asked = asyncio.create_task(agent.agent._signing.x509(agent.agent.cache.entry("e1")))
        await asyncio.sleep(0.05)
        await agent.agent._signing.close()
        with pytest.raises(Unavailable):
            await asked
        agent.server.sign_gate.set()


async def test_closing_sends_nothing_that_waited_for_its_turn() -> None:
    async with estate() as agent:
        agent.server.sign_gate.clear()
        entry, asked = agent.agent.cache.entry("e1"), []
        for _ in range(module.MAX_BATCHES_UNDER_WAY + 1):
            asked.append(asyncio.create_task(agent.agent._signing.x509(entry)))
            await until(lambda: len(agent.server.batches) == min(len(asked), module.MAX_BATCHES_UNDER_WAY))
        await agent.agent._signing.close()
        assert {type(one) for one in await asyncio.gather(*asked, return_exceptions=True)} == {Unavailable}
        with pytest.raises(Unavailable):
            await agent.agent._signing.x509(entry)
        await asyncio.sleep(0.05)
        assert len(agent.server.batches) == module.MAX_BATCHES_UNDER_WAY
        agent.server.sign_gate.set()


def test_no_key_is_shown() -> None:
    request = module._Request("e1", b"csr", None)
    assert "csr" not in repr(request)
