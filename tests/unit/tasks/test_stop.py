"""Stops add up to the most restrictive, in any order; and what they forbid."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import reduce

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.errors import Invalid, Refused, Unavailable
from broker.tasks import Cause, Delegation
from broker.tasks.stop import Stop, StopKind, concerns, names_of, require_going, session_name

NOW = datetime(2026, 11, 28, 12, 0, tzinfo=UTC)
ISSUER = "https://idp.example.org"
WORD = Delegation(
    issuer=ISSUER, user="alice", expires_at=NOW + timedelta(hours=1), token_hash="sha-256:" + "A" * 43, session="s-1",
    auth_time=NOW, issued_at=NOW + timedelta(minutes=5),
)  # fmt: skip
STANDING = replace(WORD, session=None, standing="dlg_1")
STOP = Stop(kind=StopKind.USER, name="alice", source=ISSUER, not_before=NOW, cause=Cause.USER_LOGOUT, changed_at=NOW)


def code(stop: Stop, delegation: Delegation = WORD, now: datetime = NOW) -> str:
    try:
        require_going([stop], delegation, now)
    except (Refused, Unavailable) as error:
        return error.reason
    return "going"


stops = st.builds(
    Stop,
    kind=st.just(StopKind.USER),
    name=st.just("alice"),
    source=st.just(ISSUER),
    not_before=st.integers(0, 100).map(lambda n: NOW + timedelta(seconds=n)),
    cause=st.just(Cause.USER_LOGOUT),
    changed_at=st.just(NOW),
    tokens_from=st.integers(0, 100),
    disabled=st.booleans(),
    unfinished=st.booleans(),
)


@pytest.mark.bears("RV10")
@given(st.lists(stops, min_size=1, max_size=6).flatmap(lambda told: st.tuples(st.just(told), st.permutations(told))))
def test_in_any_order_the_most_restrictive_stands(orders: tuple[list[Stop], list[Stop]]) -> None:
    def summed(told: list[Stop]) -> Stop:
        return reduce(lambda before, one: one.after(before), told[1:], told[0])

    one, other = map(summed, orders)
    assert one == other
    assert one.not_before == max(each.not_before for each in orders[0])
    assert one.disabled is any(each.disabled for each in orders[0])


def test_a_word_is_dated_by_the_sign_in() -> None:
    assert code(STOP) == "going"
    assert code(replace(STOP, not_before=NOW + timedelta(seconds=1))) == "user_ended"
    # A token that was refreshed later in the same session is not a later word.
    assert code(replace(STOP, not_before=NOW + timedelta(minutes=4))) == "user_ended"
    assert code(replace(STOP, not_before=NOW + timedelta(minutes=4)), replace(WORD, auth_time=None)) == "going"
    assert code(STOP, replace(WORD, auth_time=None, issued_at=None)) == "user_ended"
    assert code(replace(STOP, disabled=True)) == "user_disabled"


def test_a_session_that_ended_never_goes_on_and_standing_words_do() -> None:
    session = replace(STOP, kind=StopKind.SESSION, name=session_name(ISSUER, "s-1"), not_before=NOW - timedelta(days=1))
    assert code(session) == "user_session_ended"
    sessions = replace(STOP, kind=StopKind.SESSIONS, not_before=NOW + timedelta(hours=1))
    assert code(sessions) == "user_session_ended"
    assert StopKind.SESSIONS not in {kind for kind, _ in names_of(STANDING)}
    assert not concerns(session, STANDING)
    assert not concerns(sessions, STANDING)
    assert concerns(replace(STOP, kind=StopKind.DELEGATION, name="dlg_1"), STANDING)
    assert concerns(STOP, WORD), "a whole user ends with what was given a moment ago, too"
    assert not concerns(replace(STOP, name="bob"), WORD)


def test_every_stop_that_can_concern_a_word_is_looked_up() -> None:
    assert names_of(WORD) == (
        (StopKind.USER, "alice"),
        (StopKind.SESSIONS, "alice"),
        (StopKind.SESSION, f"{ISSUER} s-1"),
    )
    assert names_of(replace(WORD, session=None)) == (
        (StopKind.USER, "alice"),
        (StopKind.SESSIONS, "alice"),
        (StopKind.SESSIONLESS, "alice"),
    )
    assert names_of(STANDING) == ((StopKind.USER, "alice"), (StopKind.DELEGATION, "dlg_1"))
    # A session is its issuer's: another issuer's of the same name is another.
    assert session_name(ISSUER, "s-1") != session_name("https://other.example.org", "s-1")


def test_no_token_is_issued_that_would_be_dead() -> None:
    stop = replace(STOP, kind=StopKind.AGENT, name="spiffe://example.org/a", tokens_from=int(NOW.timestamp()) + 1)
    assert code(stop) == "stopped_just_now"
    assert code(stop, now=NOW + timedelta(seconds=1)) == "going"


@pytest.mark.parametrize(
    "wrong", [{"name": ""}, {"name": "x" * 5000}, {"source": ""}, {"not_before": NOW.replace(tzinfo=None)}]
)
def test_what_is_no_stop(wrong: dict[str, object]) -> None:
    with pytest.raises(Invalid):
        replace(STOP, **wrong)  # type: ignore[arg-type]
