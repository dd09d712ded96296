"""Task tokens, frames of the feed, answers that are kept."""

import asyncio
from dataclasses import replace

import pytest

from broker.errors import Conflict, NotFound
from broker.server.store.ports import Store, Writer
from broker.server.store.rows import Change, FrameRow
from tests.unit.server.store.samples import (
    HOUR,
    NOW,
    SECOND,
    frame,
    task,
    token,
)


class TestTokens:
    async def test_they_are_added_counted_and_revoked_once(self, store: Store) -> None:
        bare = token("jti_2", session=None, x5t=None)
        await store.write(lambda w: (w.add_task(task()), w.add_token(token()), w.add_token(bare)))
        assert await store.read(lambda r: (r.token("jti_1"), r.token("jti_2"), r.token("no"))) == (token(), bare, None)
        assert await store.read(lambda r: (r.tokens_issued("tsk_1"), r.tokens_issued("no"))) == (2, 0)

        revoked = replace(token(), revoked_at=NOW + SECOND)
        assert await store.write(lambda w: w.revoke_token("jti_1", NOW + SECOND)) == revoked
        assert await store.write(lambda w: w.revoke_token("jti_1", NOW + HOUR)) is None
        assert await store.write(lambda w: w.revoke_token("no", NOW)) is None
        assert await store.read(lambda r: r.token("jti_1")) == revoked

    async def test_a_jti_is_taken_once_and_its_task_must_be_there(self, store: Store) -> None:
        with pytest.raises(NotFound):
            await store.write(lambda w: w.add_token(token()))
        await store.write(lambda w: (w.add_task(task()), w.add_token(token())))
        with pytest.raises(Conflict) as conflict:
            await store.write(lambda w: w.add_token(token(scope="more")))
        assert conflict.value.reason == "token_exists"


class TestFrames:
    async def test_a_frame_is_a_change_of_the_same_number(self, store: Store) -> None:
        told: list[Change] = []
        store.subscribe(told.extend)
        await store.write(lambda w: w.change("entry", "x", ""))
        seq = await store.write(lambda w: w.add_frame(frame()))

        assert (seq, told[-1].seq, told[-1].kind, told[-1].key) == (2, 2, "frame", "tsk_1")
        rows = await store.read(lambda r: r.frames_since(0))
        assert rows == (FrameRow.of(told[-1]),)
        assert replace(rows[0], seq=0) == FrameRow.of(replace(told[-1], seq=0))
        assert (rows[0].root, rows[0].committed_at, rows[0].epoch) == ("tsk_1", frame().committed_at, 1)

    async def test_the_snapshot_holds_what_a_living_token_may_meet(self, store: Store) -> None:
        over = frame(forget_at=int(NOW.timestamp()))
        numbers = await store.write(
            lambda w: [w.add_frame(each) for each in (over, frame(), frame(kind="token", jti="j"))]
        )
        assert [row.seq for row in await store.read(lambda r: r.live_frames(NOW))] == numbers[1:]
        assert [row.seq for row in await store.read(lambda r: r.frames_since(numbers[0]))] == numbers[1:]


class TestIdempotency:
    async def test_an_answer_is_given_again_to_the_same_question_only(self, store: Store) -> None:
        await store.write(lambda w: w.remember("me", "k1", "digest", "answer", NOW + HOUR))
        assert await store.write(lambda w: w.recall("me", "k1", "digest")) == "answer"
        assert await store.write(lambda w: w.recall("you", "k1", "digest")) is None
        assert await store.write(lambda w: w.recall("me", "k2", "digest")) is None
        for ask in (
            lambda w: w.recall("me", "k1", "other"),
            lambda w: w.remember("me", "k1", "other", "answer", NOW + HOUR),
        ):
            with pytest.raises(Conflict) as conflict:
                await store.write(ask)
            assert conflict.value.reason == "idempotency_mismatch"

    async def test_of_two_at_once_one_does_the_work(self, store: Store) -> None:
        done: list[int] = []

        def act(w: Writer) -> str:
            kept = w.recall("me", "k", "d")
            if kept is None:
                done.append(1)
                kept = "made once"
                w.remember("me", "k", "d", kept, NOW + HOUR)
            return kept

        assert await asyncio.gather(*(store.write(act) for _ in range(20))) == ["made once"] * 20
        assert len(done) == 1
