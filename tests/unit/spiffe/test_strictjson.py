"""Strict JSON in, canonical JSON out."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.errors import InvalidJson
from broker.spiffe import strictjson

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-strictjson.MAX_EXACT, strictjson.MAX_EXACT) | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=12,
)


def code_of(data: bytes, **limits: int) -> str:
    with pytest.raises(InvalidJson) as caught:
        strictjson.loads(data, **limits)
    return caught.value.reason


@pytest.mark.bears("JW09", "JW18", "I14")
@pytest.mark.parametrize(
    ("data", "code"),
    [
        (b'{"a":1,"a":2}', "json_duplicate_name"),
        (b'[{"x":{"a":1,"\\u0061":1}}]', "json_duplicate_name"),
        (b"NaN", "json_not_a_number"),
        (b"[Infinity]", "json_not_a_number"),
        (b'{"a":-Infinity}', "json_not_a_number"),
        (b"1e400", "json_number_range"),
        (b"-1e400", "json_number_range"),
        (b"18446744073709551616", "json_number_range"),
        (b"-18446744073709551616", "json_number_range"),
        (b"9" * 5000, "json_number_range"),
        (b'"\\ud800"', "json_surrogate"),
        (b'{"\\uDFFF":1}', "json_surrogate"),
        (b'["\\udc00\\ud800"]', "json_surrogate"),
        (b'\xef\xbb\xbf{"a":1}', "json_byte_order_mark"),
        ('{"a":1}'.encode("utf-16"), "json_not_utf8"),
        (b'"\xff"', "json_not_utf8"),
        (b'"\xed\xa0\x80"', "json_not_utf8"),
        (b'"\xc0\x80"', "json_not_utf8"),
        ('{"a":1}'.encode("utf-16-le"), "invalid_json"),
        (b"", "invalid_json"),
        (b"{} {}", "invalid_json"),
        (b"{'a':1}", "invalid_json"),
        (b'{"a":01}', "invalid_json"),
        (b'"a\nb"', "invalid_json"),
        (b"[1,]", "invalid_json"),
        (b"\xa01", "json_not_utf8"),
        ("\u00a01".encode(), "invalid_json"),
        ("\u0661".encode(), "invalid_json"),
    ],
)
def test_what_python_would_accept_or_garble_is_refused(data: bytes, code: str) -> None:
    assert code_of(data) == code


@pytest.mark.bears("JW16")
@pytest.mark.parametrize("opening", [b"[", b'{"a":'])
def test_nesting_is_bounded_and_never_a_recursion_error(opening: bytes) -> None:
    assert code_of(opening * 100_000) == "json_too_deep"
    assert code_of(b"[" * 17 + b"]" * 17) == "json_too_deep"
    assert strictjson.loads(b"[" * 16 + b"]" * 16) is not None
    assert code_of(b"[[1]]", max_depth=1) == "json_too_deep"


def test_brackets_in_strings_do_not_nest() -> None:
    assert strictjson.loads(b'["' + b"[{" * 50 + b'"]') == ["[{" * 50]
    assert strictjson.loads(b'["\\"' + b"[" * 50 + b'"]') == ['"' + "[" * 50]
    assert code_of(b'["\\\\"' + b",[" * 20) == "json_too_deep"


def test_size_is_bounded() -> None:
    assert strictjson.loads(b'"aa"', max_bytes=4) == "aa"
    assert code_of(b'"aaa"', max_bytes=4) == "json_too_large"


def test_refusals_do_not_quote_the_text() -> None:
    with pytest.raises(InvalidJson) as caught:
        strictjson.loads(b'{"password":"hunter2"')
    assert "hunter2" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_numbers_keep_their_kind() -> None:
    value = strictjson.loads(b'{"i":18446744073709551615,"f":1.0,"e":1e2,"t":true}')
    assert value == {"i": 2**64 - 1, "f": 1.0, "e": 100.0, "t": True}
    assert isinstance(value, dict)
    assert [type(value[name]) for name in "ifet"] == [int, float, float, bool]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({"b": 1, "a": [True, None, "x"]}, b'{"a":[true,null,"x"],"b":1}'),
        ('\u20ac$\x0f\nA\'B"\\\\"/', b'"\xe2\x82\xac$\\u000f\\nA\'B\\"\\\\\\\\\\"/"'),
        ("\b\t\n\f\r\x1f\x7f", b'"\\b\\t\\n\\f\\r\\u001f\x7f"'),
        # RFC 8785 §3.2.3: by UTF-16 code units, so that U+1F600 comes before U+FB33.
        ({"\ufb33": 1, "\U0001f600": 2, "\u20ac": 3, "\r": 4, "1": 5, "\x80": 6, "\xf6": 7}, None),
        ((1, (2,)), b"[1,[2]]"),
        ({}, b"{}"),
        (-0, b"0"),
    ],
)
def test_canonical_form(value: object, text: bytes | None) -> None:
    written = strictjson.canonical(value)
    if text is not None:
        assert written == text
    else:
        assert list(json.loads(written).values()) == [4, 5, 6, 7, 3, 2, 1]


@pytest.mark.parametrize(
    "value", [1.0, math.nan, 2**53, -(2**53), {1: 2}, {"a": b"x"}, b"x", {1, 2}, "\ud800", {"\udfff": 1}, object()]
)
def test_what_has_no_canonical_form_is_refused(value: object) -> None:
    with pytest.raises(InvalidJson):
        strictjson.canonical(value)


def test_canonical_never_recurses_without_end() -> None:
    loop: list[object] = []
    loop.append(loop)
    with pytest.raises(InvalidJson):
        strictjson.canonical(loop)


@pytest.mark.parametrize(
    "value", [{"b": 1, "a": [True, None, "x"], "Z": {"d": "\u20ac\n", "c": -(2**53) + 1}}, [], (1, "")]
)
def test_of_what_was_judged_before_it_is_the_same(value: object) -> None:
    assert strictjson.canonical_of_known(value) == strictjson.canonical(value)


@given(VALUES)
def test_canonical_text_reads_back_and_is_stable(value: object) -> None:
    try:
        written = strictjson.canonical(value)
        assert strictjson.loads(written) == value
        assert strictjson.canonical(strictjson.loads(written)) == written
    except InvalidJson:
        assert "\\u" in json.dumps(value)


@pytest.mark.bears("I14")
@given(st.binary(max_size=60) | st.text('[]{}",:\\u0123dD8eE+-.tf ', max_size=40).map(str.encode))
def test_any_bytes_are_json_or_a_typed_refusal(data: bytes) -> None:
    try:
        value = strictjson.loads(data)
    except InvalidJson:
        return
    assert json.loads(data) == value
