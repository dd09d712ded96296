"""What a standing delegation permits, and that it is stored as it was."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from broker.errors import Invalid, PolicyDenied, Refused
from broker.spiffe import SpiffeId, strictjson
from broker.tasks import Authority, Cause, Delegation
from broker.tasks.standing import AgentPattern, StandingDelegation, read_agents

NOW = datetime(2026, 11, 28, 12, 0, tzinfo=UTC)
MADE = StandingDelegation(
    id="dlg_1", issuer="https://idp.example.org", user="alice", client="console", token_hash="sha-256:" + "A" * 43,
    auth_time=NOW, authority=Authority.parse([{"type": "api", "locations": ["https://a.example"], "actions": ["a.read"]}]),
    agents=read_agents(["spiffe://example.org/triage", "spiffe://example.org/team/*"]), purpose="p",
    max_task_ttl=600, max_hops=2, created_at=NOW, expires_at=NOW + timedelta(hours=1), session="s-1", acr="2",
)  # fmt: skip


@pytest.mark.parametrize(
    ("agent", "named"),
    [("/triage", True), ("/team/a", True), ("/team/a/b", True), ("/team", False), ("/teamster/a", False), ("/triage/a", False)],
)  # fmt: skip
def test_agents_are_named_at_segments(agent: str, named: bool) -> None:
    if named:
        MADE.require_agent(SpiffeId(f"spiffe://example.org{agent}"))
        return
    with pytest.raises(PolicyDenied):
        MADE.require_agent(SpiffeId(f"spiffe://example.org{agent}"))


def test_another_trust_domain_is_another() -> None:
    whole = AgentPattern("spiffe://example.org/*")
    assert whole.covers(SpiffeId("spiffe://example.org/any"))
    assert not whole.covers(SpiffeId("spiffe://example.org.evil.example/any"))
    for text in ("spiffe://example.org", "example.org/*", "spiffe://example.org/a/*/b", "*"):
        with pytest.raises(Invalid):
            AgentPattern(text)


def test_it_comes_back_as_it_was_and_carries_no_session() -> None:
    terms = strictjson.loads(strictjson.canonical(MADE.terms()))
    times = {name: getattr(MADE, name) for name in ("auth_time", "created_at", "expires_at")}
    assert StandingDelegation.of(terms, id="dlg_1", issuer=MADE.issuer, user="alice", **times) == MADE
    carried = MADE.delegation()
    assert (carried.standing, carried.session, carried.max_hops, carried.given_at) == ("dlg_1", None, 2, NOW)
    assert carried.issued_at == MADE.created_at
    assert Delegation.parse(strictjson.loads(strictjson.canonical(carried.to_json()))) == carried


def test_a_delegation_of_an_older_server_is_still_read() -> None:
    old = {name: value for name, value in MADE.delegation().to_json().items() if name not in ("issued_at", "standing", "max_hops")}  # fmt: skip
    read = Delegation.parse(old)
    assert (read.issued_at, read.standing, read.max_hops) == (None, None, None)
    for wrong in ({"surprise": 1}, {"max_hops": True}, {"standing": 1}, {"issued_at": "now"}):
        with pytest.raises(Invalid):
            Delegation.parse(old | wrong)


def test_over_is_over() -> None:
    MADE.require_live(NOW)
    for over, now, code, state in (
        (MADE, NOW + timedelta(hours=1), "delegation_expired", "expired"),
        (replace(MADE, ended_at=NOW, cause=Cause.DELEGATION_WITHDRAWN), NOW, "delegation_withdrawn", "withdrawn"),
    ):
        with pytest.raises(Refused) as refused:
            over.require_live(now)
        assert (refused.value.reason, over.state(now)) == (code, state)


@pytest.mark.parametrize(
    "wrong",
    [{"agents": ()}, {"max_task_ttl": 0}, {"max_hops": 0}, {"max_hops": 9}, {"expires_at": NOW}, {"client": ""}, {"purpose": " "}],
)  # fmt: skip
def test_what_cannot_be(wrong: dict[str, Any]) -> None:
    with pytest.raises(Invalid):
        replace(MADE, **wrong)
