"""Holders of tokens on one stream of the feed: opened with the first, for what they name, closed after the last. A real node agent."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from math import inf

from broker._proto.broker.server.v1 import tasks_pb2
from broker.clock import SystemClock
from broker.sdk.feed import STALE_AFTER
from broker.sdk.kept import KeptToken
from broker.sdk.watching import TokenWatch
from tests.fakes.running_agent import RunningAgent, estate, until
from tests.unit.tasks.world import TokenKey, claims, delegation, task

KEY = TokenKey()


@dataclass(eq=False)
class Holder:
    """One task, and how often it was told to look."""

    names: frozenset[str]
    looks: int = field(default=0)

    def drop_ended(self) -> None:
        self.looks += 1


def token(task_id: str) -> KeptToken:
    now = SystemClock().now()
    started = task(id=task_id, now=now, delegation=delegation(expires_at=now + timedelta(hours=1)))
    text = KEY.token(claims(started, now=now).to_payload())
    made = KeptToken.of(tasks_pb2.IssuedToken(access_token=text), SystemClock().monotonic())
    assert made is not None
    return made


@asynccontextmanager
async def watching() -> AsyncIterator[tuple[RunningAgent, TokenWatch]]:
    async with estate() as agent, agent.channel() as channel:
        watch = TokenWatch(channel, SystemClock())
        try:
            yield agent, watch
        finally:
            await watch.close()


def listeners(agent: RunningAgent) -> list[frozenset[str]]:
    return [one.about for one in agent.agent.relay._listeners]


async def test_one_stream_for_all_from_the_first_to_the_last() -> None:
    async with watching() as (agent, watch):
        one, two = token("tsk_1"), token("tsk_2")
        first, second = Holder(one.names), Holder(two.names)
        assert (watch.silence(one), listeners(agent)) == (inf, [])
        watch.follow(first)
        await until(lambda: watch.silence(one) < STALE_AFTER)
        assert watch.silence(two) == inf, "nobody would have told of it"
        watch.follow(second)
        await until(lambda: watch.silence(two) < STALE_AFTER)
        await until(lambda: listeners(agent) == [one.names | two.names])
        watch.follow(first)  # nothing new
        await agent.server.add_frame(kind="task", task="tsk_2", state="revoked")
        await until(lambda: watch.is_dead(two))
        assert not watch.is_dead(one)
        looks = second.looks
        assert looks > 0
        watch.leave(second)
        watch.leave(first)
        await until(lambda: listeners(agent) == [])
        assert second.looks == looks
        # What comes later opens it anew, and hears what was missed.
        await agent.server.add_frame(kind="subtree", root="tsk_1", epoch=9)
        watch.follow(first)
        await until(lambda: watch.is_dead(one))
        await watch.close()
        await until(lambda: listeners(agent) == [])


async def test_a_stream_that_breaks_comes_back_and_tells_what_was_missed() -> None:
    async with watching() as (agent, watch):
        one = token("tsk_1")
        watch.follow(Holder(one.names))
        await until(lambda: watch.silence(one) < STALE_AFTER)
        await agent.server.__aexit__()
        await until(lambda: not agent.agent.relay.is_live)
        before = watch.silence(one)
        await until(lambda: watch.silence(one) > before + 0.3)  # the agent does not speak for a server that is away
        async with agent.server:
            await agent.server.add_frame(kind="task", task="tsk_1", state="revoked")
            await until(lambda: watch.is_dead(one))
        await agent.server.__aenter__()
