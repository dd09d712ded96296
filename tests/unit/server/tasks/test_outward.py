"""What an operator may decide about outward tokens and types of details, and what is refused at the start."""

from datetime import timedelta
from typing import Any

import pytest

from broker.errors import Invalid, Misconfigured, PolicyDenied
from broker.server.tasks.config import Audience, Audiences
from broker.server.tasks.detail_types import DetailType, DetailTypes
from broker.server.tasks.outward import RemoteServer, RemoteServers, TransactionRules
from broker.tasks import Resource
from broker.tasks.grants import GrantFormat
from tests.unit.server.tasks.estate import AGENT, NEIGHBOUR, REMOTE, TICKETS, WIKI, authority, detail

AUDIENCES = Audiences([Audience(WIKI), Audience(TICKETS)])


def remote(**fields: Any) -> RemoteServer:
    return RemoteServer(**{"issuer": REMOTE, "resources": frozenset({WIKI})} | fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"issuer": "http://as.partner.example"},
        {"issuer": "https://u@as.partner.example"},
        {"resources": frozenset()},
        {"formats": frozenset()},
        {"ttl": timedelta(seconds=59)},
        {"ttl": timedelta(seconds=301)},
        {"clients": {AGENT: ""}},
    ],
)
def test_a_remote_server_that_cannot_be(fields: dict[str, Any]) -> None:
    with pytest.raises(Misconfigured):
        remote(**fields)


@pytest.mark.parametrize(
    "servers",
    [
        [remote(), remote()],
        [remote(resources=frozenset({Resource("https://unregistered.example")}))],
        [remote(issuer=TICKETS.text)],
    ],
)
def test_remote_servers_that_contradict_each_other(servers: list[RemoteServer]) -> None:
    with pytest.raises(Misconfigured):
        RemoteServers(servers, AUDIENCES)


def test_a_remote_server_is_found_by_its_exact_issuer_and_format() -> None:
    servers = RemoteServers([remote(clients={AGENT: "triage"})], AUDIENCES)
    found = servers.find(REMOTE, GrantFormat.ID_JAG)
    assert (found.client_of(AGENT), found.client_of(NEIGHBOUR)) == ("triage", str(NEIGHBOUR))
    for issuer, wanted in (
        (REMOTE + "/", GrantFormat.ID_JAG),
        (REMOTE.upper(), GrantFormat.ID_JAG),
        (REMOTE, GrantFormat.JWT),
    ):
        with pytest.raises(PolicyDenied) as caught:
            servers.find(issuer, wanted)
        assert caught.value.reason == "invalid_target"
    assert found.resource_of(None) == WIKI
    two = remote(resources=frozenset({WIKI, TICKETS}))
    for wanted in (None, Resource("https://elsewhere.example")):
        with pytest.raises(PolicyDenied):
            two.resource_of(wanted)


def test_a_transaction_lives_15_to_60_seconds() -> None:
    for seconds in (14, 61):
        with pytest.raises(Misconfigured):
            TransactionRules(AGENT.trust_domain, timedelta(seconds=seconds))
    with pytest.raises(Misconfigured):
        Audience(TICKETS, transaction_requesters=frozenset({AGENT}))


def test_registered_types_narrow_what_may_be_asked_for() -> None:
    types = DetailTypes.of([DetailType("api", ("ticket.*", "wiki.read"), frozenset({"identifier"}))])
    types.require(authority(detail(actions=["ticket.read", "ticket.write"], identifier="4711")))
    types.require(authority(detail(actions=["ticket.*"])))
    for refused in (
        {"type": "agent_tool"},
        {"actions": ["ticketing.read"]},
        {"actions": ["ticket.read", "wiki.write"]},
        {"actions": ["wiki.*"]},
        {"constraints": {"tenant": "t1"}},
    ):
        with pytest.raises(Invalid) as caught:
            types.require(authority(detail(**refused)))
        assert caught.value.reason == "invalid_authorization_details"
    DetailTypes().require(authority(detail(type="agent_tool", constraints={"tenant": "t1"})))


@pytest.mark.parametrize(
    "make",
    [
        lambda: DetailType("payment"),
        lambda: DetailType("api", ("*",)),
        lambda: DetailType("api", members=frozenset({"colour"})),
        lambda: DetailTypes.of([DetailType("api"), DetailType("api")]),
    ],
)
def test_types_that_cannot_be_registered(make: Any) -> None:
    with pytest.raises(Misconfigured):
        make()
