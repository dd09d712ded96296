"""Steady time and leases, as values."""

from hypothesis import given
from hypothesis import strategies as st

from broker.server.tasks.leases import MOST_AT_ONCE, Leases, SteadyTime


def test_time_passes_with_the_looks() -> None:
    time = SteadyTime(100.0)
    assert time.look(101.0, is_listening=True) == 1.0
    assert time.at(101.5) == 1.5
    assert time.look(101.5, is_listening=True) == 1.5


def test_while_the_server_stood_still_nobody_was_silent() -> None:
    time = SteadyTime(100.0)
    assert time.look(160.0, is_listening=True) == MOST_AT_ONCE


def test_while_the_server_was_deaf_no_time_passed() -> None:
    time = SteadyTime(100.0)
    time.look(101.0, is_listening=True)
    assert time.look(102.0, is_listening=False) == 1.0
    assert time.look(103.0, is_listening=True) == 2.0


@given(st.lists(st.tuples(st.floats(0, 1e6), st.booleans()), max_size=30))
def test_steady_time_never_goes_back_and_never_jumps(steps: list[tuple[float, bool]]) -> None:
    time, monotonic, before = SteadyTime(0.0), 0.0, 0.0
    for step, is_listening in steps:
        monotonic += step
        now = time.look(monotonic, is_listening=is_listening)
        assert before <= now <= before + MOST_AT_ONCE
        before = now


def test_who_was_heard_is_due_after_the_lease_and_not_before() -> None:
    leases = Leases(30.0)
    leases.heard("a", 0.0)
    leases.heard("b", 10.0)
    assert leases.due(30.0, 10) == []
    assert leases.due(30.1, 10) == ["a"]
    assert leases.due(41.0, 10) == ["a", "b"]
    assert leases.due(41.0, 1) == ["a"]
    assert (leases.left("b", 30.0), leases.left("a", 31.0), leases.left("c", 0.0)) == (10.0, 0.0, 0.0)


def test_a_sign_of_life_begins_the_lease_anew_and_a_forgotten_one_is_never_due() -> None:
    leases = Leases(30.0)
    leases.heard("a", 0.0)
    leases.heard("b", 0.0)
    leases.heard("a", 20.0)
    leases.forget("b")
    leases.forget("nobody")
    assert leases.due(49.0, 10) == []
    assert leases.due(51.0, 10) == ["a"]
    assert ("a" in leases, "b" in leases, len(leases)) == (True, False, 1)
