"""Delays grow, stay bounded, and differ."""

import random

from broker.agent.backoff import FIRST, LONGEST, Backoff


def test_delays() -> None:
    backoff = Backoff(chance=random.Random(1))
    delays = [backoff.next() for _ in range(40)]
    assert FIRST / 4 <= delays[0] <= FIRST
    assert all(delay <= LONGEST for delay in delays)
    assert min(delays[20:]) >= LONGEST / 4
    assert len(set(delays)) == len(delays)
    backoff.reset()
    assert backoff.next() <= FIRST
