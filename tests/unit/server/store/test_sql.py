from datetime import UTC, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.errors import BrokerError
from broker.server.store.rows import Change, FrameRow
from broker.server.store.sql import (
    digest,
    micros,
    micros_or_none,
    moment,
    moment_or_none,
    read_list,
    text_list,
    text_set,
)
from broker.server.store.tables.known import Known, Remembered
from broker.spiffe import Selector
from tests.unit.server.store.samples import NOW


@given(st.datetimes(timezones=st.just(UTC)))
def test_a_time_comes_back_as_it_was(time: datetime) -> None:
    assert moment(micros(time)) == time


@given(st.datetimes(timezones=st.just(UTC)), st.datetimes(timezones=st.just(UTC)))
def test_stored_times_are_ordered_as_the_times_are(one: datetime, other: datetime) -> None:
    assert (micros(one) < micros(other)) == (one < other)


def test_a_time_of_another_zone_is_the_same_moment() -> None:
    assert micros(NOW.astimezone(timezone(timedelta(hours=5)))) == micros(NOW)


def test_a_time_without_a_zone_is_refused() -> None:
    with pytest.raises(ValueError, match="zone"):
        micros(NOW.replace(tzinfo=None))


def test_nothing_is_stored_as_nothing() -> None:
    assert (micros_or_none(None), moment_or_none(None)) == (None, None)
    assert moment_or_none(micros_or_none(NOW)) == NOW


TEXTS = st.text(st.characters(exclude_categories=["Cs"]))


@given(st.lists(TEXTS))
def test_a_list_keeps_its_order(texts: list[str]) -> None:
    assert read_list(text_list(texts), str) == tuple(texts)


@given(st.frozensets(TEXTS), st.frozensets(TEXTS))
def test_equal_sets_and_only_they_have_equal_text_and_digest(one: frozenset[str], other: frozenset[str]) -> None:
    assert frozenset(read_list(text_set(one), str)) == one
    assert (text_set(one) == text_set(other)) == (one == other)
    assert (digest(text_set(one)) == digest(text_set(other))) == (one == other)


@pytest.mark.parametrize("stored", ["{}", '"x"', "[1]", "[null]", "[", "NaN"])
def test_a_damaged_list_is_refused(stored: str) -> None:
    with pytest.raises((TypeError, BrokerError)):
        read_list(stored, str)


def test_a_damaged_frame_is_refused() -> None:
    with pytest.raises(TypeError):
        FrameRow.of(Change(1, "frame", "x", "[]"))


def test_remembered_values_are_parsed_once_and_bounded() -> None:
    parsed: list[str] = []
    remembered = Remembered(lambda text: parsed.append(text) or text.upper(), 2)
    assert [remembered.read(text) for text in "aabbac"] == list("AABBAC")
    assert parsed == ["a", "b", "c"]
    assert remembered.read("a") == "A"
    assert parsed == ["a", "b", "c", "a"]


def test_repeated_selectors_are_one_object() -> None:
    known = Known()
    one, other = known.selectors('["x:1","x:2"]'), known.selectors('["x:1","x:3"]')
    assert one is known.selectors('["x:1","x:2"]')
    assert {id(each) for each in one} & {id(each) for each in other} == {
        id(each) for each in one if each == Selector("x:1")
    }
