"""Actions that are done once: what a claim and a settlement come to, for every state and every time."""

from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.errors import BrokerError, Conflict, Invalid, Refused
from broker.spiffe import SpiffeId
from broker.spiffe.strictjson import canonical
from broker.tasks import Resource
from broker.tasks.action import (
    MAX_OUTCOME,
    MAX_STEP,
    SETTLE_WITHIN,
    ActionRecord,
    ActionState,
    Claimed,
    Intent,
    digest_of_parameters,
    effective_action_state,
    is_single_use,
    judge_claim,
    read_outcome,
    require_parameters,
    settle,
)
from tests.unit.tasks.world import HASH, NOW, TICKETS, claims, task

SERVICE = SpiffeId("spiffe://example.org/tickets")
OTHER = SpiffeId("spiffe://example.org/other")
LATE = NOW + SETTLE_WITHIN
DONE, UNDONE = ActionState.COMPLETED, ActionState.RELEASED


def intent(**fields: Any) -> Intent:
    good = {"audience": TICKETS, "action": "ticket.close", "step": "close-4711", "identifier": "4711"}
    return Intent(**good | fields)


def record(**fields: Any) -> ActionRecord:
    good = {
        "id": "act_1",
        "task": "tsk_1",
        "root": "tsk_1",
        "service": SERVICE,
        "intent": intent(),
        "jti": "jti_1",
        "claimed_at": NOW,
        "settle_by": LATE,
    }
    return ActionRecord(**good | fields)


def settled(state: ActionState, outcome: str | None = None) -> ActionRecord:
    return record(state=state, settled_at=NOW, outcome=outcome)


def outcome_of(act: Any) -> str:
    try:
        return str(act())
    except BrokerError as error:
        return f"{type(error).__name__} {error.reason}"


@pytest.mark.parametrize(
    ("known", "at", "said"),
    [
        (record(), NOW, "Conflict action_in_progress"),
        (record(), LATE - timedelta(microseconds=1), "Conflict action_in_progress"),
        (record(), LATE, "Refused action_indeterminate"),
        (record(), LATE + timedelta(days=1), "Refused action_indeterminate"),
        (settled(DONE, "1"), LATE, Claimed.DUPLICATE),
        (settled(DONE), NOW, Claimed.DUPLICATE),
        (settled(UNDONE), NOW, Claimed.NOW),
        (settled(UNDONE), LATE, Claimed.NOW),
    ],
)
def test_a_claim_of_a_step_that_is_known(known: ActionRecord, at: datetime, said: str) -> None:
    assert outcome_of(lambda: judge_claim(known, known.intent, at)) == said


@pytest.mark.parametrize("known", [record(), settled(DONE, "1"), settled(UNDONE)])
@pytest.mark.parametrize(
    "other",
    [
        {"action": "ticket.read"},
        {"identifier": "4712"},
        {"identifier": None},
        {"parameter_digest": HASH},
        {"audience": Resource("https://wiki.example.org")},
    ],
)
def test_one_step_never_stands_for_two_things(known: ActionRecord, other: dict[str, Any]) -> None:
    with pytest.raises(Conflict) as caught:
        judge_claim(known, intent(**other), LATE)
    assert caught.value.reason == "idempotency_key_reused"


def test_whoever_asks_too_late_is_told_which_action_it_is() -> None:
    with pytest.raises(Refused, match="act_1") as caught:
        judge_claim(record(), intent(), LATE)
    assert "act_1" in caught.value.hint


@pytest.mark.parametrize("at", [NOW, LATE, LATE + timedelta(days=1)])
@pytest.mark.parametrize(("state", "outcome"), [(DONE, None), (DONE, '{"n":1}'), (UNDONE, None)])
def test_a_claim_is_settled_once_and_again_the_same_way(at: datetime, state: ActionState, outcome: str | None) -> None:
    over = settle(record(), SERVICE, state, outcome, at)
    assert (over.state, over.outcome, over.settled_at) == (state, outcome, at)
    assert settle(over, SERVICE, state, outcome, LATE) is over
    for otherwise in {(DONE, None), (DONE, '{"n":1}'), (DONE, "2"), (UNDONE, None)} - {(state, outcome)}:
        assert outcome_of(lambda to=otherwise: settle(over, SERVICE, *to, LATE)) == "Conflict action_settled"


@pytest.mark.parametrize("known", [record(), settled(DONE), settled(UNDONE)])
def test_nobody_else_settles_it(known: ActionRecord) -> None:
    for state in (DONE, UNDONE):
        assert outcome_of(lambda to=state: settle(known, OTHER, to, None, NOW)) == "Refused action_not_own"


def test_a_settlement_says_done_or_not_done() -> None:
    for state, outcome in ((ActionState.CLAIMED, None), (ActionState.INDETERMINATE, None), (UNDONE, "1")):
        with pytest.raises(Invalid) as caught:
            settle(record(), SERVICE, state, outcome, NOW)
        assert caught.value.reason == "invalid_settlement"


def test_a_clock_that_was_set_back_ends_nothing_before_it_began() -> None:
    assert settle(record(), SERVICE, DONE, None, NOW - timedelta(hours=1)).settled_at == NOW


@given(st.timedeltas(min_value=timedelta(0), max_value=timedelta(days=400)), st.sampled_from([None, DONE, UNDONE]))
def test_time_alone_neither_does_nor_undoes_anything(passed: timedelta, as_settled: ActionState | None) -> None:
    known = record() if as_settled is None else settled(as_settled)
    state = effective_action_state(known, NOW + passed)
    if as_settled is not None:
        assert state is as_settled
    else:
        assert state is (ActionState.INDETERMINATE if passed >= SETTLE_WITHIN else ActionState.CLAIMED)
        # While nobody has said, no claim is let through and none is told an outcome.
        assert " " in outcome_of(lambda: judge_claim(known, known.intent, NOW + passed))


@given(st.lists(st.sampled_from(["claim", "done", "undone", "wait"]), max_size=30))
def test_whatever_comes_in_whatever_order_it_is_done_at_most_once(steps: list[str]) -> None:
    """A model of one service and its agents: ``doing`` counts those who were told to do it and have not said they did not."""
    known: ActionRecord | None = None
    now, doing, number = NOW, 0, 0
    for step in steps:
        if step == "wait":
            now += SETTLE_WITHIN
        elif step == "claim":
            number += 1
            if known is None or outcome_of(lambda k=known, t=now: judge_claim(k, k.intent, t)) == Claimed.NOW:
                known, doing = record(id=f"act_{number}", claimed_at=now, settle_by=now + SETTLE_WITHIN), doing + 1
        elif known is not None:
            was, state = known.state, DONE if step == "done" else UNDONE
            if " " not in outcome_of(lambda k=known, s=state, t=now: settle(k, SERVICE, s, None, t).state):
                known = settle(known, SERVICE, state, None, now)
                doing -= was is ActionState.CLAIMED and state is UNDONE
        assert doing <= 1


class TestForm:
    @pytest.mark.parametrize(
        ("fields", "code"),
        [
            ({"action": ""}, "invalid_action"),
            ({"action": "ticket.*"}, "invalid_action"),
            ({"action": "*"}, "invalid_action"),
            ({"action": "a b"}, "invalid_action"),
            ({"action": "a" * 257}, "invalid_action"),
            ({"step": ""}, "invalid_step"),
            ({"step": " x"}, "invalid_step"),
            ({"step": "x\n"}, "invalid_step"),
            ({"step": "ü"}, "invalid_step"),
            ({"step": "s" * (MAX_STEP + 1)}, "invalid_step"),
            ({"identifier": ""}, "invalid_identifier"),
            ({"identifier": "i" * 257}, "invalid_identifier"),
            ({"parameter_digest": "sha-256:"}, "invalid_parameter_digest"),
            ({"parameter_digest": "A" * 43}, "invalid_parameter_digest"),
        ],
    )
    def test_what_is_no_intent(self, fields: dict[str, Any], code: str) -> None:
        with pytest.raises(Invalid) as caught:
            intent(**fields)
        assert caught.value.reason == code

    def test_what_is_one(self) -> None:
        intent(step="s" * MAX_STEP, identifier="i" * 256, parameter_digest=HASH, action="a" * 256)
        intent(step="close 4711 (second half)", identifier=None)

    @pytest.mark.parametrize(
        "fields",
        [
            {"id": "act 1"},
            {"task": ""},
            {"claimed_at": NOW.replace(tzinfo=None)},
            {"state": ActionState.INDETERMINATE},
            {"state": DONE},
            {"settled_at": NOW},
            {"outcome": "1"},
            {"state": UNDONE, "settled_at": NOW, "outcome": "1"},
        ],
    )
    def test_what_is_no_record(self, fields: dict[str, Any]) -> None:
        with pytest.raises(Invalid):
            record(**fields)


class TestOutcome:
    @pytest.mark.parametrize(
        ("text", "read"),
        [("", None), (" null ", "null"), ('{"b": 1, "a": "ü"}', '{"a":"ü","b":1}'), ('"x"', '"x"'), ("[1]", "[1]")],
    )
    def test_it_has_one_form(self, text: str, read: str | None) -> None:
        assert read_outcome(text) == read

    @pytest.mark.parametrize(
        "text", ["x", "1.5", '{"a":1,"a":2}', "\ud800", '"' + "a" * MAX_OUTCOME + '"', "[" * 20 + "]" * 20]
    )
    def test_what_is_none(self, text: str) -> None:
        with pytest.raises(Invalid) as caught:
            read_outcome(text)
        assert caught.value.reason == "invalid_outcome"

    def test_the_longest(self) -> None:
        longest = '"' + "a" * (MAX_OUTCOME - 2) + '"'
        assert read_outcome(longest) == longest

    @given(st.recursive(st.none() | st.booleans() | st.integers(-9, 9) | st.text("aé\n", max_size=4), lambda part: st.lists(part, max_size=3), max_leaves=8))  # fmt: skip
    def test_what_it_gives_it_reads_as_the_same(self, value: Any) -> None:
        once = read_outcome(canonical(value).decode())
        assert once is not None and read_outcome(once) == once


class TestTokens:
    def test_the_usual_one_serves_whatever_and_as_often_as_it_lives(self) -> None:
        known = claims(task())
        assert not is_single_use(known)
        require_parameters(known, intent())
        assert is_single_use(replace(known, task=replace(known.task, use="once")))

    def test_parameters_have_one_digest(self) -> None:
        assert digest_of_parameters({"a": 1, "b": [None]}) == digest_of_parameters({"b": [None], "a": 1})
        assert digest_of_parameters({"a": 1}) != digest_of_parameters({"a": "1"})
        intent(parameter_digest=digest_of_parameters({"amount": "12.50"}))

    def test_those_that_it_is_for_must_be_these(self) -> None:
        known = claims(task())
        bound = replace(known, task=replace(known.task, parameter_digest=digest_of_parameters({"a": 1})))
        require_parameters(bound, intent(parameter_digest=digest_of_parameters({"a": 1})))
        for other in (None, digest_of_parameters({"a": 2})):
            with pytest.raises(Refused) as caught:
                require_parameters(bound, intent(parameter_digest=other))
            assert caught.value.reason == "parameters_mismatch"
