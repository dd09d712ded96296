"""Actions at their hour by the wall clock."""

import asyncio
import datetime as dt

import pytest

from broker.transport import lifetimes as module
from broker.transport.lifetimes import Lifetimes
from tests.unit.transport.clocks import HandClock

HOUR = dt.timedelta(hours=1)


async def test_runs_in_order_when_the_wall_clock_is_stepped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TICK", 0.005)
    clock, done = HandClock(), []
    lifetimes = Lifetimes(clock)
    lifetimes.start()
    lifetimes.add(clock.now() + 2 * HOUR, lambda: done.append("second"))
    lifetimes.add(clock.now() + HOUR, lambda: done.append("first"))
    forgotten = lifetimes.add(clock.now() + HOUR, lambda: done.append("never"))
    lifetimes.add(clock.now() + 9 * HOUR, lambda: done.append("later"))
    lifetimes.forget(forgotten)
    lifetimes.forget(forgotten)
    await asyncio.sleep(0.02)
    assert done == []
    clock.step = 3 * HOUR
    async with asyncio.timeout(30):
        while len(done) < 2:
            await asyncio.sleep(0.005)
    assert done == ["first", "second"]
    lifetimes.stop()


def test_what_ended_early_does_not_pile_up() -> None:
    clock = HandClock()
    lifetimes = Lifetimes(clock)
    for _ in range(1000):
        lifetimes.forget(lifetimes.add(clock.now() + HOUR, lambda: None))
    assert len(lifetimes._heap) < 100
