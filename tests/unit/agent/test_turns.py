"""Who goes next: turns, shares and places."""

from broker.agent.turns import Turns


def taken(turns: Turns[str]) -> list[str]:
    found = []
    while (one := turns.take()) is not None:
        found.append(one)
    return found


def test_holders_take_turns_and_each_keeps_its_order() -> None:
    turns: Turns[str] = Turns(100, 1.0)
    for one in ("a1", "a2", "a3", "b1", "c1", "b2"):
        turns.put(one[0], one)
    assert len(turns) == 6
    assert taken(turns) == ["a1", "b1", "c1", "a2", "b2", "a3"]
    assert len(turns) == 0


def test_one_holder_has_a_share_and_the_others_the_rest() -> None:
    turns: Turns[str] = Turns(4, 0.75)
    for number in range(5):
        turns.put("a", f"a{number}")
    assert taken(turns) == ["a0", "a1", "a2"]
    turns.put("b", "b0")
    turns.put("b", "b1")
    assert taken(turns) == ["b0"]
    turns.leave("a")
    # Whose turn it is: the one that had the last place longest ago.
    assert taken(turns) == ["a3"]
    turns.leave("b")
    assert taken(turns) == ["b1"]
    turns.leave("a")
    turns.leave("b")
    assert taken(turns) == ["a4"]


def test_who_withdraws_is_not_taken_and_keeps_nothing() -> None:
    turns: Turns[str] = Turns(2, 1.0)
    turns.put("a", "a0")
    turns.put("a", "a1")
    turns.withdraw("a", "a0")
    turns.withdraw("a", "a0")
    turns.withdraw("b", "b0")
    assert taken(turns) == ["a1"]
    turns.put("b", "b0")
    turns.withdraw("b", "b0")
    assert (len(turns), turns.take()) == (0, None)


def test_what_waits_can_be_taken_out_at_once() -> None:
    turns: Turns[str] = Turns(1, 1.0)
    turns.put("a", "a0")
    turns.put("b", "b0")
    assert turns.take() == "a0"
    assert turns.drain() == ["b0"]
    assert len(turns) == 0
    # The place that was taken still is.
    turns.put("b", "b1")
    assert turns.take() is None
