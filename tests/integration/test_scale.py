"""Many entries and nothing happening: what that costs. Counted, not timed."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc.aio
import pytest

from broker._proto.broker.server.v1 import entries_pb2, watch_pb2
from broker._proto.service import Stub
from broker._proto.spire.api.server.bundle.v1 import bundle_pb2
from broker._proto.spire.api.server.entry.v1 import entry_pb2
from broker._proto.spire.api.types import entry_pb2 as types
from broker._proto.spire.api.types import selector_pb2, spiffeid_pb2
from broker.server import app
from broker.server.api.grpc import bundle, entries, entry, watch
from broker.server.app import Server
from broker.spiffe import SpiffeId
from tests.fakes.warped_loop import WarpedLoop
from tests.integration.identity_rig import (
    DEADLINE,
    Estate,
    admin_channel,
    attested,
    create_entry,
    estate,
    id_message,
    running,
)

__all__ = ["estate"]  # the fixture

MANY = 17_000
PAGE = 500
IDLE_SECONDS = 180
"""Three of the minute that the longest loop sleeps."""
WARP = 45


async def fill(one: Server, parent: SpiffeId, count: int) -> None:
    """Register leaf entries below an agent."""
    async with admin_channel(one) as admin:
        stub = Stub(admin, entries.BINDING)
        for start in range(0, count, 1000):
            batch = [
                entries_pb2.RegisteredEntry(
                    entry=types.Entry(
                        spiffe_id=spiffeid_pb2.SPIFFEID(trust_domain="example.org", path=f"/w/{number}"),
                        parent_id=id_message(parent),
                        selectors=[selector_pb2.Selector(type="unix", value=f"uid:{number}")],
                    )
                )
                for number in range(start, min(start + 1000, count))
            ]
            answer = await stub.BatchCreateEntry(entries_pb2.BatchCreateEntryRequest(entries=batch), timeout=60)
            assert not any(result.status.code for result in answer.results)


async def snapshot(stream: grpc.aio.UnaryStreamCall) -> list[int]:
    """Read a snapshot; the sizes of its pages."""
    sizes = []
    while True:
        message = await asyncio.wait_for(stream.read(), 30)
        sizes.append(len(message.snapshot.entries))
        if not message.snapshot.more:
            return sizes


async def next_news(stream: grpc.aio.UnaryStreamCall) -> watch_pb2.WatchResponse:
    while True:
        message = await asyncio.wait_for(stream.read(), 30)
        if message.WhichOneof("kind") != "heartbeat":
            return message


async def sync(channel: grpc.aio.Channel) -> tuple[list[int], dict[str, int]]:
    """Synchronise as SPIRE's agent does; the sizes of the pages of revisions, and each entry's revision."""
    call = Stub(channel, entry.BINDING).SyncAuthorizedEntries(timeout=60)
    await call.write(
        entry_pb2.SyncAuthorizedEntriesRequest(output_mask=types.EntryMask(spiffe_id=True, revision_number=True))
    )
    sizes, ids, got = [], [], {}
    while True:
        page = await call.read()
        assert not page.entries
        sizes.append(len(page.entry_revisions))
        ids += [one.id for one in page.entry_revisions]
        if not page.more:
            break
    for start in range(0, len(ids), 2 * PAGE):
        # Twice a page at once: it comes back in two.
        await call.write(entry_pb2.SyncAuthorizedEntriesRequest(ids=ids[start : start + 2 * PAGE]))
        more = True
        while more:
            page = await call.read()
            assert len(page.entries) <= PAGE
            assert not page.entry_revisions
            got |= {one.id: one.revision_number for one in page.entries}
            more = page.more
    await call.done_writing()
    assert await call.read() is grpc.aio.EOF
    assert got.keys() == set(ids)
    return sizes, got


async def test_seventeen_thousand_entries_of_one_agent_come_in_pages_and_one_change_alone(estate: Estate) -> None:
    async with running(estate) as one, attested(one) as (_, agent_id, channel):
        await fill(one, agent_id, MANY)
        sizes, got = await sync(channel)
        assert sizes == [PAGE] * (MANY // PAGE)
        assert len(got) == MANY
        stream = Stub(channel, watch.BINDING).Watch(watch_pb2.WatchRequest())
        assert await snapshot(stream) == [PAGE] * (MANY // PAGE)

        created = await create_entry(one, agent_id, "/new")
        news = await next_news(stream)
        assert [one.entry.id for one in news.delta.upserted] == [created.entry.id]
        async with admin_channel(one) as admin:
            await Stub(admin, entry.BINDING).BatchDeleteEntry(
                entry_pb2.BatchDeleteEntryRequest(ids=[created.entry.id]), timeout=DEADLINE
            )
        news = await next_news(stream)
        assert (list(news.delta.deleted_ids), list(news.delta.upserted)) == ([created.entry.id], [])
        # Nothing else was said in between, and nothing comes after.
        assert (await asyncio.wait_for(stream.read(), 30)).WhichOneof("kind") == "heartbeat"
        stream.cancel()

        # Who comes back hears of what he missed, not of everything.
        later = await create_entry(one, agent_id, "/later")
        stream = Stub(channel, watch.BINDING).Watch(watch_pb2.WatchRequest(cursor=news.seq, store=news.store))
        missed = await next_news(stream)
        assert [one.entry.id for one in missed.delta.upserted] == [later.entry.id]


class CountingStore:
    """A store that counts who asks it for what, by module."""

    def __init__(self, store: object) -> None:
        self._store = store
        self.asked: Counter[str] = Counter()

    def __getattr__(self, name: str) -> object:
        return getattr(self._store, name)

    async def write(self, act: object) -> object:
        self.asked[f"write {act.__module__}"] += 1
        return await self._store.write(act)

    async def read(self, query: object) -> object:
        self.asked[f"read {query.__module__}"] += 1
        return await self._store.read(query)

    def outside_the_key_room(self) -> dict[str, int]:
        """Asked by anybody but the key room, which looks after its authorities by the clock."""
        return {who: count for who, count in self.asked.items() if ".authority." not in who}


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[CountingStore]:
    made: list[CountingStore] = []
    open_real = app.open_store

    @asynccontextmanager
    async def open_counting(*arguments: object, **options: object) -> AsyncIterator[CountingStore]:
        async with open_real(*arguments, **options) as store:
            made.append(CountingStore(store))
            yield made[-1]

    monkeypatch.setattr(app, "open_store", open_counting)
    return made


async def poll(channel: grpc.aio.Channel) -> None:
    """Ask every five seconds, as SPIRE's agent does."""
    while True:
        await asyncio.sleep(5)
        call = Stub(channel, entry.BINDING).SyncAuthorizedEntries()
        await call.write(entry_pb2.SyncAuthorizedEntriesRequest())
        assert len((await call.read()).entries) == 1
        await Stub(channel, bundle.BINDING).GetBundle(bundle_pb2.GetBundleRequest())


def test_an_estate_in_which_nothing_changes_costs_the_store_nothing(
    estate: Estate, counted: list[CountingStore]
) -> None:
    loop = WarpedLoop()

    async def run() -> None:
        async with running(estate) as one, attested(one) as (_, agent_id, channel):
            created = await create_entry(one, agent_id, "/app")
            stream = Stub(channel, watch.BINDING).Watch(watch_pb2.WatchRequest())
            assert await snapshot(stream) == [1]
            await asyncio.sleep(3)  # what followed the last write has been seen to
            (store,) = counted
            store.asked.clear()
            heard: list[str] = []

            async def listen() -> None:
                while True:
                    heard.append((await stream.read()).WhichOneof("kind"))

            tasks = [asyncio.create_task(listen()), asyncio.create_task(poll(channel))]
            began, loop.factor = loop.time(), WARP
            while loop.time() - began < IDLE_SECONDS:
                await asyncio.sleep(1)
            loop.factor = 1
            assert store.outside_the_key_room() == {}
            assert not any(task.done() for task in tasks)
            assert set(heard) == {"heartbeat"}

            # And one change is one act, and one message.
            heard.clear()
            async with admin_channel(one) as admin:
                await Stub(admin, entry.BINDING).BatchUpdateEntry(
                    entry_pb2.BatchUpdateEntryRequest(
                        entries=[types.Entry(id=created.entry.id, hint="h")], input_mask=types.EntryMask(hint=True)
                    ),
                    timeout=DEADLINE,
                )
            async with asyncio.timeout(30):
                while "delta" not in heard:
                    await asyncio.sleep(0.05)
            assert heard.count("delta") == 1
            asked = store.outside_the_key_room()
            assert asked["write broker.server.identity.entries"] == 1
            assert not [who for who in asked if who.startswith("read") and "tasks" not in who]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        runner.run(run())
