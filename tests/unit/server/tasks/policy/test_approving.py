"""Who may approve: whom the policy names for it, under the circumstances that it asks for; everybody else may not."""

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from broker.errors import Invalid
from broker.server.tasks.config import Audiences
from broker.server.tasks.policy import bundle as bundles
from broker.server.tasks.policy.asked import Action, ApprovalAsked, Asked
from broker.server.tasks.policy.bundle import PolicyRefused
from broker.server.tasks.policy.decision import Effect
from broker.server.tasks.policy.rules import Rules
from broker.spiffe import SpiffeId
from broker.tasks import Resource
from tests.unit.server.store.samples import NOW
from tests.unit.server.tasks.policy.test_rules import PERMIT, Counted, S, T, authority, made, rules

IDP = "https://idp.example.org"
BOB = {"approver": "bob", "approver_issuer": IDP, "acr": "mfa", "auth_age": 60}
ASKED = ApprovalAsked(
    agent=SpiffeId("spiffe://example.org/agent/triage"),
    user="alice",
    issuer=IDP,
    audience=Resource("https://s.example.org/a"),
    actions=frozenset({"ticket.delete"}),
    **BOB,  # type: ignore[arg-type]
)
BY_BOB = '@id("bob") permit(principal == User::"bob", action == Action::"approve", resource);'
BY_ANYBODY = '@id("anybody") permit(principal, action == Action::"approve", resource);'
DELETE = authority(([S.text, T.text], ["ticket.delete"], "4711"))
TO_APPROVE = (
    '@id("ask") @requires("approval") forbid(principal, action, resource)'
    ' when { context.actions.contains("ticket.delete") };'
)


def judge(text: str, **changes: Any) -> tuple[Effect, tuple[str, ...]]:
    decision = Rules(Audiences(), bundles.read(text)).judge(replace(ASKED, **changes))
    assert decision.errors == ()
    return decision.effect, decision.rules


def approver_when(condition: str, head: str = "principal") -> str:
    return f'@id("a") permit({head}, action == Action::"approve", resource) when {{ {condition} }};'


class TestWhoApproves:
    @pytest.mark.parametrize(
        "scope",
        [
            'action == Action::"approve"',
            'action in Action::"approve"',
            'action in [Action::"approve"]',
            'action in [Action::"issue", Action::"approve"]',
        ],
    )
    def test_a_permit_that_names_approving(self, scope: str) -> None:
        text = f'@id("bob") permit(principal == User::"bob", {scope}, resource);'
        assert judge(text) == (Effect.ALLOW, ("bob",))
        assert judge(text, approver="carol") == (Effect.DENY, ())

    def test_a_permit_for_both_is_one_for_agents_too(self) -> None:
        text = '@id("both") permit(principal, action in [Action::"issueToken", Action::"approve"], resource);'
        agent = Asked(
            action=Action.ISSUE, agent=ASKED.agent, user="alice", issuer=IDP, audience=ASKED.audience,
        )  # fmt: skip
        rules_ = Rules(Audiences(), bundles.read(text))
        assert rules_.judge(agent).is_allowed
        assert not rules_.judge(replace(agent, action=Action.START)).is_allowed
        assert rules_.judge(ASKED).is_allowed

    def test_who_approves_starts_nothing(self) -> None:
        judging = rules(BY_ANYBODY)
        assert judging.may_begin(made()).effect is Effect.DENY
        assert bundles.read(BY_ANYBODY).is_closed

    @pytest.mark.parametrize(
        ("condition", "changes"),
        [
            ('context.user == User::"alice"', {"user": "carol"}),
            (f'context.user in Issuer::"{IDP}"', {"user": "carol", "issuer": "https://other.example.org"}),
            ('context.agent in AgentPath::"spiffe://example.org/agent"', {"agent": SpiffeId("spiffe://example.org/b")}),
            ('context.agent == Agent::"spiffe://example.org/agent/triage"', {"agent": SpiffeId("spiffe://e.org/x")}),
            ('["ticket.delete"].containsAll(context.actions)', {"actions": frozenset({"ticket.*"})}),
            ('context.families.contains("ticket.*")', {"actions": frozenset({"wiki.read"})}),
            ("!context.identified", {"identified": True}),
            ('context has acr && context.acr == "mfa"', {"acr": "0"}),
            ('context has acr && context.acr == "mfa"', {"acr": None}),
            ("context has auth_age && context.auth_age <= 300", {"auth_age": 301}),
            ("context has auth_age && context.auth_age <= 300", {"auth_age": None}),
            ("context.hop == 0", {"hop": 1}),
            ('context.supervision != Supervision::"none"', {"supervision": "none"}),
            ('resource.risk == Risk::"high"', {"risk": "low"}),
            ('resource in Location::"https://s.example.org/a"', {"audience": Resource("https://s.example.org/b")}),
            ("principal != context.user", {"approver": "alice"}),
            (f'principal in Issuer::"{IDP}"', {"approver_issuer": "https://other.example.org"}),
        ],
    )
    def test_each_circumstance(self, condition: str, changes: dict[str, Any]) -> None:
        text = approver_when(condition)
        assert judge(text) == (Effect.ALLOW, ("a",))
        assert judge(text, **changes) == (Effect.DENY, ())

    def test_a_forbid_stands_whatever_it_names(self) -> None:
        for scope in ("action", 'action == Action::"approve"'):
            text = BY_ANYBODY + f'@id("no") forbid(principal == User::"bob", {scope}, resource);'
            assert judge(text) == (Effect.DENY, ("no",))
            assert judge(text, approver="carol") == (Effect.ALLOW, ("anybody",))
        # One of every action holds for people as well.
        text = BY_ANYBODY + '@id("deep") @advice("fewer") forbid(principal, action, resource) when { context.hop > 1 };'
        assert judge(text, hop=2) == (Effect.DENY, ("deep",))
        assert judge(text) == (Effect.ALLOW, ("anybody",))

    def test_what_waits_for_approval_does_not_stand_against_it(self) -> None:
        text = PERMIT + TO_APPROVE + BY_ANYBODY
        assert judge(text) == (Effect.ALLOW, ("anybody",))
        judging = rules(text)
        assert judging.may_begin(made(DELETE)).effect is Effect.APPROVAL, "and waits for it all the same"

    def test_rules_bear_their_own_names(self) -> None:
        """The rules of approving are numbered anew by the engine; an answer names those that decided."""
        text = (
            PERMIT + TO_APPROVE + '@id("carol") permit(principal == User::"carol", action == Action::"approve", resource);'
            '@id("no-tokens") forbid(principal, action in Action::"issue", resource);' + BY_BOB
            + '@id("dave") forbid(principal == User::"dave", action, resource);' + BY_ANYBODY
        )  # fmt: skip
        assert judge(text) == (Effect.ALLOW, ("bob", "anybody"))
        assert judge(text, approver="carol") == (Effect.ALLOW, ("carol", "anybody"))
        assert judge(text, approver="dave") == (Effect.DENY, ("dave",))
        trace = Rules(Audiences(), bundles.read(text)).trace(ASKED)
        assert [(rule.name, standing) for rule, standing in trace if standing != "does not apply"] == [
            ("bob", "applies"),
            ("anybody", "applies"),
        ]

    def test_what_is_read_is_of_the_rules_that_count(self) -> None:
        text = (
            PERMIT.replace("resource);", "resource) when { context.identified };")
            + TO_APPROVE
            + '@id("old") forbid(principal, action, resource) when { context.hop > 1 };'
            + approver_when('context.agent in AgentPath::"spiffe://example.org/agent"')
        )
        bundle = bundles.read(text)
        assert bundle.reads[Action.APPROVE] == {"hop", "agent"}
        assert bundle.approving is not None
        assert bundle.approving.reads[Action.APPROVE] == {"hop", "agent"}
        assert bundle.reads[Action.START] == {"identified", "actions", "hop"}

    def test_any_error_denies(self) -> None:
        bundle = bundles.read(BY_ANYBODY + '@id("deep") forbid(principal, action, resource) when { context.hop > 1 };')
        approving = bundle.judging(Action.APPROVE)
        assert approving is not None
        verdict = approving.engine.ask(ASKED, frozenset())
        assert not verdict.allows
        assert "hop" in verdict.errors[0]


@pytest.mark.parametrize(
    "text",
    [
        '@id("a") permit(principal == User::"bob", action, resource);',
        '@id("a") permit(principal in Issuer::"https://idp.example.org", action, resource);',
        '@id("a") permit(principal is User, action, resource);',
        '@id("a") permit(principal is User in Issuer::"https://idp.example.org", action, resource);',
        '@id("a") permit(principal, action, resource) when { action == Action::"approve" };',
        '@id("a") @requires("approval") forbid(principal, action == Action::"approve", resource);',
        '@id("a") @requires("approval") forbid(principal, action in [Action::"issue", Action::"approve"], resource);',
    ],
)
def test_what_seems_to_say_who_approves_and_does_not_is_refused(text: str) -> None:
    with pytest.raises(PolicyRefused) as caught:
        bundles.read(text)
    assert [(one.rule, one.code) for one in caught.value.problems] == [("a", "policy_approving")]


def test_a_rule_that_names_approving_is_held_against_all_of_the_schema() -> None:
    for scope, condition in (
        ('action == Action::"approve"', '[Agent::"spiffe://example.org/a"].contains(principal)'),
        ('action in [Action::"begin", Action::"approve"]', '[Agent::"spiffe://example.org/a"].contains(principal)'),
        ('action in [Action::"begin", Action::"approve"]', 'context.agent == Agent::"spiffe://example.org/a"'),
        ('action == Action::"approve"', 'context.acr == "mfa"'),
        ('action == Action::"approve"', 'context.approver == User::"bob"'),
    ):
        with pytest.raises(PolicyRefused) as caught:
            bundles.read(f'@id("a") permit(principal, {scope}, resource) when {{ {condition} }};')
        assert caught.value.reason == "policy_invalid"


class TestTheQuestion:
    @pytest.mark.parametrize(
        "changes",
        [
            {"approver": ""},
            {"approver": "a\nb"},
            {"approver_issuer": "http://idp.example.org"},
            {"user": ""},
            {"issuer": "x"},
            {"acr": ""},
            {"auth_age": -1},
            {"hop": -1},
            {"risk": "none"},
            {"supervision": "x"},
            {"approver": "alice", "approver_issuer": "https://other.example.org"},
        ],
    )
    def test_it_is_checked(self, changes: dict[str, Any]) -> None:
        with pytest.raises(Invalid):
            replace(ASKED, **changes)

    def test_no_agent_approves(self) -> None:
        with pytest.raises(Invalid, match="nothing that an agent does"):
            Asked(action=Action.APPROVE, agent=ASKED.agent, user="alice", issuer=IDP, audience=ASKED.audience)
        assert Action.APPROVE.group is None

    def test_who_approves_his_own_is_asked_about_like_anybody(self) -> None:
        """That nobody does is no matter of the policy; the question must be a whole one all the same."""
        assert judge(BY_ANYBODY, approver="alice") == (Effect.ALLOW, ("anybody",))


class TestAboutATask:
    def test_a_question_is_asked_at_each_audience(self) -> None:
        asked = {one.audience: one for one in rules(BY_BOB).to_approve(made(DELETE, acr="0"), None, DELETE, **BOB)}
        assert set(asked) == {S, T}
        one = asked[T]
        assert (one.action, one.risk, one.actions, one.identified) == (Action.APPROVE, "low", {"ticket.delete"}, True)
        assert (one.approver, one.approver_issuer, one.user, one.issuer) == ("bob", IDP, "alice", IDP)
        # The sign-in is the approver's, not that of the user of the task.
        assert (one.acr, one.auth_age, one.hop, one.supervision) == ("mfa", 60, 0, "attached")
        assert str(one.agent) == "spiffe://example.org/triage"

    def test_a_resource_is_asked_about_alone(self) -> None:
        judging = rules(approver_when('resource.risk == Risk::"low"'))
        task = made(DELETE)
        assert [one.audience for one in judging.to_approve(task, T, DELETE, **BOB)] == [T]
        assert judging.may_approve(task, T, DELETE, **BOB).is_allowed
        assert judging.may_approve(task, S, DELETE, **BOB).effect is Effect.DENY
        assert judging.may_approve(task, None, DELETE, **BOB).effect is Effect.DENY, "all of them must be allowed"

    def test_it_is_allowed_by_name(self) -> None:
        judging = rules(PERMIT + TO_APPROVE + BY_BOB)
        told = judging.may_approve(made(DELETE), None, DELETE, **BOB)
        assert (told.effect, told.rules, told.bundle) == (Effect.ALLOW, ("bob",), judging.hash)
        other = judging.may_approve(made(DELETE), None, DELETE, **BOB | {"approver": "carol"})
        assert (other.effect, other.code, other.rules) == (Effect.DENY, "policy_denied", ())

    def test_what_concerns_no_audience_is_denied(self) -> None:
        nowhere = authority((["https://gone.example.org"], ["x"], None))
        assert rules(BY_ANYBODY).may_approve(made(nowhere), None, nowhere, **BOB).effect is Effect.DENY

    def test_it_is_counted_and_not_kept(self) -> None:
        count = Counted()
        judging = rules(BY_BOB, count)
        for approver in ("bob", "carol", "bob"):
            judging.may_approve(made(), None, made().authority, **BOB | {"approver": approver})
        assert count.seen == [("approve", "allow"), ("approve", "deny"), ("approve", "allow")]
        assert judging._in_force.answers == {}

    def test_another_policy_counts_at_once(self) -> None:
        judging = rules(BY_BOB)
        judging.use(bundles.read(PERMIT))
        assert judging.may_approve(made(), None, made().authority, **BOB).effect is Effect.DENY
        judging.deny_all("sha-256:x", "not readable")
        told = judging.may_approve(made(), None, made().authority, **BOB)
        assert (told.effect, told.errors) == (Effect.DENY, ("not readable",))

    def test_agents_are_asked_about_as_before(self) -> None:
        """Who approves is no work of an exchange: the same two evaluations, by the same rules."""
        count = Counted()
        judging = rules(PERMIT + BY_ANYBODY, count)
        for number in range(3):
            task = made(id=f"tsk_{number}", root=f"tsk_{number}")
            assert judging.may_issue(task, S, task.authority, NOW + timedelta(seconds=number)).rules == ("all",)
        assert count.seen == [("startTask", "allow"), ("issueToken", "allow")]
