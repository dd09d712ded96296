"""The adapter: the same answers as an evaluator of our own, questions that the schema accepts, and errors that never allow."""

import json
from dataclasses import replace

import cedarpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker.server.tasks.config import Audiences
from broker.server.tasks.policy import bundle as bundles
from broker.server.tasks.policy import cedar, facts
from broker.server.tasks.policy.asked import Action, Asked, families_of, paths_above, places_above
from broker.server.tasks.policy.decision import Effect
from broker.server.tasks.policy.rules import Rules
from broker.spiffe import SpiffeId
from broker.tasks import Resource
from tests.unit.server.tasks.policy.small_evaluator import cedar_text, evaluate, made_rules, policies, questions

EVERYTHING = frozenset({"user", "agent", "actions", "families", "identified", "acr", "auth_age", "hop", "supervision"})
ASKED = Asked(
    action=Action.START,
    agent=SpiffeId("spiffe://example.org/agent/triage"),
    user="alice",
    issuer="https://idp.example.org",
    audience=Resource("https://s.example.org/a"),
    actions=frozenset({"ticket.read"}),
)


def decide(text: str, asked: Asked = ASKED):
    return Rules(Audiences(), bundles.read(text)).judge(asked)


@settings(max_examples=120, deadline=None)
@given(policies, st.lists(questions, min_size=1, max_size=4))
def test_the_engine_and_a_small_evaluator_agree(rules, asked_of) -> None:
    bundle = bundles.read(cedar_text(rules))
    judge = Rules(Audiences(), bundle).judge
    for asked in asked_of:
        decision = judge(asked)
        assert decision.errors == ()
        effect, names = evaluate(rules, asked)
        assert (decision.effect.value, frozenset(decision.rules)) == (effect, names), cedar_text(rules)


@settings(max_examples=100, deadline=None)
@given(policies, made_rules("extra", permits=st.just(False)), questions)
def test_another_forbid_never_allows_more(rules, forbid, asked) -> None:
    before = decide(cedar_text(rules), asked)
    after = decide(cedar_text([*rules, forbid]), asked)
    assert before.is_allowed or not after.is_allowed


@settings(max_examples=100, deadline=None)
@given(questions)
def test_every_question_is_one_that_the_schema_knows(asked) -> None:
    schema = cedarpy.Schema.from_str(cedar.schema_text())
    entities = cedarpy.Entities.from_json_str(json.dumps(list(facts.entities_of(asked))), schema)
    kind, name = asked.principal
    request = {
        "principal": {"type": kind, "id": name},
        "action": {"type": "Action", "id": asked.action.value},
        "resource": {"type": "Audience", "id": asked.audience.text},
        "context": json.dumps(facts.circumstances(asked, EVERYTHING, frozenset())),
    }
    answer = cedarpy.is_authorized(request, "permit(principal, action, resource);", entities, schema=schema)
    assert answer.allowed, answer.diagnostics.errors


@pytest.mark.bears("BG11")
def test_an_error_inside_a_forbid_denies() -> None:
    """The engine itself answers Allow, with the error beside it: that is what must never come through."""
    text = '@id("all") permit(principal, action, resource);\n@id("far") forbid(principal, action, resource) when { context.hop > 3 };'
    bundle = bundles.read(text)
    # No rule can be made to fail by a question that the schema knows: here the question itself is crippled.
    verdict = bundle.engine.ask(ASKED, frozenset())
    assert not verdict.allows
    assert "hop" in verdict.errors[0]
    raw = cedarpy.is_authorized(
        {
            "principal": {"type": "Agent", "id": str(ASKED.agent)},
            "action": {"type": "Action", "id": "startTask"},
            "resource": {"type": "Audience", "id": ASKED.audience.text},
            "context": "{}",
        },
        cedarpy.PolicySet.from_str(text),
        "[]",
    )
    assert raw.allowed, "the engine allows it: without our rule this would be a grant"


@pytest.mark.bears("SP11")
@pytest.mark.parametrize(
    ("agent", "holds"),
    [
        ("spiffe://example.org/agent", True),
        ("spiffe://example.org/agent/triage", True),
        ("spiffe://example.org/agent/triage/2", True),
        ("spiffe://example.org/agent-evil", False),
        ("spiffe://example.org/agents", False),
        ("spiffe://example.org/other/agent", False),
        ("spiffe://example.org.evil/agent", False),
        ("spiffe://evil.example.org/agent", False),
    ],
)
def test_a_prefix_ends_at_a_segment(agent: str, holds: bool) -> None:
    text = '@id("a") permit(principal in AgentPath::"spiffe://example.org/agent", action, resource);'
    assert decide(text, replace(ASKED, agent=SpiffeId(agent))).is_allowed is holds


@pytest.mark.bears("SP11")
def test_no_identity_can_be_compared_by_a_pattern() -> None:
    for condition in ('principal like "spiffe://*"', 'principal.id like "*"', 'resource.uri like "https://s*"'):
        with pytest.raises(bundles.PolicyRefused):
            bundles.read(f'@id("a") permit(principal, action, resource) when {{ {condition} }};')


def test_a_place_holds_what_lies_below_it() -> None:
    text = '@id("a") permit(principal, action, resource in Location::"https://s.example.org/a");'
    allowed = {
        path: decide(text, replace(ASKED, audience=Resource(f"https://s.example.org{path}"))).is_allowed
        for path in ("", "/a", "/a/", "/a/b", "/ab")
    }
    assert allowed == {"": False, "/a": True, "/a/": True, "/a/b": True, "/ab": False}


def test_a_family_asks_for_each_of_its_names() -> None:
    """Who asks for ticket.* asks for ticket.delete: a forbid of that name must see it."""
    text = (
        '@id("all") permit(principal, action, resource);'
        '@id("no") forbid(principal, action, resource) when { context.actions.contains("ticket.delete") };'
    )
    asked = {
        name: decide(text, replace(ASKED, actions=frozenset({name}))).effect
        for name in ("ticket.read", "ticket.delete", "ticket.*", "ticketing.*")
    }
    assert asked == {
        "ticket.read": Effect.ALLOW,
        "ticket.delete": Effect.DENY,
        "ticket.*": Effect.DENY,
        "ticketing.*": Effect.ALLOW,
    }


def test_hierarchies() -> None:
    assert paths_above(SpiffeId("spiffe://example.org/a/b")) == (
        "spiffe://example.org/a/b",
        "spiffe://example.org/a",
        "spiffe://example.org",
    )
    assert places_above(Resource("https://s.example.org:9443/a")) == (
        "https://s.example.org:9443/a",
        "https://s.example.org:9443",
    )
    assert places_above(Resource("https://s.example.org")) == ("https://s.example.org",)
    assert families_of("a.b.c") == ("a.*", "a.b.*")
    assert families_of("a.*") == ("a.*",)
    assert families_of("a") == ()
