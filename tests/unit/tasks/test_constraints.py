from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.errors import Invalid
from broker.tasks.constraints import KINDS, is_within, read_constraints

CONSTRAINTS = st.dictionaries(st.sampled_from(sorted(KINDS)), st.none()).flatmap(
    lambda names: st.fixed_dictionaries({name: VALUES[name] for name in names})
)
LISTS = st.lists(st.sampled_from(["a", "b", "c"]), min_size=1)
VALUES: dict[str, st.SearchStrategy[Any]] = {
    "allowed_tools": LISTS,
    "data_classification": LISTS,
    "recipient_domain": LISTS,
    "tenant": st.sampled_from(["t1", "t2"]),
    "max_amount": st.builds(
        lambda amount, currency: {"amount": amount, "currency": currency},
        st.sampled_from(["0", "1", "1.0", "1.000000000000000001", "10", "9.99"]),
        st.sampled_from(["EUR", "USD"]),
    ),
    "max_calls": st.dictionaries(st.sampled_from(["read", "write"]), st.integers(0, 3), min_size=1).map(
        lambda counts: [{"call_class": name, "count": count} for name, count in counts.items()]
    ),
    "time_window": st.tuples(st.integers(0, 5), st.integers(1, 5)).map(
        lambda pair: {"not_before": pair[0], "not_after": pair[0] + pair[1]}
    ),
}


def money(amount: Any, currency: Any = "EUR") -> dict[str, Any]:
    return {"max_amount": {"amount": amount, "currency": currency}}


@pytest.mark.bears("BG05")
@pytest.mark.parametrize(
    "amount",
    [
        "1e3",
        "-1",
        "+1",
        "1.0000000000000000001",
        "NaN",
        "Infinity",
        "",
        ".5",
        "5.",
        "00.5",
        "01",
        "1,5",
        " 1",
        "1\n",
        "1_0",
        "\u0661",
        "1" * 21,
        1,
        1.5,
        True,
        None,
    ],
)
def test_an_amount_is_an_exact_decimal_in_text(amount: object) -> None:
    with pytest.raises(Invalid) as refused:
        read_constraints(money(amount))
    assert refused.value.reason == "invalid_authorization_details"


@pytest.mark.bears("BG05")
@pytest.mark.parametrize(
    ("child", "parent", "within"),
    [
        (money("500.00"), money("500"), True),
        (money("499.999999999999999999"), money("500"), True),
        (money("500.000000000000000001"), money("500"), False),
        (money("0.1"), money("0.10"), True),
        (money("100", "USD"), money("500", "EUR"), False),
        (money("12345678901234567890.000000000000000002"), money("12345678901234567890.000000000000000001"), False),
        ({}, money("500"), False),
        (money("500"), {}, True),
        ({"tenant": "a"}, {"tenant": "a"}, True),
        ({"tenant": "A"}, {"tenant": "a"}, False),
        ({"tenant": "ab"}, {"tenant": "a"}, False),
        ({"allowed_tools": ["a"]}, {"allowed_tools": ["a", "b"]}, True),
        ({"allowed_tools": ["a", "c"]}, {"allowed_tools": ["a", "b"]}, False),
        (
            {"time_window": {"not_before": 5, "not_after": 9}},
            {"time_window": {"not_before": 5, "not_after": 9}},
            True,
        ),
        (
            {"time_window": {"not_before": 4, "not_after": 9}},
            {"time_window": {"not_before": 5, "not_after": 9}},
            False,
        ),
        (
            {"time_window": {"not_before": 5, "not_after": 10}},
            {"time_window": {"not_before": 5, "not_after": 9}},
            False,
        ),
        (
            {"max_calls": [{"call_class": "write", "count": 2}, {"call_class": "read", "count": 9}]},
            {"max_calls": [{"call_class": "write", "count": 2}]},
            True,
        ),
        (
            {"max_calls": [{"call_class": "write", "count": 3}]},
            {"max_calls": [{"call_class": "write", "count": 2}]},
            False,
        ),
        (
            {"max_calls": [{"call_class": "read", "count": 1}]},
            {"max_calls": [{"call_class": "write", "count": 2}]},
            False,
        ),
    ],
)
def test_no_constraint_is_lost_or_broadened(child: dict[str, Any], parent: dict[str, Any], *, within: bool) -> None:
    read_child = read_constraints(child) if child else {}
    read_parent = read_constraints(parent) if parent else {}
    assert is_within(read_child, read_parent) is within


@pytest.mark.parametrize(
    "value",
    [
        None,
        [],
        {},
        "x",
        {"max_spend": 1},
        {"tenant": ""},
        {"tenant": ["a"]},
        {"tenant": "a\nb"},
        {"tenant": "x" * 257},
        {"tenant": "é"},
        {"allowed_tools": []},
        {"allowed_tools": "a"},
        {"allowed_tools": [1]},
        {"allowed_tools": [str(n) for n in range(65)]},
        money("1", "eur"),
        money("1", "EURO"),
        money("1", "\u0395UR"),
        money("1", 978),
        {"max_amount": {"amount": "1"}},
        {"max_amount": {"amount": "1", "currency": "EUR", "per": "day"}},
        {"max_amount": "1 EUR"},
        {"max_calls": []},
        {"max_calls": {"call_class": "a", "count": 1}},
        {"max_calls": [{"call_class": "a", "count": 1}, {"call_class": "a", "count": 2}]},
        {"max_calls": [{"call_class": "a", "count": True}]},
        {"max_calls": [{"call_class": "a", "count": 1.0}]},
        {"max_calls": [{"call_class": "a", "count": -1}]},
        {"max_calls": [{"call_class": "a", "count": 2**53}]},
        {"max_calls": [{"call_class": "a"}]},
        {"time_window": {"not_before": 5, "not_after": 5}},
        {"time_window": {"not_before": 5}},
        {"time_window": [1, 2]},
    ],
)
def test_what_is_not_a_known_constraint_is_refused(value: Any) -> None:
    with pytest.raises(Invalid) as refused:
        read_constraints(value)
    assert refused.value.reason == "invalid_authorization_details"


@given(CONSTRAINTS, CONSTRAINTS, CONSTRAINTS)
def test_narrower_is_an_order(one: dict[str, Any], two: dict[str, Any], three: dict[str, Any]) -> None:
    a, b, c = (read_constraints(value) if value else {} for value in (one, two, three))
    assert is_within(a, a)
    if is_within(a, b) and is_within(b, c):
        assert is_within(a, c)
    if is_within(a, b) and "max_amount" in b:
        mine, theirs = a["max_amount"], b["max_amount"]
        assert isinstance(mine, dict)
        assert isinstance(theirs, dict)
        assert Decimal(str(mine["amount"])) <= Decimal(str(theirs["amount"]))


@given(CONSTRAINTS.filter(bool))
def test_the_read_form_reads_as_itself(value: dict[str, Any]) -> None:
    read = read_constraints(value)
    assert read_constraints(dict(read)) == read
