"""Octets in JSON: one copy, one form."""

import pytest

from broker.attestation.base64_json import MAX_MESSAGE, members, octets, read, text
from broker.errors import InvalidJson


def test_what_is_written_is_read() -> None:
    assert octets(text(b"\xfb\xff\x00")) == b"\xfb\xff\x00"
    assert members(read(b'{"a": "AA=="}'), "a") == {"a": "AA=="}


@pytest.mark.parametrize("value", [None, 1, [], "AB==", "AA", "AA==\n", "A A=", "_w==", "é", "AAAA"])
def test_refused_values(value) -> None:
    with pytest.raises(InvalidJson):
        octets(value, 2)


@pytest.mark.parametrize("value", [None, [], "a", {}, {"A": 1}, {"a": 1, "A": 1}])
def test_exactly_the_members_that_are_wanted(value) -> None:
    with pytest.raises(InvalidJson):
        members(value, "a")


@pytest.mark.bears("I10")
def test_two_copies_of_a_member_and_what_is_too_much() -> None:
    with pytest.raises(InvalidJson):
        read(b'{"a": "AA==", "a": "AB=="}')
    with pytest.raises(InvalidJson) as why:
        read(b'"' + b"x" * MAX_MESSAGE + b'"')
    assert why.value.reason == "json_too_large"
    with pytest.raises(InvalidJson):
        read(b"[[[[[1]]]]]")
