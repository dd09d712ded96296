"""Following the server: snapshot, deltas, resumption, and what is not believed."""

import asyncio

import pytest

from broker._proto.broker.server.v1 import watch_pb2
from broker.agent import sync as module
from broker.errors import Unavailable
from broker.spiffe import TrustDomain
from tests.fakes.fake_server import FakeCa, entry_message
from tests.fakes.running_agent import ME, RunningAgent, estate, until


def ids(agent: RunningAgent) -> set[str]:
    return {entry.id for entry in agent.agent.cache._index}


async def test_a_snapshot_in_pages_then_deltas() -> None:
    entries = [entry_message(f"e{n}", f"/wl/{n}", [ME]) for n in range(5)]
    async with estate(entries=entries) as agent:
        assert ids(agent) == {f"e{n}" for n in range(5)}
        agent.server.put(entry_message("new", "/new", [ME]))
        agent.server.remove("e0")
        await until(lambda: ids(agent) == {"e1", "e2", "e3", "e4", "new"})


async def test_after_an_interruption_it_resumes_by_cursor() -> None:
    async with estate() as agent:
        agent.server.put(entry_message("e2", "/two", [ME]))
        await until(lambda: "e2" in ids(agent))
        agent.server.drop()
        await until(lambda: len(agent.server.watches) >= 2 and agent.agent.sync.is_online)
        assert (agent.server.watches[-1].cursor, agent.server.watches[-1].store) == (2, "store-1")
        assert ids(agent) == {"e1", "e2"}


async def test_another_store_means_a_snapshot() -> None:
    async with estate() as agent:
        agent.server.store = "store-2"
        agent.server.entries = {"other": entry_message("other", "/other", [ME])}
        await until(lambda: ids(agent) == {"other"})  # its heartbeat gave it away
        assert agent.server.watches[-1].cursor == 0


@pytest.mark.parametrize(
    "response",
    [
        watch_pb2.WatchResponse(seq=0, store="store-1", delta=watch_pb2.WatchDelta(deleted_ids=["e1"])),
        watch_pb2.WatchResponse(seq=9, store="other", delta=watch_pb2.WatchDelta(deleted_ids=["e1"])),
        watch_pb2.WatchResponse(
            seq=9, store="store-1", delta=watch_pb2.WatchDelta(bundles=[FakeCa().message()], deleted_ids=["e1"])
        ),
        watch_pb2.WatchResponse(seq=9, store="store-1", snapshot=watch_pb2.WatchSnapshot()),
        watch_pb2.WatchResponse(
            seq=9,
            store="store-1",
            snapshot=watch_pb2.WatchSnapshot(bundles=[FakeCa(TrustDomain("other.example")).message()]),
        ),
    ],
    ids=["goes back", "other store", "unreadable bundle", "no bundle", "another domain's bundle"],
)
@pytest.mark.bears("O06")
async def test_what_does_not_follow_begins_anew(response) -> None:
    if response.delta.bundles:
        response.delta.bundles[0].x509_authorities[0].asn1 = b"rubbish"
    async with estate() as agent:
        agent.server.say(response)
        await until(lambda: len(agent.server.watches) >= 2 and agent.agent.sync.is_online)
        assert agent.server.watches[-1].cursor == 0
        assert ids(agent) == {"e1"}
        assert agent.agent.cache.own_bundle.x509_authorities == (agent.server.ca.root,)


async def test_an_entry_that_cannot_be_read_is_served_to_nobody_and_stops_no_other() -> None:
    bad = entry_message("bad", "/bad", [ME])
    async with estate(entries=[bad, entry_message("e1", "/wl/me", [ME])]) as agent:
        assert ids(agent) == {"bad", "e1"}
        spoilt = entry_message("bad", "/spire/server", [ME])
        agent.server.put(spoilt)
        await until(lambda: ids(agent) == {"e1"})
        agent.server.entries["worse"] = entry_message("worse", "/worse", [])
        agent.server.store = "store-2"
        await until(lambda: agent.agent.sync._store == "store-2")
        assert ids(agent) == {"e1"}


@pytest.mark.bears("O06")
async def test_a_silent_server_is_given_up(monkeypatch) -> None:
    async with estate() as agent:
        agent.agent.sync._silence = 0.2
        agent.server.heartbeat = 60
        await until(lambda: len(agent.server.watches) >= 3)


async def test_half_a_snapshot_changes_nothing() -> None:
    async with estate() as agent:
        page = watch_pb2.WatchSnapshot(entries=[entry_message("half", "/half", [ME])], more=True)
        agent.server.say(watch_pb2.WatchResponse(seq=9, store="store-1", snapshot=page))
        agent.server.put(entry_message("e2", "/two", [ME]))
        await until(lambda: "e2" in ids(agent))
        assert ids(agent) == {"e1", "e2"}


async def test_a_snapshot_that_never_ends_is_given_up(monkeypatch) -> None:
    monkeypatch.setattr(module, "MAX_SNAPSHOT_PAGES", 10)
    async with estate() as agent:
        for _ in range(12):
            agent.server.say(
                watch_pb2.WatchResponse(seq=9, store="store-1", snapshot=watch_pb2.WatchSnapshot(more=True))
            )
        await until(lambda: len(agent.server.watches) >= 2)


async def test_who_waits_hears_of_the_return() -> None:
    async with estate() as agent:
        with agent.agent.cache.listening() as bell:
            await bell.wait(0)
            agent.server.drop()
            assert await bell.wait(5)


async def test_an_interruption_is_unavailable_and_never_a_refusal() -> None:
    async with estate() as agent:
        seen = []
        agent.agent.sync._on_refused = seen.append
        agent.server.drop()
        await until(lambda: seen)
        assert isinstance(seen[0], Unavailable)
        await asyncio.sleep(0)


async def test_who_hurries_does_not_wait_out_the_back_off(monkeypatch) -> None:
    monkeypatch.setattr(module.Backoff, "next", lambda _: 3600.0)
    async with estate() as agent:
        heard = len(agent.server.watches)
        agent.server.drop()
        await until(lambda: not agent.agent.sync.is_online)
        agent.agent.sync.hurry()
        await until(lambda: len(agent.server.watches) > heard and agent.agent.sync.is_online)
