"""The feed on the node: one subscription upward, any number of verifiers below, and no life of its own."""

import asyncio

import grpc
import pytest

from broker._proto.broker.server.v1 import feed_pb2
from broker._proto.service import Stub
from broker.agent.api.feed import MAX_NAMES
from broker.agent.listener import FEED
from tests.fakes.fake_server import entry_message
from tests.fakes.processes import held_connection
from tests.fakes.running_agent import HEADER, estate, until


class Verifier:
    """A subscriber as the SDK is one."""

    def __init__(self, channel, acked: int = 0, store: str = "") -> None:
        self.call = Stub(channel, FEED).Subscribe(metadata=HEADER)
        self.first = feed_pb2.SubscribeRequest(acked=acked, store=store)

    async def __aenter__(self):
        await self.call.write(self.first)
        return self

    async def __aexit__(self, *_) -> None:
        self.call.cancel()

    async def next(self, kind: str, seconds: float = 30.0) -> feed_pb2.FeedMessage:
        async with asyncio.timeout(seconds):
            while True:
                message = await self.call.read()
                if message.WhichOneof("kind") == kind:
                    return message

    async def ack(self, seq: int) -> None:
        await self.call.write(feed_pb2.SubscribeRequest(acked=seq, store="store-1"))


async def test_snapshot_then_frames_then_acknowledgements() -> None:
    async with estate() as agent, agent.channel() as channel:
        await agent.server.add_frame(kind="task", task="old", state="revoked")
        async with Verifier(channel) as one, Verifier(channel) as two:
            for verifier in (one, two):
                snapshot = (await verifier.next("snapshot")).snapshot
                assert (snapshot.issuer, [frame.task for frame in snapshot.frames]) == ("https://issuer", ["old"])
            seq = await agent.server.add_frame(kind="subtree", root="r", epoch=2)
            for verifier in (one, two):
                message = await verifier.next("frame")
                assert (message.seq, message.frame.root, message.frame.epoch) == (seq, "r", 2)
            assert len(agent.server.feed_cursors) == 1  # one subscription for both
            await one.ack(seq)
            await asyncio.sleep(0.1)
            assert seq not in agent.server.feed_acks  # the other has not
            await two.ack(seq)
            await until(lambda: agent.server.feed_acks[-1:] == [seq])


async def test_a_verifier_resumes_where_it_was() -> None:
    async with estate() as agent, agent.channel() as channel, Verifier(channel) as one:
        await one.next("snapshot")
        first = await agent.server.add_frame(kind="task", task="a")
        second = await agent.server.add_frame(kind="task", task="b")
        await one.next("frame")
        await one.next("frame")
        async with Verifier(channel, acked=first, store="store-1") as again:
            assert (await again.call.read()).frame.seq == second
        async with Verifier(channel, acked=first, store="other") as stranger:
            assert (await stranger.call.read()).WhichOneof("kind") == "snapshot"


@pytest.mark.bears("V08")
async def test_heartbeats_pass_and_the_servers_silence_is_heard() -> None:
    async with estate() as agent, agent.channel() as channel, Verifier(channel) as one:
        await one.next("snapshot")
        heard = []

        async def listen() -> None:
            while True:
                heard.append(await one.next("heartbeat", 60))

        listening = asyncio.create_task(listen())
        await until(lambda: len(heard) >= 3)
        agent.server.feed_beats = False
        # One may have been under way; then there is none for several times their distance.
        loop = asyncio.get_running_loop()
        deadline, last = loop.time() + 10, (0.0, -1)
        while loop.time() - last[0] < 1 or last[1] < 0:
            assert loop.time() < deadline
            if len(heard) != last[1]:
                last = (loop.time(), len(heard))
            await asyncio.sleep(0.05)
        listening.cancel()
        await asyncio.gather(listening, return_exceptions=True)


@pytest.mark.bears("V08")
async def test_while_the_server_is_away_nobody_is_told_anything() -> None:
    async with estate() as agent, agent.channel() as channel, Verifier(channel) as one:
        await one.next("snapshot")
        await agent.server.__aexit__()
        await until(lambda: not agent.agent.relay.is_live)
        async with Verifier(channel) as late:
            with pytest.raises(TimeoutError):
                await late.next("snapshot", 0.5)
        async with agent.server:
            seq = await agent.server.add_frame(kind="task", task="meanwhile")
            assert (await one.next("frame", 10)).seq == seq
        await agent.server.__aenter__()


async def test_another_store_means_a_new_snapshot_for_everybody() -> None:
    async with estate() as agent, agent.channel() as channel, Verifier(channel) as one:
        await one.next("snapshot")
        agent.server.store = "store-2"
        agent.server.frames, agent.server.feed_seq = [], 1
        await agent.server.add_frame(kind="task", task="new")
        message = await one.next("snapshot", 10)
        assert (message.store, [frame.task for frame in message.snapshot.frames]) == ("store-2", ["new"])


@pytest.mark.bears("W09")
async def test_a_verifier_that_does_not_read_holds_up_nobody() -> None:
    async with (
        estate() as agent,
        agent.channel() as channel,
        agent.channel() as other,
        Verifier(other) as slow,
        Verifier(channel) as one,
    ):
        await slow.next("snapshot")
        await one.next("snapshot")
        for n in range(200):
            await agent.server.add_frame(kind="subtree", root="the same", epoch=n, cause="x" * 1000)
        last = 0
        while last < agent.server.feed_seq:
            last = (await one.next("frame")).seq
        assert len(agent.agent.relay._state) == 1
        while (await slow.next("frame")).seq < last:
            pass


async def test_the_subscription_ends_with_its_last_listener_and_comes_back() -> None:
    async with estate() as agent, agent.channel() as channel:
        agent.agent.relay._linger = 0.2
        async with Verifier(channel) as one:
            await one.next("snapshot")
        await until(lambda: not agent.agent.relay.is_live)
        seq = await agent.server.add_frame(kind="task", task="meanwhile")
        async with Verifier(channel) as one:
            snapshot = await one.next("snapshot")
            frames = [frame.seq for frame in snapshot.snapshot.frames]
            assert seq in frames or (await one.next("frame")).seq == seq
        assert len(agent.server.feed_cursors) == 2


async def test_only_callers_with_an_identity_and_the_header() -> None:
    async with estate(entries=[entry_message("e1", "/x", ["unix:uid:4294967"])]) as agent, agent.channel() as channel:
        for metadata, code in [((), grpc.StatusCode.INVALID_ARGUMENT), (HEADER, grpc.StatusCode.PERMISSION_DENIED)]:
            call = Stub(channel, FEED).Subscribe(metadata=metadata)
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await call.read()
            assert refused.value.code() == code
        assert agent.server.feed_cursors == []


async def test_who_says_nothing_is_told_nothing() -> None:
    async with estate() as agent, agent.channel() as channel:
        call = Stub(channel, FEED).Subscribe(metadata=HEADER)
        await call.done_writing()
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await call.read()
        assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT


async def test_a_subscription_ends_with_its_process() -> None:
    async with (
        estate() as agent,
        held_connection(agent.socket, agent.directory / "r", "exit") as held,
        grpc.aio.insecure_channel(f"unix:{held.relay}") as channel,
        Verifier(channel) as one,
    ):
        await one.next("snapshot")
        await held.act()
        with pytest.raises((grpc.aio.AioRpcError, TimeoutError, AttributeError)):
            await one.next("snapshot", 5)
        await until(lambda: not agent.agent.relay._listeners)


async def test_a_subscription_ends_with_the_identity() -> None:
    async with estate() as agent, agent.channel() as channel, Verifier(channel) as one:
        await one.next("snapshot")
        agent.server.remove("e1")
        with pytest.raises(grpc.aio.AioRpcError) as ended:
            await one.next("snapshot")
        assert ended.value.code() == grpc.StatusCode.PERMISSION_DENIED


class Holder(Verifier):
    """A subscriber that holds tokens of a task."""

    def __init__(self, channel, *names: str) -> None:
        super().__init__(channel)
        self.first.about.extend(names)


async def test_a_holder_is_told_of_its_own_and_holds_up_nobody() -> None:
    async with estate() as agent, agent.channel() as channel, Holder(channel, "mine", "alice") as holder:
        await agent.server.add_frame(kind="task", task="before")
        assert not (await holder.next("snapshot")).snapshot.frames
        # Nobody verifies here: the server need not wait for whoever holds.
        seq = await agent.server.add_frame(kind="task", task="another's")
        await until(lambda: agent.server.feed_acks[-1:] == [seq])
        async with Verifier(channel) as one:
            await one.next("snapshot")
            for task in ("another's", "mine"):
                seq = await agent.server.add_frame(kind="task", task=task, cause="operator")
                await one.next("frame")
            assert (await holder.next("frame")).seq == seq
            await one.ack(seq)
            await until(lambda: agent.server.feed_acks[-1:] == [seq])
        await agent.server.add_frame(kind="user", name="alice")
        assert (await holder.next("frame")).frame.name == "alice"


async def test_a_holder_hears_that_the_server_speaks_while_it_speaks_of_others() -> None:
    async with estate() as agent, agent.channel() as channel, Holder(channel, "mine") as holder:
        await holder.next("snapshot")
        agent.server.feed_beats = False
        heard = asyncio.create_task(_heartbeats(holder, 4))
        loop = asyncio.get_running_loop()
        deadline, frames = loop.time() + 30, 0
        while not heard.done():
            assert loop.time() < deadline
            await agent.server.add_frame(kind="task", task=f"t{frames}")
            frames += 1
            await asyncio.sleep(0.02)
        # A heartbeat for some of them only: a second lies between two.
        assert await heard <= agent.server.feed_seq
        assert frames > 40


async def _heartbeats(holder: Holder, number: int) -> int:
    return [(await holder.next("heartbeat")).seq for _ in range(number)][-1]


async def test_a_holder_names_only_so_much() -> None:
    async with estate() as agent, agent.channel() as channel:
        async with Holder(channel, *map(str, range(MAX_NAMES + 1))) as holder:
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await holder.next("snapshot")
            assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        async with Holder(channel, *map(str, range(MAX_NAMES))) as holder:
            await holder.next("snapshot")
