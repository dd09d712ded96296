from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from broker.errors import Conflict, Invalid, Refused
from broker.spiffe import SpiffeId
from broker.tasks import Cause, State, Task, activate, effective_state, end, require_active, suspend
from broker.tasks.task import TERMINAL
from tests.unit.tasks.world import AGENT, HOUR, NOW, delegation, task

LATER = NOW + timedelta(minutes=1)
OVER = NOW + HOUR


@pytest.mark.bears("RV12", "V06")
def test_the_clock_is_asked_before_the_state() -> None:
    made = task()
    assert effective_state(made, made.expires_at - timedelta(microseconds=1)) is State.ACTIVE
    assert effective_state(made, made.expires_at) is State.EXPIRED
    assert effective_state(suspend(made, Cause.OPERATOR, NOW), OVER) is State.EXPIRED
    assert effective_state(end(made, State.REVOKED, Cause.OPERATOR, LATER), OVER) is State.REVOKED


@pytest.mark.parametrize(
    ("made", "code"),
    [
        (task(), None),
        (replace(task(), state=State.PENDING), "task_pending"),
        (suspend(task(), Cause.BUDGET_EXHAUSTED, NOW), "task_suspended"),
        (end(task(), State.COMPLETED, Cause.COMPLETED, NOW), "task_ended"),
        (end(task(), State.CASCADED, Cause.PARENT_ENDED, NOW), "task_ended"),
    ],
)
def test_only_an_active_task_acts(made: Task, code: str | None) -> None:
    if code is None:
        require_active(made, LATER)
    else:
        with pytest.raises(Refused) as refused:
            require_active(made, LATER)
        assert refused.value.reason == code
    with pytest.raises(Refused) as refused:
        require_active(made, OVER)
    assert refused.value.reason == "task_ended"


def test_an_end_says_why_and_when() -> None:
    made = end(task(), State.REVOKED, Cause.PROCESS_EXITED, LATER)
    assert (made.state, made.cause, made.ended_at, made.version) == (
        State.REVOKED,
        Cause.PROCESS_EXITED,
        LATER,
        2,
    )


@pytest.mark.bears("RV12", "RV13")
def test_ending_again_changes_nothing_and_otherwise_conflicts() -> None:
    ended = end(task(), State.REVOKED, Cause.OPERATOR, LATER)
    assert end(ended, State.REVOKED, Cause.USER_LOGOUT, OVER, expected_version=1) is ended
    for state in TERMINAL - {State.REVOKED}:
        with pytest.raises(Conflict) as conflict:
            end(ended, state, Cause.OPERATOR, LATER)
        assert conflict.value.reason == "conflict"
    with pytest.raises(Conflict):
        activate(ended, None, LATER)
    with pytest.raises(Conflict):
        suspend(ended, Cause.OPERATOR, LATER)


@pytest.mark.bears("V04")
def test_what_ended_with_the_one_above_has_ended_for_everybody() -> None:
    ended = end(task(), State.CASCADED, Cause.PARENT_ENDED, LATER)
    for state in TERMINAL:
        assert end(ended, state, Cause.OPERATOR, OVER, expected_version=1) is ended
    with pytest.raises(Conflict):
        activate(ended, None, LATER)


@pytest.mark.bears("RV13")
def test_a_stale_version_changes_nothing() -> None:
    made = task()
    for change in (
        lambda: end(made, State.REVOKED, Cause.OPERATOR, LATER, expected_version=2),
        lambda: suspend(made, Cause.OPERATOR, LATER, expected_version=7),
        lambda: activate(made, None, LATER, expected_version=0),
    ):
        with pytest.raises(Conflict) as conflict:
            change()
        assert conflict.value.reason == "stale_version"
    assert end(made, State.REVOKED, Cause.OPERATOR, LATER, expected_version=1).version == 2


def test_past_its_deadline_a_task_ends_as_expired_whatever_is_asked() -> None:
    made = end(task(), State.COMPLETED, Cause.COMPLETED, OVER)
    assert (made.state, made.cause, made.ended_at) == (State.EXPIRED, Cause.EXPIRED, made.expires_at)
    assert end(made, State.EXPIRED, Cause.EXPIRED, OVER) is made


def test_only_the_clock_expires_a_task() -> None:
    with pytest.raises(Conflict):
        end(task(), State.EXPIRED, Cause.EXPIRED, LATER)


def test_a_clock_that_went_back_gives_no_end_before_the_beginning() -> None:
    assert end(task(), State.REVOKED, Cause.OPERATOR, NOW - HOUR).ended_at == NOW


@pytest.mark.parametrize("state", [State.ACTIVE, State.PENDING, State.SUSPENDED])
def test_a_task_ends_in_a_final_state(state: State) -> None:
    assert not state.is_terminal
    with pytest.raises(Invalid):
        end(task(), state, Cause.OPERATOR, LATER)


def test_a_pending_task_cannot_be_completed() -> None:
    pending = replace(task(), state=State.PENDING)
    with pytest.raises(Conflict):
        end(pending, State.COMPLETED, Cause.COMPLETED, LATER)
    assert end(pending, State.REVOKED, Cause.OPERATOR, LATER).state is State.REVOKED
    assert activate(pending, None, LATER).state is State.ACTIVE


@pytest.mark.bears("RV12")
def test_suspend_and_resume() -> None:
    stopped = suspend(task(), Cause.OPERATOR, LATER)
    assert (stopped.state, stopped.cause, stopped.version, stopped.ended_at) == (
        State.SUSPENDED,
        Cause.OPERATOR,
        2,
        None,
    )
    assert suspend(stopped, Cause.OPERATOR, LATER) is stopped
    going = activate(stopped, None, LATER)
    assert (going.state, going.cause, going.version) == (State.ACTIVE, None, 3)
    with pytest.raises(Conflict):
        activate(going, None, LATER)
    with pytest.raises(Conflict):
        activate(stopped, None, OVER)
    with pytest.raises(Conflict):
        suspend(stopped, Cause.OPERATOR, OVER)


@pytest.mark.parametrize(
    "fields",
    [
        {"id": "a b"},
        {"root": "other"},
        {"parent": "tsk_0"},
        {"depth": 1},
        {"depth": 8, "parent": "tsk_0", "root": "tsk_0"},
        {"depth": -1},
        {"depth": 1, "parent": "tsk_1", "root": "tsk_0"},
        {"user": "usr_2"},
        {"agent": SpiffeId("spiffe://example.org")},
        {"session": ""},
        {"purpose": ""},
        {"version": 0},
        {"epoch": -1},
        {"expires_at": NOW},
        {"expires_at": NOW + HOUR + timedelta(seconds=1)},
        {"created_at": datetime(2026, 1, 1)},  # noqa: DTZ001
        {"state": State.REVOKED},
        {"state": State.REVOKED, "ended_at": NOW},
        {"ended_at": NOW},
        {"supersedes": "tsk_0"},
        {"history": (AGENT,)},
        {"supersedes": "tsk_0", "history": (AGENT,) * 8},
        {"delegation": delegation(user="usr_2")},
    ],
)
def test_what_cannot_be_a_task_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(Invalid):
        replace(task(), **fields)


class Life(RuleBasedStateMachine):
    """Any sequence of changes at any times: what has ended stays as it ended."""

    @initialize(state=st.sampled_from([State.ACTIVE, State.PENDING]))
    def begin(self, state: State) -> None:
        self.task = self.first = replace(task(), state=state)
        self.now = NOW
        self.seen: State | None = None

    @rule(seconds=st.integers(0, 900))
    def pass_time(self, seconds: int) -> None:
        self.now += timedelta(seconds=seconds)

    @rule(
        state=st.sampled_from(State),
        cause=st.sampled_from(Cause),
        version=st.none() | st.integers(1, 5),
        change=st.sampled_from(["end", "end", "suspend", "activate"]),
    )
    def change(self, state: State, cause: Cause, version: int | None, change: str) -> None:
        before = self.task
        try:
            if change == "end":
                self.task = end(before, state, cause, self.now, version)
            elif change == "suspend":
                self.task = suspend(before, cause, self.now, version)
            else:
                self.task = activate(before, cause, self.now, version)
        except (Conflict, Invalid):
            return
        if self.task is not before:
            assert self.task.version == before.version + 1
            assert version in (None, before.version)
            assert not before.state.is_terminal

    @invariant()
    def an_end_is_an_end(self) -> None:
        state = effective_state(self.task, self.now)
        if self.seen is not None:
            assert state is self.seen
        if state.is_terminal:
            self.seen = state
            with pytest.raises(Refused):
                require_active(self.task, self.now)
        kept = ("id", "root", "parent", "depth", "user", "agent", "authority", "created_at", "expires_at")
        assert all(getattr(self.task, name) == getattr(self.first, name) for name in kept)


TestLife = Life.TestCase
