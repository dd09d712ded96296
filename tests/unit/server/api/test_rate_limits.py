import asyncio

import pytest

from broker.errors import Unavailable
from broker.server.api.access import LocalPeer
from broker.server.api.rate_limits import MAX_WAIT, Limits, RateLimiter
from broker.transport.grpc_status import status_code
from broker.transport.tls import Anonymous
from tests.unit.server.authority.world import StandingClock

ONE, TWO = Anonymous("192.0.2.1"), Anonymous("192.0.2.2")


class Ticking(StandingClock):
    """A clock on which sleeping takes no time."""

    def __init__(self) -> None:
        super().__init__()
        self.passed = 0.0
        self.slept: list[float] = []

    def monotonic(self) -> float:
        return self.passed

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.passed += seconds


class Call:
    """A call's context: how long its caller still waits."""

    def __init__(self, remaining: float | None = None) -> None:
        self.remaining = remaining

    def time_remaining(self) -> float | None:
        return self.remaining


@pytest.fixture
def clock():
    return Ticking()


def limiter(clock, per_second=1, **more):
    return RateLimiter(per_second, clock, what="attest agent", sleep=clock.sleep, **more)


async def test_a_call_waits_its_turn(clock):
    one = limiter(clock)
    for _ in range(4):
        await one.take(ONE, Call())
    assert clock.slept == [1.0, 1.0, 1.0]


async def test_addresses_do_not_wait_for_each_other(clock):
    one = limiter(clock)
    await one.take(ONE, Call())
    await one.take(TWO, Call())
    assert clock.slept == []


async def test_a_burst_is_one_second_s_worth_and_comes_back_with_time(clock):
    one = limiter(clock, 500)
    await one.take(ONE, Call(), 500)
    assert clock.slept == []
    clock.passed += 0.5
    await one.take(ONE, Call(), 250)
    assert clock.slept == []
    clock.passed += 3600
    await one.take(ONE, Call(), 500)
    await one.take(ONE, Call(), 1)
    assert clock.slept == [pytest.approx(0.002)]


async def test_more_than_a_burst_is_refused_and_costs_nothing(clock):
    one = limiter(clock, 500)
    with pytest.raises(Unavailable) as refused:
        await one.take(ONE, Call(), 501)
    assert (
        str(refused.value) == "rejecting request due to attest agent rate limiting: rate (501) exceeds burst size (500)"
    )
    assert status_code(refused.value).name == "RESOURCE_EXHAUSTED"
    await one.take(ONE, Call(), 500)
    assert clock.slept == []


async def test_who_would_wait_too_long_is_refused_at_once(clock):
    waiting = asyncio.Event()

    async def for_ever(_: float) -> None:
        await waiting.wait()

    one = RateLimiter(1, clock, what="x", sleep=for_ever)
    tasks = [asyncio.create_task(one.take(ONE, Call())) for _ in range(1 + int(MAX_WAIT))]
    await asyncio.sleep(0)
    for call in (Call(), Call(5.0)):
        with pytest.raises(Unavailable) as refused:
            await one.take(ONE, call)
        assert refused.value.reason == "rate_limited"
    # Its own deadline counts, too: who waits no longer than a second does not wait for two.
    two = limiter(clock)
    await two.take(ONE, Call())
    with pytest.raises(Unavailable):
        await two.take(ONE, Call(0.5))
    await two.take(ONE, Call(1.5))
    waiting.set()
    await asyncio.gather(*tasks)


async def test_who_gives_up_does_not_hold_up_the_others(clock):
    one = RateLimiter(1, clock, what="x", sleep=asyncio.sleep)
    await one.take(ONE, Call())
    waits = asyncio.create_task(one.take(ONE, Call()))
    await asyncio.sleep(0)
    waits.cancel()
    await asyncio.gather(waits, return_exceptions=True)
    one._sleep = clock.sleep
    await one.take(ONE, Call())
    assert clock.slept == [1.0]


async def test_only_so_many_addresses_are_remembered(clock):
    one = limiter(clock, most=10)
    for number in range(100):
        await one.take(Anonymous(f"192.0.2.{number}"), Call())
    assert len(one) == 10


async def test_a_network_of_ipv6_is_one_address(clock):
    one = limiter(clock)
    await one.take(Anonymous("2001:db8::1"), Call())
    await one.take(Anonymous("2001:db8::2"), Call())
    await one.take(Anonymous("2001:db8:1::1"), Call())
    assert clock.slept == [1.0]
    await one.take(Anonymous("::ffff:192.0.2.1"), Call())
    await one.take(Anonymous("192.0.2.1"), Call())
    assert clock.slept == [1.0, 1.0]


async def test_the_admin_socket_is_not_limited(clock):
    one = limiter(clock)
    for _ in range(10):
        await one.take(LocalPeer(0, 1), Call(), 1000)
    assert clock.slept == []
    assert len(one) == 0


async def test_two_of_the_limits_can_be_switched_off(clock):
    off = Limits.of(clock, attestation=False, signing=False)
    for one in (off.attest, off.certificates, off.tokens):
        await one.take(ONE, Call(), 1000)
    for one in (off.status, off.keys):
        with pytest.raises(Unavailable):
            await one.take(ONE, Call(), 1000)
    on = Limits.of(clock, attestation=True, signing=True)
    for one, burst in ((on.attest, 1), (on.certificates, 500), (on.tokens, 500), (on.keys, 500), (on.status, 10)):
        await one.take(ONE, Call(), burst)
        with pytest.raises(Unavailable):
            await one.take(ONE, Call(), burst + 1)
