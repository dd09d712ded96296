"""A policy of before anybody approved: it is accepted, says the same of agents, and makes nobody an approver."""

import cedarpy
import pytest
from hypothesis import given, settings

from broker.server.tasks.config import Audiences
from broker.server.tasks.policy import bundle as bundles
from broker.server.tasks.policy import cedar
from broker.server.tasks.policy.bundle import PolicyRefused
from broker.server.tasks.policy.decision import Effect
from broker.server.tasks.policy.rules import Rules
from tests.unit.server.tasks.policy.small_evaluator import APPROVE, approvals, cedar_text, policies
from tests.unit.server.tasks.policy.test_approving import BY_ANYBODY, BY_BOB, IDP, judge

CONDITIONS = (
    "context.hop > 1",
    'context.user == User::"alice"',
    f'context.user in Issuer::"{IDP}"',
    'context.actions.contains("ticket.delete")',
    '["ticket.read"].containsAll(context.actions)',
    'context.families.contains("ticket.*")',
    "context.identified",
    'context has acr && context.acr == "0"',
    "context has auth_age && context.auth_age > 43200",
    'context.supervision == Supervision::"none"',
    'resource.risk == Risk::"high"',
    'resource in Location::"https://s.example.org"',
    'principal in AgentPath::"spiffe://example.org/agent"',
    'principal == Agent::"spiffe://example.org/agent"',
    'principal != Agent::"spiffe://example.org/agent"',
    "principal is Agent",
    'principal is Agent in AgentPath::"spiffe://example.org/agent"',
    'principal in [AgentPath::"spiffe://example.org/a", AgentPath::"spiffe://example.org/b"]',
    '!(principal in AgentPath::"spiffe://example.org/agent")',
    'if principal == Agent::"spiffe://example.org/a" then context.hop > 1 else context.identified',
    "context.user in principal",
    "principal == context.user",
    '[Agent::"spiffe://example.org/a", Agent::"spiffe://example.org/b"].contains(principal)',
    '[principal].contains(Agent::"spiffe://example.org/a")',
    '[Agent::"spiffe://example.org/a"].containsAll([principal])',
    '[principal] == [Agent::"spiffe://example.org/a"]',
    'action == Action::"startTask"',
    'action in [Action::"begin"]',
)


@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("head", ["permit", "forbid", '@requires("approval") forbid'])
def test_rules_of_every_action(head: str, condition: str) -> None:
    text = f'@id("a") {head}(principal, action, resource) when {{ {condition} }};'
    before = cedarpy.Schema.from_str(cedar.agents_schema_text())
    assert cedarpy.validate_policies(text, before).validation_passed
    assert bundles.read(text).approving is None
    assert judge(text) == (Effect.DENY, ())
    # Beside it there may be who approves; its own conditions then are asked of a person, and cannot fail.
    effect, by = judge(text + BY_ANYBODY)
    assert (effect, by) == (Effect.ALLOW, ("anybody",)) or (head, effect, by) == ("forbid", Effect.DENY, ("a",))


@pytest.mark.parametrize(
    "scope",
    [
        'principal in AgentPath::"spiffe://example.org/agent"',
        'principal == Agent::"spiffe://example.org/agent/triage"',
        "principal is Agent",
        'principal is Agent in AgentPath::"spiffe://example.org/agent"',
    ],
)
def test_rules_of_some_agents(scope: str) -> None:
    bundles.read(f'@id("a") permit({scope}, action, resource);')
    # Such a forbid is about agents, and no approver is one.
    assert judge(f'@id("a") forbid({scope}, action, resource);' + BY_ANYBODY) == (Effect.ALLOW, ("anybody",))


@pytest.mark.parametrize(
    "scope", ["action", 'action in Action::"begin"', 'action in [Action::"begin", Action::"issue"]']
)
def test_a_permit_that_does_not_name_approving_makes_nobody_an_approver(scope: str) -> None:
    text = f'@id("all") permit(principal, {scope}, resource);'
    assert judge(text) == (Effect.DENY, ())
    # Nor does it beside one that names another person.
    assert judge(text + BY_BOB, approver="carol") == (Effect.DENY, ())


def test_the_built_in_policy_names_nobody() -> None:
    assert bundles.built_in().approving is None
    assert judge(bundles.built_in_text()) == (Effect.DENY, ())


@settings(max_examples=100, deadline=None)
@given(policies, approvals)
def test_whatever_it_is(made_rules, asked) -> None:
    before = [rule for rule in made_rules if rule.action[1] != APPROVE]
    assert not Rules(Audiences(), bundles.read(cedar_text(before))).judge(asked).is_allowed


def test_what_was_refused_is_refused() -> None:
    for condition in (
        '[User::"alice"].contains(principal)',
        '[Agent::"spiffe://example.org/a"].contains(context.user)',
        '[Agent::"spiffe://example.org/a"].contains(principal) && context.acr == "0"',
        'context.agent in AgentPath::"spiffe://example.org/agent"',
    ):
        with pytest.raises(PolicyRefused) as caught:
            bundles.read(f'@id("a") forbid(principal, action, resource) when {{ {condition} }};')
        assert caught.value.reason == "policy_invalid"
