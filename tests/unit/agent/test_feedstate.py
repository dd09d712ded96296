"""The compact feed: newest frame of each thing, in order, forgotten in time."""

import pytest

from broker._proto.broker.server.v1 import feed_pb2
from broker.agent import feedstate
from broker.agent.feedstate import FORGET_SLACK, FeedState, concerns


def frame(seq: int, kind: str = "task", **fields) -> feed_pb2.Frame:
    return feed_pb2.Frame(seq=seq, kind=kind, **fields)


def state(*frames: feed_pb2.Frame) -> FeedState:
    new = FeedState()
    new.replace("s", 10, [feed_pb2.FeedSnapshot(issuer="i", keys="k", frames=frames)])
    return new


def test_a_snapshot_replaces_everything() -> None:
    held = state(frame(1, task="a"), frame(2, task="b"))
    held.replace(
        "t",
        20,
        [
            feed_pb2.FeedSnapshot(issuer="j", keys="l", frames=[frame(15, task="c")], more=True),
            feed_pb2.FeedSnapshot(frames=[frame(16, task="d")]),
        ],
    )
    (message,) = held.snapshot()
    assert (message.seq, message.store, message.snapshot.issuer, message.snapshot.keys) == (20, "t", "j", "l")
    assert [one.task for one in message.snapshot.frames] == ["c", "d"]
    assert not message.snapshot.more


def test_only_the_newest_frame_of_each_thing_stays() -> None:
    held = state()
    for seq, one in enumerate(
        [
            dict(kind="subtree", root="r", epoch=1),
            dict(kind="session", session="w"),
            dict(kind="token", jti="j"),
            dict(kind="subtree", root="r", epoch=2),
            dict(kind="unknown"),
            dict(kind="unknown"),
        ],
        11,
    ):
        held.apply(frame(seq, **one))
    assert len(held) == 5
    assert [message.frame.seq for message in held.after(0)] == [12, 13, 14, 15, 16]
    assert held.after(14)[0].frame.seq == 15
    assert held.after(16) == []
    assert held.seq == 16


def test_new_keys_are_kept() -> None:
    held = state()
    held.apply(frame(11, "keys", keys="new"))
    assert next(iter(held.snapshot())).snapshot.keys == "new"


def test_frames_are_forgotten_after_their_time() -> None:
    held = state(frame(1, task="a", forget_at=100), frame(2, task="b", forget_at=10_000), frame(3, task="c"))
    held.forget(100 + FORGET_SLACK)
    assert len(held) == 3
    held.forget(101 + FORGET_SLACK)
    assert [message.frame.task for message in held.after(0)] == ["b", "c"]


def test_long_snapshots_are_cut(monkeypatch) -> None:
    monkeypatch.setattr(feedstate, "PAGE", 2)
    pages = list(state(*(frame(n, task=str(n)) for n in range(1, 6))).snapshot())
    assert [[one.seq for one in page.snapshot.frames] for page in pages] == [[1, 2], [3, 4], [5]]
    assert [page.snapshot.more for page in pages] == [True, True, False]
    assert len(list(state().snapshot())) == 1


NAMED = [
    ("subtree", "root"),
    ("task", "task"),
    ("session", "session"),
    ("token", "task"),
    ("user", "name"),
    ("agent", "name"),
    ("audience", "name"),
]


@pytest.mark.parametrize(("kind", "member"), NAMED)
def test_a_holder_hears_of_what_it_names(kind: str, member: str) -> None:
    ended = frame(11, kind, **{member: "mine"})
    assert concerns(ended, {"mine", "more"})
    assert not concerns(ended, {"other"})
    assert concerns(ended, frozenset()), "a verifier hears of all"


def test_what_is_of_everybody_or_unknown_is_told_to_each() -> None:
    for kind in ("keys", "something newer"):
        assert concerns(frame(11, kind), {"other"})


def test_a_snapshot_for_a_holder_is_of_its_own() -> None:
    held = state(frame(1, task="a"), frame(2, task="b"), frame(3, "user", name="alice"))
    (message,) = held.snapshot({"b", "alice"})
    assert [one.seq for one in message.snapshot.frames] == [2, 3]
    assert (message.seq, message.snapshot.issuer, message.snapshot.keys) == (10, "i", "k")
