"""Selectors as text."""

import contextlib
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.errors import InvalidSelector
from broker.spiffe import Selector
from broker.spiffe.selectors import MAX_TYPE, MAX_VALUE


def code_of(text: object) -> str:
    with pytest.raises(InvalidSelector) as caught:
        Selector(text)  # type: ignore[arg-type]
    return caught.value.reason


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("unix:uid:1000", "unix", "uid:1000"),
        ("docker:label:app:x y", "docker", "label:app:x y"),
        ("k8s:sa:default", "k8s", "sa:default"),
        ("k8s_psat:agent_ns:a", "k8s_psat", "agent_ns:a"),
        ("unix::", "unix", ":"),
        ("docker:env:NAME=ü", "docker", "env:NAME=ü"),
        ("unix:path: /x ", "unix", "path: /x "),
    ],
)
def test_the_first_colon_divides(text: str, kind: str, value: str) -> None:
    selector = Selector(text)
    assert (selector.type, selector.value, str(selector)) == (kind, value, text)
    assert Selector.of(kind, value) == selector


@pytest.mark.parametrize(
    "text", ["", "unix", ":", ":x", "Unix:x", "un ix:x", "ünix:x", "unix\n:x", "\u212a8s:x", "unix/x"]
)
def test_bad_types_are_refused(text: str) -> None:
    assert code_of(text) in {"selector_no_colon", "selector_bad_type"}


@pytest.mark.parametrize("value", ["a\n", "a\x00b", "\x7f", "\x85", "a\u2028b", "\ud800", "a\rb", "\t"])
def test_control_characters_are_refused(value: str) -> None:
    assert code_of("unix:" + value) == "selector_bad_value"


def test_sizes_are_bounded() -> None:
    assert code_of("unix:") == "selector_empty_value"
    assert Selector("unix:" + "a" * MAX_VALUE).type == "unix"
    assert code_of("unix:" + "a" * (MAX_VALUE + 1)) == "selector_value_too_long"
    assert code_of("unix:" + "ü" * (MAX_VALUE // 2 + 1)) == "selector_value_too_long"
    assert code_of("a" * (MAX_TYPE + 1) + ":x") == "selector_bad_type"
    assert code_of(None) == "invalid_selector"


def test_a_colon_in_the_type_makes_no_other_selector() -> None:
    with pytest.raises(InvalidSelector):
        Selector.of("unix:uid", "0")


@given(
    st.text(string.ascii_lowercase + string.digits + "_-", min_size=1, max_size=20),
    st.text(st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"]), min_size=1, max_size=40),
)
def test_text_is_injective(kind: str, value: str) -> None:
    selector = Selector.of(kind, value)
    again = Selector(str(selector))
    assert (again, again.type, again.value) == (selector, kind, value)
    assert hash(again) == hash(selector)


@given(st.text(max_size=40))
def test_any_text_is_a_selector_or_a_typed_refusal(text: str) -> None:
    with contextlib.suppress(InvalidSelector):
        assert str(Selector(text)) == text


def test_selectors_are_ordered_by_text_and_fixed() -> None:
    assert sorted([Selector("b:a"), Selector("a:b"), Selector("a-b:c")]) == list(
        map(Selector, sorted(["b:a", "a:b", "a-b:c"]))
    )
    with pytest.raises((AttributeError, TypeError)):
        Selector("a:b").value = "c"  # type: ignore[misc]
