"""Forms: one meaning or none."""

import time
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.errors import Invalid
from broker.server.api.http.form import MAX_BODY, Form, parse_form

ALLOWED = frozenset({"a", "b", "resource"})


def parse(body: bytes) -> Form:
    return parse_form(body, allowed=ALLOWED, repeatable=frozenset({"resource"}))


def test_a_form_is_read() -> None:
    form = parse(b"a=x+y%2Bz&b=%C3%A9=1&resource=1&resource=2&resource=1")
    assert form.require("a") == "x y+z"
    assert form.get("b") == "é=1"
    assert form.all("resource") == ("1", "2", "1")
    assert form.get("resource") is None
    assert parse(b"").get("a") is None


@pytest.mark.bears("TX01", "TX02", "TX23", "X01")
@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"a=", "parameter_empty"),
        (b"a", "parameter_empty"),
        (b"resource=", "parameter_empty"),
        (b"a=1&a=1", "parameter_repeated"),
        (b"a=1&A=1", "parameter_unknown"),
        (b"c=1", "parameter_unknown"),
        (b"=1", "parameter_unknown"),
        (b"&", "parameter_unknown"),
        (b"a=1&", "parameter_unknown"),
        (b"a=1;b=2&c", "parameter_unknown"),
        (b"a[]=1", "parameter_unknown"),
        (b"a=%", "form_encoding"),
        (b"a=%4", "form_encoding"),
        (b"a=%zz", "form_encoding"),
        (b"a=%ff", "form_encoding"),
        (b"a=%C0%AF", "form_encoding"),
        (b"a=%ED%A0%80", "form_encoding"),
        (b"a=%00", "form_encoding"),
        (b"a=x\xc3\xa9", "form_encoding"),
        (b"a=x y", "form_encoding"),
        (b"a=x\ny", "form_encoding"),
        (b"&".join([b"resource=1"] * 65), "too_many_parameters"),
    ],
)
def test_what_does_not_have_one_meaning_is_refused(body: bytes, code: str) -> None:
    with pytest.raises(Invalid) as caught:
        parse(body)
    assert caught.value.reason == code


def test_a_parameter_that_must_be_there() -> None:
    with pytest.raises(Invalid) as caught:
        parse(b"b=1").require("a")
    assert caught.value.reason == "parameter_missing"


@pytest.mark.bears("TX24")
def test_the_largest_bodies_are_judged_quickly() -> None:
    def took() -> float:
        started = time.thread_time()
        for body in (b"a=" + b"%41" * (MAX_BODY // 3), b"&" * MAX_BODY, b"a=" + b"+" * MAX_BODY, b"%" * MAX_BODY):
            with suppress(Invalid):
                parse(body)
        return time.thread_time() - started

    # The quickest of some: the collector or a busy machine is in the others.
    assert min(took() for _ in range(5)) < 0.5


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(body: bytes) -> None:
    try:
        form = parse(body)
    except Invalid:
        return
    assert form.get("a") != ""
