"""The feed: a snapshot, then every frame in order, and a number for how long it took."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from broker._proto.broker.server.v1 import feed_pb2
from broker.errors import Refused
from broker.sdk.feed import FeedState
from broker.server.api.access import LocalPeer
from broker.server.api.grpc import feed as feed_api
from broker.server.store.ports import Store
from broker.server.store.rows import FrameRow
from broker.server.tasks import feed as feed_module
from broker.server.tasks.deliveries import BUCKETS, Deliveries, Histogram, Outcome
from broker.server.tasks.feed import Feed, Heartbeat, Snapshot, Subscription, announce_keys
from broker.spiffe import BundleSet, SpiffeId, verify_x509_svid
from broker.tasks.keyset import read_keys
from broker.transport.tls import Anonymous, SvidPeer
from tests.fakes.oidc import OidcIssuer
from tests.unit.server.tasks.estate import AGENT, ISSUER, Estate, running
from tests.unit.transport.pki import Authority


async def first_pages(subscription: Subscription) -> list[Snapshot]:
    pages: list[Snapshot] = []
    while not pages or pages[-1].more:
        message = await anext(subscription)
        assert isinstance(message, Snapshot)
        pages.append(message)
    return pages


async def next_frame(subscription: Subscription) -> FrameRow:
    async with asyncio.timeout(30):
        while True:
            message = await anext(subscription)
            if isinstance(message, FrameRow):
                return message
            assert isinstance(message, Heartbeat)


async def test_a_listener_first_learns_all_that_is_dead(estate: Estate) -> None:
    task = await estate.start()
    over = await estate.lifecycle.complete(estate.actor(), task.id)
    with estate.feed.subscribe() as subscription:
        (page,) = await first_pages(subscription)
        assert page.issuer == ISSUER
        assert set(read_keys(page.keys)) == {"task-key-1"}
        assert [(frame.kind, frame.root, frame.seq) for frame in page.frames] == [("subtree", task.id, over.frame_seq)]
        assert page.seq >= over.frame_seq


async def test_then_every_frame_in_order(estate: Estate) -> None:
    tasks = [await estate.start() for _ in range(5)]
    with estate.feed.subscribe() as one, estate.feed.subscribe() as two:
        await first_pages(one)
        await first_pages(two)
        assert estate.feed.subscribers == 2
        for task in tasks:
            await estate.lifecycle.complete(estate.actor(), task.id)
        for subscription in (one, two):
            frames = [await next_frame(subscription) for _ in tasks]
            assert [frame.root for frame in frames] == [task.id for task in tasks]
            assert [frame.seq for frame in frames] == sorted(frame.seq for frame in frames)
    assert estate.feed.subscribers == 0


class CutOff:
    """A store that can say that it is cut off."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.is_current = True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)


@pytest.mark.bears("R05", "V08")
async def test_a_server_that_is_cut_off_from_the_store_is_silent_until_it_knows_again(estate: Estate) -> None:
    store = CutOff(estate.store)
    feed = Feed(store, estate.keys, estate.clock, issuer=ISSUER, heartbeat=0.02)  # type: ignore[arg-type]
    await feed.start()
    with feed.subscribe() as subscription, feed.subscribe() as newcomer:
        await first_pages(subscription)
        assert isinstance(await anext(subscription), Heartbeat)
        store.is_current = False
        waiting = [asyncio.ensure_future(anext(each)) for each in (subscription, newcomer)]
        await asyncio.sleep(0.2)
        assert [each.done() for each in waiting] == [False, False]
        store.is_current = True
        async with asyncio.timeout(30):
            heard = [await each for each in waiting]
        assert [type(each) for each in heard] == [Heartbeat, Snapshot]
    feed.stop()


@pytest.mark.bears("RV07")
async def test_silence_is_never_longer_than_a_heartbeat(estate: Estate) -> None:
    with estate.feed.subscribe() as subscription:
        await first_pages(subscription)
        async with asyncio.timeout(2):
            for _ in range(3):
                assert isinstance(await anext(subscription), Heartbeat)


@pytest.mark.bears("V08", "RV08")
async def test_who_is_too_slow_gets_a_new_snapshot(estate: Estate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed_module, "MAX_QUEUED", 3)
    tasks = [await estate.start() for _ in range(5)]
    with estate.feed.subscribe() as subscription:
        await first_pages(subscription)
        for task in tasks:
            await estate.lifecycle.complete(estate.actor(), task.id)
        (page,) = await first_pages(subscription)
        assert {frame.root for frame in page.frames} == {task.id for task in tasks}
        extra = await estate.start()
        await estate.lifecycle.complete(estate.actor(), extra.id)
        assert (await next_frame(subscription)).root == extra.id


async def test_a_large_snapshot_comes_in_pages(estate: Estate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed_module, "SNAPSHOT_PAGE", 2)
    for _ in range(5):
        task = await estate.start()
        await estate.lifecycle.complete(estate.actor(), task.id)
    with estate.feed.subscribe() as subscription:
        pages = await first_pages(subscription)
        assert [len(page.frames) for page in pages] == [2, 2, 1]
        # What is committed between two pages comes after them.
    assert len({page.seq for page in pages}) == 1


async def test_frames_are_forgotten_when_nothing_they_kill_can_live(estate: Estate) -> None:
    task = await estate.start()
    await estate.lifecycle.complete(estate.actor(), task.id)
    assert estate.feed.frame_of(task.id) > 0
    estate.clock.advance(299)
    assert len(estate.feed.snapshot()[0].frames) == 1
    estate.clock.advance(100)
    assert estate.feed.snapshot()[0].frames == ()
    assert estate.feed.frame_of(task.id) == 0


@pytest.mark.bears("RV09")
async def test_a_restarted_server_remembers_what_is_dead(tmp_path: Path, oidc: OidcIssuer) -> None:
    async with running(tmp_path, oidc) as estate:
        task = await estate.start()
        over = await estate.lifecycle.complete(estate.actor(), task.id)
    async with running(tmp_path, oidc) as again:
        assert again.feed.frame_of(task.id) == over.frame_seq
        with again.feed.subscribe() as subscription:
            (page,) = await first_pages(subscription)
            assert [frame.root for frame in page.frames] == [task.id]


async def test_new_keys_are_told_before_their_first_use(estate: Estate) -> None:
    with estate.feed.subscribe() as subscription:
        await first_pages(subscription)
        announce = announce_keys(estate.clock)
        estate.keys.rotate()
        await estate.store.write(lambda writer: announce(writer, estate.keys.task_keys()))
        frame = await next_frame(subscription)
        assert frame.kind == "keys"
        assert set(read_keys(frame.keys)) == {"task-key-1", "task-key-2"}
    assert estate.feed.snapshot()[0].frames == (), "the snapshot says the keys of its own moment"


# ---- acknowledgements


async def test_the_delay_of_each_frame_is_measured(estate: Estate) -> None:
    task = await estate.start()
    with estate.feed.subscribe() as one, estate.feed.subscribe() as two:
        await first_pages(one)
        await first_pages(two)
        over = await estate.lifecycle.complete(estate.actor(), task.id)
        assert estate.feed.delivery(over.frame_seq).outcome is Outcome.UNKNOWN
        estate.clock.advance(0.02)
        one.ack(over.frame_seq, estate.store.id)
        one.ack(over.frame_seq, estate.store.id)
        two.ack(over.frame_seq, "another store")
        two.ack(over.frame_seq + 1000, estate.store.id)
        delivery = estate.feed.delivery(over.frame_seq)
        assert (delivery.outcome, delivery.expected, delivery.acked) == (Outcome.UNKNOWN, 2, 1)
        estate.clock.advance(0.05)
        two.ack(over.frame_seq, estate.store.id)
        delivery = estate.feed.delivery(over.frame_seq)
        assert (delivery.outcome, delivery.acked) == (Outcome.CLOSED, 2)
        assert delivery.max_seconds == pytest.approx(0.07)
    histogram = estate.feed.deliveries.histogram
    assert histogram.count == 2
    assert histogram.max == pytest.approx(0.07)


async def test_who_leaves_without_a_word_makes_it_partial(estate: Estate) -> None:
    task = await estate.start()
    with estate.feed.subscribe() as one:
        await first_pages(one)
        with estate.feed.subscribe() as two:
            await first_pages(two)
            over = await estate.lifecycle.complete(estate.actor(), task.id)
            one.ack(over.frame_seq, estate.store.id)
        assert estate.feed.delivery(over.frame_seq).outcome is Outcome.PARTIAL
    assert estate.feed.delivery(over.frame_seq + 1).outcome is Outcome.UNKNOWN


def test_delays_fall_into_buckets() -> None:
    histogram = Histogram()
    for seconds in (0.0005, 0.001, 0.0011, 9.0):
        histogram.add(seconds)
    assert histogram.counts[:2] == [2, 1]
    assert histogram.counts[len(BUCKETS)] == 1
    seen: list[float] = []
    deliveries = Deliveries(seen.append)
    deliveries.sent(7, ["a"], 1.0)
    deliveries.acked("a", 0, 9, 1.5)
    assert seen == [0.5]


# ---- over the wire


def peer(path: str, trust_domain: str = "example.org") -> SvidPeer:
    authority = Authority(trust_domain)
    chain = list(authority.issue(path).chain_der)
    return SvidPeer(verify_x509_svid(chain, BundleSet.of(authority.bundle), now=datetime.now(UTC)))


async def listen(
    feed: Feed, caller: Any, acks: "asyncio.Queue[feed_pb2.SubscribeRequest]"
) -> AsyncIterator[feed_pb2.FeedMessage]:
    async def requests() -> AsyncIterator[feed_pb2.SubscribeRequest]:
        while True:
            yield await acks.get()

    service = feed_api.Feed(feed, AGENT.trust_domain)
    async with aclosing(service.Subscribe(requests(), None, caller)) as messages:  # type: ignore[arg-type]
        async for message in messages:
            yield message


async def test_the_sdk_understands_what_the_server_sends(estate: Estate) -> None:
    task = await estate.start()
    issued = await estate.issue(task)
    state = FeedState()
    claims = estate.verify(issued).claims
    acks: asyncio.Queue[feed_pb2.SubscribeRequest] = asyncio.Queue()
    stream = listen(estate.feed, peer("/verifier"), acks)

    def alive() -> None:
        state.require_alive(
            root=claims.task.root,
            epoch=claims.task.epoch,
            task=claims.task.id,
            session=claims.cnf.session,
            jti=claims.jti,
        )

    async def take() -> feed_pb2.FeedMessage:
        message = await anext(stream)
        state.apply(message, monotonic=0.0, now=int(estate.clock.now().timestamp()))
        return message

    await take()
    alive()
    over = await estate.lifecycle.complete(estate.actor(), task.id)
    message = await take()
    while message.WhichOneof("kind") != "frame":
        message = await take()
    assert message.frame.seq == message.seq == over.frame_seq
    assert message.frame.committed_at == int(estate.clock.now().timestamp() * 1000)
    with pytest.raises(Refused):
        alive()
    await acks.put(feed_pb2.SubscribeRequest(acked=state.seq, store=state.store))
    while estate.feed.delivery(over.frame_seq).outcome is not Outcome.CLOSED:
        await take()
    await stream.aclose()  # type: ignore[attr-defined]
    assert estate.feed.subscribers == 0


async def test_who_may_listen(estate: Estate) -> None:
    for caller in (Anonymous(), peer("/x", "other.org")):
        with pytest.raises(Refused):
            await anext(listen(estate.feed, caller, asyncio.Queue()))
    for caller in (peer("/spire/agent/join_token/one"), peer("/service"), LocalPeer(0, 1)):
        stream = listen(estate.feed, caller, asyncio.Queue())
        assert (await anext(stream)).snapshot.issuer == ISSUER
        await stream.aclose()  # type: ignore[attr-defined]
    assert SpiffeId("spiffe://example.org/service").is_member_of(AGENT.trust_domain)
