import asyncio
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from datetime import timedelta

import pytest

from broker.server.identity import watch as watch_module
from broker.server.identity.bundles import DeletionMode, drop_bundle
from broker.server.identity.watch import Delta, Heartbeat, Snapshot
from broker.spiffe import TrustDomain
from tests.unit.server.identity.test_bundles import published
from tests.unit.server.identity.world import AGENT, OTHER, world


@asynccontextmanager
async def stream(here, cursor=0, store=None, agent=AGENT):
    async with aclosing(here.watch.follow(agent, cursor, here.store.id if store is None else store)) as updates:

        async def following():
            async with asyncio.timeout(30):
                return await anext(updates)

        yield following


async def test_a_new_stream_begins_with_everything(here):
    await here.add_node()
    await here.add("/app")
    await here.add("/yours", OTHER)
    async with stream(here) as following:
        first = await following()
    assert isinstance(first, Snapshot)
    assert [entry.id for entry in first.entries] == ["app"]
    assert [bundle.trust_domain.name for bundle in first.bundles] == ["example.org"]
    assert (first.seq, first.more) == (here.directory.seq, False)


async def test_changes_follow(here):
    await here.add_node()
    async with stream(here) as following:
        await following()
        await here.add("/app")
        added = await following()
        await here.entries.delete(["app"], "test")
        gone = await following()
    assert isinstance(added, Delta)
    assert [entry.id for entry in added.upserted] == ["app"]
    assert (list(gone.upserted), list(gone.deleted_ids)) == ([], ["app"])
    assert gone.seq == here.directory.seq > added.seq


async def test_a_slow_agent_hears_the_newest_state_once(here):
    await here.add_node()
    async with stream(here) as following:
        await following()
        for number in range(10):
            await here.add(f"/n/{number}")
            await here.entries.delete([f"n.{number}"], "test")
        await here.add("/kept")
        update = await following()
    assert [entry.id for entry in update.upserted] == ["kept"]
    assert len(update.deleted_ids) == 10


async def test_a_much_slower_agent_starts_again(here, monkeypatch):
    monkeypatch.setattr(watch_module, "MAX_PENDING", 3)
    await here.add_node()
    async with stream(here) as following:
        await following()
        for number in range(5):
            await here.add(f"/n/{number}")
        again = await following()
    assert isinstance(again, Snapshot)
    assert len(again.entries) == 5


async def test_large_snapshots_and_deltas_come_in_pages(here, monkeypatch):
    monkeypatch.setattr(watch_module, "PAGE", 2)
    await here.add_node()
    for number in range(5):
        await here.add(f"/n/{number}")
    async with stream(here) as following:
        pages = [await following() for _ in range(3)]
        cursor = pages[-1].seq
        for number in range(5, 8):
            await here.add(f"/n/{number}")
        deltas = [await following() for _ in range(2)]
    assert [page.more for page in pages] == [True, True, False]
    assert sum(len(page.entries) for page in pages) == 5
    assert [bool(page.bundles) for page in pages] == [True, False, False]
    # The cursor moves with the last page.
    assert [delta.seq for delta in deltas] == [cursor, here.directory.seq]


async def test_a_stream_goes_on_where_the_last_one_broke(here):
    await here.add_node()
    await here.add("/app")
    async with stream(here) as following:
        cursor = (await following()).seq
    await here.add("/two")
    await here.add("/yours", OTHER)
    await here.entries.delete(["app", "yours"], "test")
    async with stream(here, cursor) as following:
        delta = await following()
    assert [entry.id for entry in delta.upserted] == ["two"]
    # Another agent's entry is none of its business, not even its id.
    assert list(delta.deleted_ids) == ["app"]
    assert delta.bundles


async def test_another_stores_cursor_or_one_of_the_future_means_nothing(here):
    await here.add_node()
    await here.add("/app")
    for cursor, store in ((here.directory.seq, "another"), (here.directory.seq + 5, None)):
        async with stream(here, cursor, store) as following:
            assert isinstance(await following(), Snapshot)


async def test_after_a_restart_a_cursor_counts_if_nothing_has_changed(tmp_path):
    async with world(tmp_path) as before:
        await before.add_node()
        await before.add("/app")
        cursor = before.directory.seq
    async with world(tmp_path) as after:
        async with stream(after, cursor) as following:
            delta = await following()
        assert isinstance(delta, Delta)
        assert (list(delta.upserted), list(delta.deleted_ids)) == ([], [])
        assert len(delta.bundles[0].x509) == 2
        await after.add("/two")
    async with world(tmp_path) as last, stream(last, cursor) as following:
        assert isinstance(await following(), Snapshot)


async def test_a_new_bundle_is_told(here):
    await here.add_node()
    async with stream(here) as following:
        await following()
        here.clock.advance(timedelta(hours=12))
        await here.rotation.settle()
        delta = await following()
    assert delta.bundles[0].sequence == here.authorities.bundle.sequence
    assert len(delta.bundles[0].x509) == 2


async def test_silence_is_told(here, monkeypatch):
    monkeypatch.setattr(watch_module, "HEARTBEAT", 0.01)
    await here.add_node()
    async with stream(here) as following:
        await following()
        assert await following() == Heartbeat(here.directory.seq)


async def test_a_stream_that_ended_costs_nothing(here):
    await here.add_node()
    async with stream(here) as following:
        await following()
        assert here.watch.streams == 1
    assert here.watch.streams == 0
    await here.add("/app")


@pytest.mark.parametrize("agents", [20])
async def test_every_agent_hears_of_its_own(here, agents):
    ids = [type(AGENT)(f"spiffe://example.org/spire/agent/join_token/n{number}") for number in range(agents)]
    for agent in ids:
        await here.add_node(agent)

    async def first_delta(agent):
        async with stream(here, agent=agent) as following:
            await following()
            ready.release()
            return await following()

    ready = asyncio.Semaphore(0)
    waiting = [asyncio.create_task(first_delta(agent)) for agent in ids]
    for _ in ids:
        await ready.acquire()
    for number, agent in enumerate(ids):
        await here.add(f"/n/{number}", agent)
    for number, delta in enumerate(await asyncio.gather(*waiting)):
        assert [entry.id for entry in delta.upserted] == [f"n.{number}"]


OTHER_DOMAIN = TrustDomain("other.test")


def names(update):
    return [bundle.trust_domain.name for bundle in update.bundles]


@pytest.mark.bears("FE-08")
async def test_an_agent_hears_of_the_bundles_that_its_entries_name(here):
    await here.add_node()
    await here.bundles.set([published(), published("third.test")], "op")
    await here.add("/app", federates_with=frozenset({OTHER_DOMAIN}))
    async with stream(here) as following:
        own, first = await following(), await following()
        assert (names(own), own.more, names(first), first.more) == (["example.org"], True, ["other.test"], False)
        newer = published(sequence=2)
        await here.bundles.set([newer], "op")
        update = await following()
        assert (list(update.bundles), list(update.upserted)) == ([newer], [])
        # The third one is none of this agent's business: nothing is said of it, whatever happens to it.
        await here.bundles.set([published("third.test", sequence=2)], "op")
        await here.add("/two")
        update = await following()
        assert ([entry.id for entry in update.upserted], names(update)) == (["two"], [])


async def test_an_entry_brings_and_takes_its_bundles(here):
    await here.add_node()
    await here.bundles.set([published()], "op")
    await here.add("/app")
    async with stream(here) as following:
        assert names(await following()) == ["example.org"]
        await here.entries.update([("app", lambda one: replace(one, federates_with=frozenset({OTHER_DOMAIN})))], "op")
        bundle, entry = await following(), await following()
        # The bundle is there before the entry that needs it.
        assert (names(bundle), [one.id for one in entry.upserted]) == (["other.test"], ["app"])
        assert bundle.seq < entry.seq
        await here.entries.update([("app", lambda one: replace(one, federates_with=frozenset()))], "op")
        gone = await following()
        assert (list(gone.deleted_bundles), [one.id for one in gone.upserted]) == ([OTHER_DOMAIN], ["app"])


@pytest.mark.bears("X05")
async def test_a_bundle_that_is_deleted_is_withdrawn(here):
    await here.add_node()
    await here.bundles.set([published()], "op")
    await here.add("/app", federates_with=frozenset({OTHER_DOMAIN}))
    async with stream(here) as following:
        await following()
        assert (await following()).more is False
        assert await here.bundles.delete([OTHER_DOMAIN], DeletionMode.RESTRICT, "op") != [None]
        await here.store.write(lambda writer: drop_bundle(writer, OTHER_DOMAIN, "op", here.clock.now()))
        gone = await following()
        assert (list(gone.deleted_bundles), list(gone.upserted)) == ([OTHER_DOMAIN], [])
        await here.bundles.set([published()], "op")
        assert names(await following()) == ["other.test"]


async def test_who_was_away_is_told_what_went(here):
    await here.add_node()
    await here.bundles.set([published(), published("third.test")], "op")
    await here.add("/app", federates_with=frozenset({OTHER_DOMAIN}))
    async with stream(here) as following:
        await following()
        cursor = (await following()).seq
    # Still there: told anew what it needs, and to drop what it may hold and does not need.
    async with stream(here, cursor) as following:
        bundle, rest = await following(), await following()
    assert (names(bundle), names(rest)) == (["other.test"], ["example.org"])
    assert list(rest.deleted_bundles) == [TrustDomain("third.test")]
    # Gone: only a snapshot says so for sure.
    await here.bundles.delete([TrustDomain("third.test")], DeletionMode.RESTRICT, "op")
    async with stream(here, cursor) as following:
        assert isinstance(await following(), Snapshot)


async def test_after_a_restart_a_changed_bundle_means_a_snapshot(tmp_path):
    async with world(tmp_path) as here:
        await here.add_node()
        cursor = here.directory.seq
        await here.bundles.set([published()], "op")
    async with world(tmp_path) as again, stream(again, cursor) as following:
        assert isinstance(await following(), Snapshot)
