"""When a client tries again: by itself, and as one of a fleet."""

import random
from itertools import pairwise

import pytest

from broker.transport.redial import FIRST, LONGEST, NARROW, Redial

FLEET = 500
HOUR = 3600.0


def attempts_of(chance: random.Random, gone: float, back: float) -> list[float]:
    """The moments of the attempts of one client whose server went and comes back, by the rule alone; the last one succeeds."""
    one, moment, moments = Redial(chance), gone, []
    while True:
        moments.append(moment)
        if moment >= back:
            return moments
        one._failures += 1
        moment += one._delay()


@pytest.mark.bears("O01")
def test_a_fleet_comes_back_evenly_within_half_a_minute_after_four_hours() -> None:
    chance = random.Random(4)
    back = 4 * HOUR
    # All lose their connections in the same moment, that of a server that is killed.
    fleet = [attempts_of(chance, 0.0, back) for _ in range(FLEET)]
    found = sorted(moments[-1] - back for moments in fleet)
    assert found[-1] <= LONGEST < 30
    assert found[-1] - found[0] > 0.95 * LONGEST
    in_one_second = max(sum(second <= moment < second + 1 for moment in found) for second in range(30))
    assert in_one_second <= 2.2 * FLEET / LONGEST
    for moments in fleet:
        distances = [after - before for before, after in pairwise(moments)]
        assert distances[0] <= FIRST
        assert max(distances) <= LONGEST
        assert len(moments) < 4 * HOUR / (LONGEST * (1 - NARROW)) + 15


def test_one_attempt_in_each_interval_whoever_asks() -> None:
    one = Redial(random.Random(1))
    assert [one.take(0.0), one.take(0.0)] == [0.0, 0.0]  # nothing is in the way
    one.failed(0.0)
    taken = []
    for step in range(100_000):
        now = step / 100
        for _ in range(5):
            if one.take(now) == 0:
                taken.append(now)
                if len(taken) % 2:
                    one.failed(now)  # others are still under way
    distances = [after - before for before, after in pairwise(taken)]
    assert 0 < min(distances) <= FIRST
    assert LONGEST * (1 - NARROW) <= min(distances[-20:]) <= max(distances) <= LONGEST + 0.01


def test_what_stands_in_the_way_is_told_and_ends_with_a_success_or_a_reason_to_hope() -> None:
    one = Redial()
    for _ in range(30):
        one.failed(1000.0)
    assert one.take(1001.0) == 0  # the first since
    assert LONGEST * (1 - NARROW) <= one.take(1001.0) <= LONGEST
    one.at_once()
    assert one.take(1001.0) == 0


def test_an_attempt_that_hangs_does_not_lengthen_the_interval() -> None:
    one = Redial()
    for _ in range(30):
        one.failed(0.0)
    now = one._next
    assert one.take(now) == 0
    one.failed(now + 10)
    assert one.take(now + LONGEST * (1 - NARROW) - 0.1) > 0
    assert one.take(now + LONGEST) == 0
    one.failed(now + LONGEST + 40)  # longer than the interval: not at once all the same
    assert one.take(now + LONGEST + 40) > 0
