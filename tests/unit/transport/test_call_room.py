"""Places for calls: bounded in all, and for one holder."""

import pytest

from broker.errors import Unavailable
from broker.transport.call_room import CallRoom


def test_one_holder_leaves_places_for_others_and_all_together_are_bounded() -> None:
    room = CallRoom(4)
    for _ in range(3):
        room.enter("a")
    with pytest.raises(Unavailable) as refused:
        room.enter("a")
    assert refused.value.reason == "too_many_calls"
    room.enter("b")
    with pytest.raises(Unavailable):
        room.enter("c")
    room.leave("a")
    room.enter("c")
    assert len(room) == 4
    for holder in "aabc":
        room.leave(holder)
    assert len(room) == 0
    assert not room._by_holder
