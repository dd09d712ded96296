"""Calls begin a few at a time, in the order of asking, and nobody waits for ever."""

import asyncio

import pytest

from broker.transport import turnstile
from broker.transport.turnstile import MAX_BEGINNING, Turnstile


async def test_a_few_pass_and_the_rest_in_their_order_as_those_are_taken_up() -> None:
    one, went = Turnstile(), []
    for _ in range(MAX_BEGINNING):
        assert one.ask(1, lambda: went.append("never"))
    assert not one.ask(2, lambda: went.append("second"))
    assert not one.ask(1, lambda: went.append("third"))
    assert one.ask(0, lambda: went.append("never"))  # what begins no call never waits
    one.begun()
    assert went == ["second"]  # it brought two: one place too many
    one.begun()
    assert went == ["second"]
    one.begun()
    assert went == ["second", "third"]
    one.close()


async def test_calls_that_are_never_taken_up_do_not_block_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turnstile, "STALL", 0.01)
    one, went = Turnstile(), asyncio.Event()
    assert one.ask(10 * MAX_BEGINNING, went.set)
    assert not one.ask(1, went.set)
    await asyncio.wait_for(went.wait(), 30)
    one.close()


async def test_who_is_closed_lets_nobody_through() -> None:
    one, went = Turnstile(), []
    one.ask(10 * MAX_BEGINNING, lambda: went.append(1))
    one.ask(1, lambda: went.append(1))
    one.close()
    for _ in range(10 * MAX_BEGINNING):
        one.begun()
    assert went == []
