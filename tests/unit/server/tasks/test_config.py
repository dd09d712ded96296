"""What an operator may set about tasks."""

from typing import Any

import pytest

from broker.errors import Misconfigured, PolicyDenied
from broker.server.tasks.config import Audience, Audiences, SubjectIssuer, TaskDefaults
from broker.tasks import Resource

TICKETS = Resource("https://tickets.example.org/api")


@pytest.mark.parametrize(
    "fields",
    [
        {"binding": frozenset()},
        {"binding": frozenset({"bearer"})},
        {"risk": "none"},
        {"token_ttl": 9},
        {"token_ttl": 301},
    ],
)
def test_an_audience_that_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(Misconfigured):
        Audience(TICKETS, **fields)


@pytest.mark.parametrize(
    "fields",
    [{"token_ttl": 9}, {"token_ttl": 301}, {"task_ttl": 0}, {"task_ttl": 90_000}, {"max_task_ttl": 30 * 86400 + 1}],
)
def test_lives_that_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(Misconfigured):
        TaskDefaults(**fields)


def test_only_what_is_registered_exists() -> None:
    nothing = Audiences()
    with pytest.raises(PolicyDenied):
        nothing.find(TICKETS)
    some = Audiences([Audience(TICKETS)])
    assert some.find(Resource("https://TICKETS.example.org:443/api")).resource == TICKETS
    some.require_holding(Resource("https://tickets.example.org/api/4711"))
    for other in (
        "https://tickets.example.org",
        "https://tickets.example.org/api2",
        "https://tickets.example.org/api/x",
    ):
        with pytest.raises(PolicyDenied):
            some.find(Resource(other))
    for other in ("https://tickets.example.org", "https://tickets.example.org/api2"):
        with pytest.raises(PolicyDenied):
            some.require_holding(Resource(other))
    with pytest.raises(Misconfigured):
        Audiences([Audience(TICKETS), Audience(TICKETS)])


def test_a_namespace_is_short_printable_text() -> None:
    for namespace in ("a b", "\n", "x" * 65, "é"):
        with pytest.raises(Misconfigured):
            SubjectIssuer("https://idp.example", frozenset({"b"}), namespace=namespace)


def test_who_makes_delegations_is_a_client() -> None:
    with pytest.raises(Misconfigured) as caught:
        SubjectIssuer("https://idp.example", frozenset({"b"}), delegation_clients=frozenset({"console"}))
    assert caught.value.reason == "delegation_client_unknown"
    makers = frozenset({"console", "b"})
    SubjectIssuer("https://idp.example", frozenset({"b"}), clients=frozenset({"console"}), delegation_clients=makers)
