"""Forgetting."""

import pytest

from broker.errors import Refused
from broker.server.store.ports import Store, Writer
from broker.tasks.causes import Cause
from tests.unit.server.store.samples import (
    HOUR,
    NOW,
    SECOND,
    ended,
    frame,
    record,
    session,
    task,
    token,
)


class TestSweep:
    async def test_only_what_is_past_its_time_goes(self, store: Store) -> None:
        def fill(w: Writer) -> None:
            w.add_join_token("old", None, NOW - 25 * HOUR)
            w.add_join_token("over", None, NOW)
            w.add_join_token("new", None, NOW + HOUR)
            w.remember("me", "old", "d", "r", NOW)
            w.remember("me", "new", "d", "r", NOW + HOUR)
            w.add_frame(frame(forget_at=int(NOW.timestamp())))
            w.add_frame(frame())
            w.put_session(session("ws_old", not_after=NOW - 25 * HOUR))
            w.put_session(session("ws_new"))
            w.record(record())

        await store.write(fill)
        assert await store.write(lambda w: w.sweep(NOW, 100)) == 4
        assert await store.write(lambda w: w.sweep(NOW, 100)) == 0
        assert await store.write(lambda w: w.recall("me", "old", "other")) is None
        assert await store.write(lambda w: w.recall("me", "new", "d")) == "r"
        assert (await store.write(lambda w: w.take_join_token("new", NOW))).token_hash == "new"
        for gone, words in (("old", "join token does not exist"), ("over", "join token expired")):
            with pytest.raises(Refused, match=words):
                await store.write(lambda w, gone=gone: w.take_join_token(gone, NOW))
        assert len(await store.read(lambda r: r.frames_since(0))) == 1
        assert await store.read(lambda r: (r.session("ws_old"), r.session("ws_new"))) == (None, session("ws_new"))
        assert (await store.read(lambda r: r.chain_head())).seq == 1
        assert await store.read(lambda r: r.change_head()) == 2

    async def test_a_tree_stays_until_all_of_it_is_long_dead(self, store: Store) -> None:
        root = task()
        child = task("tsk_c", parent=root)
        await store.write(lambda w: (w.add_task(root), w.add_task(child), w.add_token(token(of="tsk_1"))))
        await store.write(lambda w: (w.replace_task(ended(root), 1), w.bump_epoch("tsk_1")))

        day_after = NOW + 25 * HOUR
        assert await store.write(lambda w: w.sweep(day_after, 100)) == 0
        await store.write(lambda w: w.cascade("tsk_1", Cause.PARENT_ENDED, NOW + SECOND))
        assert await store.write(lambda w: w.sweep(NOW + HOUR, 100)) == 0
        assert await store.write(lambda w: w.sweep(day_after, 100)) == 4
        assert await store.read(lambda r: r.subtree("tsk_1")) == ()
        assert await store.read(lambda r: r.token("jti_1")) is None

    async def test_it_takes_no_more_than_it_may(self, store: Store) -> None:
        await store.write(lambda w: [w.add_join_token(f"h{n}", None, NOW - 25 * HOUR) for n in range(10)])
        assert [await store.write(lambda w: w.sweep(NOW, 4)) for _ in range(4)] == [4, 4, 2, 0]
