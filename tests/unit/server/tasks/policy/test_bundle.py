"""Which bundles are accepted, and why others are not: with every problem that they have."""

import pytest

from broker.server.tasks.policy import bundle as bundles
from broker.server.tasks.policy.asked import Action
from broker.server.tasks.policy.bundle import MAX_BYTES, MAX_RULES, PolicyRefused

PERMIT = '@id("all") permit(principal, action, resource);'


def when(condition: str, name: str = "a", annotations: str = "") -> str:
    return f'@id("{name}") {annotations} forbid(principal, action, resource) when {{ {condition} }};'


def refused(text: str) -> list[tuple[str, str]]:
    with pytest.raises(PolicyRefused) as caught:
        bundles.read(text)
    assert caught.value.reason == caught.value.problems[0].code
    assert caught.value.hint
    return [(one.rule, one.code) for one in caught.value.problems]


def test_the_built_in_bundle() -> None:
    found = bundles.built_in()
    assert [rule.name for rule in found.rules] == ["agents-act-for-users", "high-risk-needs-a-login"]
    assert not found.is_closed
    assert found.hash == bundles.hash_of(bundles.built_in_text())


def test_a_rule_is_known_by_its_annotations() -> None:
    text = PERMIT + when("context.hop > 1", "deep", '@advice("fewer agents") @requires("approval")')
    permit, forbid = bundles.read(text).rules
    assert (permit.name, permit.permits, permit.advice, permit.by_approval) == ("all", True, "", False)
    assert (forbid.name, forbid.permits, forbid.advice, forbid.by_approval) == ("deep", False, "fewer agents", True)


def test_what_is_read_is_known_for_each_action() -> None:
    text = (
        PERMIT
        + '@id("b") forbid(principal, action in Action::"begin", resource) when { context has auth_age && context.auth_age > 3 };'
        + '@id("c") forbid(principal, action in [Action::"issueToken", Action::"handOff"], resource) when { context.hop > 3 };'
        + '@id("d") forbid(principal, action == Action::"startTask", resource) when { context.identified };'
    )
    reads = bundles.read(text).reads
    assert reads[Action.START] == {"auth_age", "identified"}
    assert reads[Action.HANDOFF] == {"auth_age", "hop"}
    assert reads[Action.ISSUE] == {"hop"}
    assert reads[Action.GRANT] == frozenset()


def test_brackets_in_texts_and_comments_are_none() -> None:
    text = "// " + "(" * 50 + "\n" + when('context.user == User::"' + "[" * 50 + '"') + PERMIT
    assert len(bundles.read(text).rules) == 2


@pytest.mark.parametrize("text", ["", "// nothing", when("true")])
def test_without_a_permit_it_is_closed(text: str) -> None:
    assert bundles.read(text).is_closed


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("permit(principal, action", "policy_syntax"),
        ("permit(principal, action, resource) when { 1.5 > 1 };", "policy_syntax"),
        ("\ud800", "policy_syntax"),
        (PERMIT + " " * MAX_BYTES, "policy_too_large"),
        (
            "".join(f'@id("r{n}") permit(principal, action, resource);' for n in range(MAX_RULES + 1)),
            "policy_too_large",
        ),
        (when("(" * 40 + "true" + ")" * 40), "policy_syntax"),
        (when("[" * 5000 + "]" * 5000), "policy_syntax"),
        (when("context has a" + ".a" * 1900), "policy_syntax"),
        (when(" && ".join(["context.hop > 1"] * 200)), "policy_syntax"),
        (when("+".join(["1"] * 1900)), "policy_syntax"),
        (when(" && ".join(["true"] * 600)), "policy_too_large"),
        ("// " + "x" * 5000 + "\n" + PERMIT, "policy_too_large"),
        ('@id("a") permit(principal == ?principal, action, resource);', "policy_template"),
        ("permit(principal, action, resource);", "policy_unnamed"),
        ('@id("") permit(principal, action, resource);', "policy_unnamed"),
        ('@id("a\\nb") permit(principal, action, resource);', "policy_unnamed"),
        (PERMIT + PERMIT, "policy_name_twice"),
        ('@id("a") @adivce("x") permit(principal, action, resource);', "policy_annotation"),
        (f'@id("a") @advice("{"x" * 301}") permit(principal, action, resource);', "policy_annotation"),
        ('@id("a") @advice("a\\nb") permit(principal, action, resource);', "policy_annotation"),
        (when("true", annotations='@requires("money")'), "policy_annotation"),
        ('@id("a") @requires("approval") permit(principal, action, resource);', "policy_annotation"),
        (when('context.actions == ["ticket.read"]'), "policy_literal"),
        (when('["ticket.read"] != context.actions'), "policy_literal"),
    ],
)
def test_what_is_refused(text: str, code: str) -> None:
    assert refused(text)[0][1] == code


@pytest.mark.parametrize(
    "condition",
    [
        "context.acrr == 1",
        'context.acr == "0"',  # optional, and not asked for first
        "context.hop",
        'context.hop == "1"',
        "context.hop > 1.0",
        'resource.risk == Risk::"hihg"',
        'context.supervision == Supervision::"atached"',
        'context.purpose == "triage"',
        'principal in Agents::"x"',
        'action == Action::"startTsak"',
        "principal.name == resource",
    ],
)
def test_what_the_schema_does_not_know_is_refused(condition: str) -> None:
    assert {code for _, code in refused(when(condition))} <= {"policy_invalid", "policy_syntax"}


@pytest.mark.bears("AC08")
@pytest.mark.parametrize(
    "condition",
    [
        'context.act.sub == "spiffe://example.org/x"',
        'context.act.act.sub == "spiffe://example.org/x"',
        'context["act"]["act"]["sub"] == "x"',
        "context has act && context.act has act",
        "context.actors.contains(principal)",
        'principal.parent == Agent::"spiffe://example.org/x"',
        'context.chain.contains("x")',
    ],
)
def test_a_rule_that_looks_at_the_agents_behind_is_refused(condition: str) -> None:
    assert ("a", "policy_reads_act") in refused(when(condition))
    text = f'@id("a") permit(principal, action, resource) when {{ {condition} }};'
    assert ("a", "policy_reads_act") in refused(text)


@pytest.mark.parametrize(
    ("literal", "better"),
    [
        ('principal == Agent::"spiffe://Example.org/x"', ""),
        ('principal == Agent::"spiffe://example.org/x/"', ""),
        ('principal == Agent::"spiffe://example.org/*"', ""),
        ('principal in AgentPath::"spiffe://example.org/x/"', ""),
        ('principal in AgentPath::"/x"', ""),
        ('resource == Audience::"https://S.example.org:443/"', "https://s.example.org"),
        ('resource == Audience::"http://s.example.org"', ""),
        ('resource in Location::"https://s.example.org/a/"', "https://s.example.org/a"),
        ('resource in Location::"https://s.example.org/a/../b"', ""),
        ('context.user == User::""', ""),
        ('context.user in Issuer::"http://idp.example.org"', ""),
    ],
)
def test_a_literal_that_can_match_nothing_is_refused(literal: str, better: str) -> None:
    """A forbid that never applies lets everything through: so it is no matter of taste how a name is written."""
    assert ("a", "policy_literal") in refused(PERMIT + when(literal))
    with pytest.raises(PolicyRefused, match=f'write .*"{better}"' if better else "can match nothing"):
        bundles.read(PERMIT + when(literal))


def test_every_problem_is_told() -> None:
    text = (
        "permit(principal, action, resource);"
        + when("context.nothing == 1", "b")
        + when('principal == Agent::"x"', "c", '@foo("1")')
    )
    assert refused(text) == [
        ("rule 1", "policy_unnamed"),
        ("c", "policy_annotation"),
        ("c", "policy_literal"),
        *[("b", "policy_invalid")] * len(Action),
    ]
