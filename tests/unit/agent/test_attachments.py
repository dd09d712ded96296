"""Streams of attached tasks: what is counted is beats without an answer, and what is told is who let go."""

import asyncio

from broker.agent import attachments as module
from broker.agent.attachments import BEATS_IN_LEASE, Attachments, Held
from tests.fakes.running_agent import until


class Told:
    def __init__(self) -> None:
        self.detached: list[tuple[str, str]] = []

    def __call__(self, task_id: str, session_id: str) -> None:
        self.detached.append((task_id, session_id))


def test_three_beats_in_a_row_without_an_answer_are_silence() -> None:
    held = Held("tsk_1", "ws_1", 30.0)
    assert held.every == 10.0
    for _ in range(5):
        held.answer(held.beat())
    assert not held.is_silent
    for _ in range(BEATS_IN_LEASE):
        held.beat()
    assert not held.is_silent  # the last one was sent a moment ago
    held.beat()
    assert held.is_silent


def test_an_answer_begins_the_count_anew_and_one_to_no_beat_counts_as_none() -> None:
    held = Held("tsk_1", "ws_1", 30.0)
    for _ in range(BEATS_IN_LEASE):
        held.beat()
    held.answer(99)
    held.answer(0)
    held.beat()
    assert held.is_silent
    held.answer(held.sent)
    held.beat()
    assert not held.is_silent


async def test_a_closed_stream_may_come_back(monkeypatch) -> None:
    monkeypatch.setattr(module, "COME_BACK_WITHIN", 0.2)
    told = Told()
    held = Attachments(told)
    with held.holding("tsk_1", "ws_1", 30.0):
        pass
    with held.holding("tsk_1", "ws_1", 30.0) as stream:
        await asyncio.sleep(0.3)
        assert held.is_held(stream)
        assert told.detached == []
    await until(lambda: told.detached)
    assert told.detached == [("tsk_1", "ws_1")]
    assert len(held) == 0


async def test_of_two_streams_one_is_enough(monkeypatch) -> None:
    monkeypatch.setattr(module, "COME_BACK_WITHIN", 0.01)
    told = Told()
    held = Attachments(told)
    with held.holding("tsk_1", "ws_1", 30.0) as other:
        with held.holding("tsk_1", "ws_1", 30.0) as silent:
            silent.unanswered = BEATS_IN_LEASE
            held.silent(silent)
        await asyncio.sleep(0.05)
        assert told.detached == []
        other.unanswered = BEATS_IN_LEASE
        held.silent(other)
    assert told.detached == [("tsk_1", "ws_1")]


async def test_what_is_over_is_let_go_of_by_nobody(monkeypatch) -> None:
    monkeypatch.setattr(module, "COME_BACK_WITHIN", 0.01)
    told = Told()
    held = Attachments(told)
    with (
        held.holding("tsk_1", "ws_1", 30.0) as done,
        held.holding("tsk_2", "ws_2", 30.0) as exited,
        held.holding("tsk_3", "ws_3", 30.0) as living,
    ):
        held.forget("tsk_1")
        held.ended(["ws_2", "ws_9"])
        assert [held.is_held(one) for one in (done, exited, living)] == [False, False, True]
    await until(lambda: told.detached)
    assert told.detached == [("tsk_3", "ws_3")]


async def test_nothing_is_told_after_the_end_of_the_agent(monkeypatch) -> None:
    monkeypatch.setattr(module, "COME_BACK_WITHIN", 0.01)
    told = Told()
    held = Attachments(told)
    with held.holding("tsk_1", "ws_1", 30.0):
        pass
    held.close()
    await asyncio.sleep(0.05)
    assert told.detached == []
