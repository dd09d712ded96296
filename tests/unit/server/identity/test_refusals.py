from datetime import timedelta

from broker.server.identity.refusals import BURST, PER_SECOND, RefusalBudget
from tests.unit.server.authority.world import StandingClock


def test_a_flood_is_counted_and_not_written():
    clock = StandingClock()
    budget = RefusalBudget(clock)
    taken = [budget.take() for _ in range(int(BURST) + 5)]
    assert taken == [0] * int(BURST) + [None] * 5
    clock.advance(timedelta(seconds=1.5 / PER_SECOND))
    assert budget.take() == 5
    assert budget.take() is None
