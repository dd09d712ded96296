from datetime import timedelta
from types import SimpleNamespace

from broker.server.stillness import AT_LEAST_EVERY, Stillness
from tests.unit.server.authority.world import StandingClock

MINUTE = timedelta(minutes=1)


def world(*, is_shared=False):
    store, clock = SimpleNamespace(written=5, is_shared=is_shared), StandingClock()
    return store, clock, Stillness(store, clock)


def look(still, due=None):
    """One look that finds nothing."""
    assert still.may_have_ended()
    still.looked(due)


def test_a_store_in_which_nothing_changes_is_looked_at_once():
    store, clock, still = world()
    look(still)
    clock.advance(24 * 60 * MINUTE)
    assert not still.may_have_ended()
    store.written += 1
    look(still)
    assert not still.may_have_ended()


def test_what_becomes_due_by_itself_is_looked_for_then():
    _, clock, still = world()
    look(still, due=clock.now() + MINUTE)
    assert not still.may_have_ended()
    clock.advance(MINUTE)
    look(still)
    assert not still.may_have_ended()


def test_a_look_that_found_something_is_followed_by_another():
    _, _, still = world()
    assert still.may_have_ended()
    assert still.may_have_ended()


def test_what_somebody_wrote_beside_the_look_is_looked_at():
    store, _, still = world()
    assert still.may_have_ended()
    store.written += 1
    still.looked(None)
    look(still)
    assert not still.may_have_ended()


def test_a_store_that_others_write_to_is_looked_at_now_and_then():
    _, clock, still = world(is_shared=True)
    look(still)
    clock.advance(timedelta(seconds=AT_LEAST_EVERY - 1))
    assert not still.may_have_ended()
    clock.advance(timedelta(seconds=1))
    look(still)
    assert not still.may_have_ended()
