"""Verifiers attacked through what reaches them: the clock, the order of the feed's messages, a feed that is not there."""

import random
import ssl
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from datetime import datetime, timedelta

import pytest

from broker._proto.broker.server.v1 import feed_pb2
from broker.clock import SystemClock
from broker.errors import BrokerError, Unavailable
from broker.sdk import Workload
from broker.sdk.verify import TokenVerifier
from broker.spiffe.jose import parse_compact
from tests.attacks.tasks.binding_rig import desk, short_directory
from tests.attacks.tasks.listening import Ear, listening
from tests.attacks.tasks.outward_rig import SERVICE, TICKETS, TRIAGE, Rig, rig
from tests.fakes.oidc import OidcIssuer
from tests.fakes.running_agent import until

pytestmark = pytest.mark.timeout(180)


class Stepped:
    """The machine's clock, and by how much somebody has set it."""

    def __init__(self) -> None:
        self.by = timedelta(0)

    def now(self) -> datetime:
        return SystemClock().now() + self.by

    def monotonic(self) -> float:
        return SystemClock().monotonic()


@pytest.fixture
async def house() -> AsyncIterator[Rig]:
    async with rig() as made:
        yield made


def said(verifier: TokenVerifier, token: str, chain: ssl.SSLObject | tuple[bytes, ...]) -> str:
    try:
        verifier.verify_now(token, chain)
    except BrokerError as error:
        return error.reason
    return "alive"


@pytest.mark.bears("V09", "JW20", "RV07")
async def test_a_clock_that_is_set_and_a_start_without_a_feed_revive_nothing(house: Rig) -> None:
    chain, _, _ = house.files[TRIAGE]
    clock = Stepped()
    async with AsyncExitStack() as stack:
        me = await stack.enter_async_context(Workload.connect(f"unix:{house.agent.socket}", spiffe_id=SERVICE))
        known = await TokenVerifier.discover(house.issuer, audience=TICKETS, workload=me, timeout=30, clock=clock)
        await stack.enter_async_context(known)
        ended, living = [(await house.issued())["access_token"] for _ in range(2)]
        assert (said(known, ended, chain), said(known, living, chain)) == ("alive", "alive")
        await house.post("/revoke", [("token", ended), ("end", "task")])
        await until(lambda: said(known, ended, chain) == "task_ended")
        for back in (-60, -3600, -86400):
            clock.by = timedelta(seconds=back)
            assert (said(known, ended, chain), said(known, living, chain)) == ("task_ended", "alive")
        # Forward beyond its life and the leeway of half a minute, and back: what has expired stays so.
        left = int(str(parse_compact(living).payload["exp"])) - SystemClock().now().timestamp()
        clock.by = timedelta(seconds=left + 25)
        assert said(known, living, chain) == "alive"
        clock.by = timedelta(seconds=left + 32)
        assert said(known, living, chain) == "token_expired"
        for back in (0, -3600, -86400):
            clock.by = timedelta(seconds=back)
            assert "alive" not in (said(known, ended, chain), said(known, living, chain))

        # One that starts while nobody tells it anything accepts nothing, also what another has accepted a moment ago.
        fresh = (await house.issued())["access_token"]
        deaf = TokenVerifier(me, house.issuer, known._audience, known._risk, SystemClock())
        with pytest.raises(Unavailable) as caught:
            deaf.verify_now(fresh, chain)
        assert caught.value.reason == "feed_unknown"
        await deaf.aclose()


@pytest.mark.bears("RV08", "RV07")
async def test_the_feeds_messages_in_any_order_twice_or_with_one_missing(oidc: OidcIssuer) -> None:
    """What a real server told, played to other verifiers as a bad network would."""
    with short_directory() as directory:
        async with desk(directory, oidc) as at:
            agent, tokens = await at.process("ws_1"), []
            async with listening(at.channel) as ear:
                (snapshot,) = ear.heard
                for number in range(6):
                    issued = (await agent.http.post("/token", data=at.form())).json()
                    tokens.append(issued["access_token"])
                    if number % 2:
                        await agent.http.post("/revoke", data={"token": tokens[-1]})
                    else:
                        await agent.http.post(f"/tasks/{issued['task']}/complete")
                    assert await ear.refuses(tokens[-1]) in {"task_ended", "token_revoked"}
                told = [message for message in ear.heard if message.WhichOneof("kind") == "frame"]
            _bad_network(snapshot, told, tokens)
            # A frame that was missed is made up for by the snapshot with which the next stream begins.
            missed = Ear(None)
            for message in (snapshot, *told[1:]):
                missed.take(message)
            assert missed.says(tokens[0]) == "alive"
            async with listening(at.channel) as again:
                missed.take(again.heard[0])
            assert "alive" not in {missed.says(token) for token in tokens}


def _bad_network(snapshot: feed_pb2.FeedMessage, told: list[feed_pb2.FeedMessage], tokens: list[str]) -> None:
    luck = random.Random(4711)
    for _ in range(50):
        other, dead = Ear(None), set[str]()
        other.take(snapshot)
        for message in luck.sample(2 * told, 2 * len(told)):
            other.take(message)
            now_dead = {token for token in tokens if other.says(token) != "alive"}
            assert dead <= now_dead, "nothing comes back"
            dead = now_dead
        assert (dead, other.state.seq) == (set(tokens), max(message.seq for message in told))
