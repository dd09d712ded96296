"""What a verifier knows of ends stays known for as long as the latest word of them says, to the second."""

from typing import Any

import pytest

from broker._proto.broker.server.v1 import feed_pb2
from broker.errors import Refused
from broker.sdk.feed import FORGET_EVERY, FeedState
from tests.unit.sdk.world import heartbeat

ENDS = [
    {"kind": "subtree", "root": "tsk_1", "epoch": 1},
    {"kind": "task", "task": "tsk_1"},
    {"kind": "session", "session": "ws_1"},
    {"kind": "token", "jti": "jti_1"},
]


def told(state: FeedState, forget_at: int, members: Any) -> None:
    frame = feed_pb2.Frame(seq=2, forget_at=forget_at, **members)
    state.apply(feed_pb2.FeedMessage(seq=2, store="s1", frame=frame), monotonic=0, now=0)


def is_alive_at(state: FeedState, now: int) -> bool:
    """Let so many messages come at ``now`` that what may be forgotten is."""
    for number in range(FORGET_EVERY):
        state.apply(heartbeat(number), monotonic=0, now=now)
    try:
        state.require_alive(root="tsk_1", epoch=0, task="tsk_1", session="ws_1", jti="jti_1")
    except Refused:
        return False
    return True


@pytest.mark.parametrize("members", ENDS, ids=lambda members: members["kind"])
def test_an_end_is_forgotten_when_it_may_be_and_no_second_before(members: Any) -> None:
    state = FeedState()
    told(state, 100, members)
    assert not is_alive_at(state, 99)
    assert is_alive_at(state, 100)


@pytest.mark.parametrize("members", ENDS, ids=lambda members: members["kind"])
def test_a_later_frame_shortens_no_memory(members: Any) -> None:
    state = FeedState()
    told(state, 100, members)
    told(state, 50, members)
    assert not is_alive_at(state, 99)
