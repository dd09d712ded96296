"""The closed set of events, and the names that go with each."""

from broker.audit.events import COMMON, FIELDS, Event


def test_every_name_of_a_field_is_ascii() -> None:
    # By which the order of names is the same for every reader (RFC 8785 §3.2.3).
    assert all(name.isascii() for names in FIELDS.values() for name in names)


def test_every_event_says_what_may_be_said_of_it() -> None:
    assert FIELDS.keys() == set(Event)
    assert all(names >= COMMON for names in FIELDS.values())
    assert {event.value for event in Event} == {event.name.lower() for event in Event}
    forbidden = {"token", "access_token", "user_token", "key", "private_key", "join_token", "password", "secret"}
    assert not any(names & forbidden for names in FIELDS.values())
