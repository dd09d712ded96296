import base64
import hashlib
import json
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from broker.audit import Event, Record
from broker.audit.events import FIELDS
from broker.errors import Invalid
from broker.spiffe import strictjson

NOW = datetime(2026, 11, 22, 12, 0, 0, 123456, tzinfo=UTC)
TEXTS = st.text(max_size=12)
VALUES = st.none() | st.booleans() | st.integers(-(2**53) + 1, 2**53 - 1) | TEXTS | st.lists(TEXTS, max_size=3)
RECORDS = st.sampled_from(Event).flatmap(
    lambda event: st.builds(
        Record,
        st.just(event),
        st.datetimes(
            min_value=datetime(2000, 1, 1),  # noqa: DTZ001
            timezones=st.sampled_from([UTC, timezone(timedelta(hours=-9))]),
        ),
        TEXTS.filter(bool),
        TEXTS.filter(bool),
        st.dictionaries(st.sampled_from(sorted(FIELDS[event])), VALUES, max_size=4),
    )
)


def record(**changes: Any) -> Record:
    fields: dict[str, Any] = {"event": Event.TASK_STARTED, "at": NOW, "actor": "a", "subject": "s", "fields": {}}
    return Record(**fields | changes)


def test_the_body_is_one_line_of_canonical_json() -> None:
    made = record(fields={"user": "usr_1", "depth": 0, "reasons": ["b", "a"]})
    assert made.body() == (
        b'{"actor":"a","at":"2026-11-22T12:00:00.123456Z","event":"task_started",'
        b'"fields":{"depth":0,"reasons":["b","a"],"user":"usr_1"},"subject":"s","v":1}'
    )


@pytest.mark.bears("L09")
@given(RECORDS)
def test_a_body_is_what_whoever_looks_at_every_part_would_write(made: Record) -> None:
    whole = {
        "v": 1,
        "event": str(made.event),
        "at": made.at.strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
        "actor": made.actor,
        "subject": made.subject,
        "fields": made.fields,
    }
    assert made.body() == strictjson.canonical(whole)


@pytest.mark.bears("L09")
@given(RECORDS)
def test_a_body_reads_as_its_record(made: Record) -> None:
    again = Record.from_body(made.body())
    assert again == made
    assert again.body() == made.body()


@pytest.mark.bears("L09")
@given(RECORDS, RECORDS)
def test_two_records_have_two_bodies(one: Record, other: Record) -> None:
    # Not the other way round: True equals 1 in Python, and is another value in the record.
    assert one == other or one.body() != other.body()


@pytest.mark.bears("L09")
@given(RECORDS, st.sampled_from(["event", "at", "actor", "subject", "fields"]), RECORDS)
def test_one_part_that_differs_makes_another_body(made: Record, part: str, other: Record) -> None:
    parts: dict[str, Any] = {name: getattr(made, name) for name in ("event", "at", "actor", "subject", "fields")}
    try:
        changed = Record(**parts | {part: getattr(other, part)})
    except Invalid:
        # The other event does not have these fields.
        return
    # Fields that are equal in Python may differ in kind: True is 1 there, and never here.
    assume(getattr(made, part) != getattr(other, part))
    assert changed.body() != made.body()


def test_kinds_of_values_are_kept_apart() -> None:
    bodies = {
        record(fields=fields).body()
        for fields in (
            {},
            {"user": None},
            {"user": ""},
            {"user": "1"},
            {"user": 1},
            {"user": True},
            {"user": ["1"]},
            {"user": []},
            {"user": "true"},
            {"user": "null"},
            {"user": '"1"'},
        )
    }
    assert len(bodies) == 11


def test_the_same_moment_has_one_form() -> None:
    there = NOW.astimezone(timezone(timedelta(hours=9)))
    assert record(at=there) == record()
    assert record(at=there).body() == record().body()
    assert b"12:00:00.000000Z" in record(at=NOW.replace(microsecond=0)).body()


def test_a_record_does_not_change_afterwards() -> None:
    fields: dict[str, Any] = {"reasons": ["a"]}
    made = record(fields=fields)
    body = made.body()
    fields["reasons"].append("b")
    fields["user"] = "x"
    assert made.body() == body
    with pytest.raises(TypeError):
        made.fields["user"] = "x"  # type: ignore[index]


TOKEN = "eyJhbGciOiJFUzI1NiJ9.eyJzdWIiOiJ1c3JfMSJ9.AAAA"


@pytest.mark.bears("S01", "L04")
@pytest.mark.parametrize(
    "secret",
    [
        TOKEN,
        f"Bearer {TOKEN}",
        TOKEN.rsplit(".", 1)[0] + ".",
        "-----BEGIN PRIVATE KEY-----\n",
        "-----BEGIN EC PRIVATE KEY",
    ],
)
def test_of_a_secret_only_the_hash_is_recorded(secret: str) -> None:
    digest = base64.urlsafe_b64encode(hashlib.sha256(secret.encode()).digest()).decode().rstrip("=")
    for changes in (
        {"actor": secret},
        {"subject": secret},
        {"fields": {"user": secret}},
        {"fields": {"reasons": ["x", secret]}},
    ):
        made = record(**changes)
        assert secret not in repr(made)
        assert secret[:20] not in made.body().decode()
        assert f"withheld sha-256:{digest} ({len(secret)} characters)" in made.body().decode()
        assert Record.from_body(made.body()) == made


@pytest.mark.bears("L03", "L04")
@pytest.mark.parametrize("text", ["x" * 8193, "\ud800", "a\udfffb"])
def test_no_text_keeps_an_event_out_of_the_log(text: str) -> None:
    made = record(event=Event.TASK_REFUSED, actor=text, subject=text, fields={"user": text, "reasons": [text]})
    assert len(made.body()) < 600
    assert Record.from_body(made.body()) == made
    assert record(subject=text + "x").body() != record(subject=text).body()


@pytest.mark.parametrize(
    "changes",
    [
        {"at": datetime(2026, 1, 1)},  # noqa: DTZ001
        {"actor": ""},
        {"subject": ""},
        {"subject": None},
        {"fields": {"nothing": 1}},
        {"fields": {"token": "x"}},
        {"fields": {"user": 1.5}},
        {"fields": {"user": b"x"}},
        {"fields": {"user": {"a": 1}}},
        {"fields": {"user": {"a"}}},
        {"fields": {"user": [1]}},
        {"fields": {"user": [["a"]]}},
        {"fields": {"user": 2**53}},
        {"fields": {"user": ["x"] * 257}},
    ],
)
def test_what_is_not_a_record_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(Invalid) as refused:
        record(**changes)
    assert refused.value.reason == "invalid_record"


def test_only_declared_events_are_recorded() -> None:
    with pytest.raises(ValueError, match="coffee"):
        record(event="coffee_made")


@pytest.mark.parametrize(
    "change",
    [
        {"v": 2},
        {"v": True},
        {"event": "coffee_made"},
        {"event": 7},
        {"at": "2026-11-22T12:00:00Z"},
        {"at": "2026-11-22T12:00:00.000000+00:00"},
        {"at": "2026-13-22T12:00:00.000000Z"},
        {"at": 7},
        {"actor": ""},
        {"actor": None},
        {"fields": []},
        {"fields": {"nothing": 1}},
        {"fields": {"user": {}}},
        {"fields": {"user": 1.5}},
        {"fields": {"user": [1]}},
        {"extra": 1},
    ],
)
def test_a_body_that_we_would_not_write_is_refused(change: dict[str, Any]) -> None:
    value = json.loads(record().body()) | change
    with pytest.raises(Invalid):
        Record.from_body(json.dumps(value, sort_keys=True, separators=(",", ":")).encode())


@pytest.mark.parametrize("body", [b"", b"[]", b"\xff", b"{}", record().body() + b" ", b" " + record().body()])
def test_a_body_has_no_second_form(body: bytes) -> None:
    with pytest.raises(Invalid):
        Record.from_body(body)
