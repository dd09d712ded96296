"""Asking the policy in force: what is asked about a task, what is remembered, and what an approval would lift."""

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest

from broker.errors import PolicyDenied
from broker.server.tasks.config import Audience, Audiences
from broker.server.tasks.policy import bundle as bundles
from broker.server.tasks.policy.asked import Action
from broker.server.tasks.policy.decision import Decision, DeniedByPolicy, Effect, all_of
from broker.server.tasks.policy.rules import DECISIONS_KEPT, Rules
from broker.spiffe import SpiffeId
from broker.tasks import Authority, Delegation, Resource, Task
from broker.tasks.lineage import start_child
from tests.unit.server.store.samples import NOW

S = Resource("https://s.example.org")
T = Resource("https://t.example.org")
INNER = Resource("https://s.example.org/admin")
DIGEST = "sha-256:" + "A" * 43
PERMIT = '@id("all") permit(principal, action, resource);'


class Counted:
    def __init__(self) -> None:
        self.seen: list[tuple[str, str]] = []

    def __call__(self, action: str, effect: str) -> None:
        self.seen.append((action, effect))


def rules(text: str = PERMIT, count: Counted | None = None) -> Rules:
    audiences = Audiences([Audience(S), Audience(T, risk="low"), Audience(INNER)])
    return Rules(audiences, bundles.read(text), count)


def authority(*details: tuple[list[str], list[str], str | None]) -> Authority:
    return Authority.parse(
        [
            {"type": "api", "locations": locations, "actions": actions} | ({"identifier": one} if one else {})
            for locations, actions, one in details
        ]
    )


def made(wanted: Authority | None = None, **fields: Any) -> Task:
    told = {name: fields.pop(name) for name in ("acr", "auth_time") if name in fields}
    user = fields.pop("user", "alice")
    given = Delegation(
        issuer="https://idp.example.org", user=user, expires_at=NOW + timedelta(hours=1), token_hash=DIGEST, **told
    )
    good = {
        "id": "tsk_1", "root": "tsk_1", "parent": None, "depth": 0, "user": user,
        "agent": SpiffeId("spiffe://example.org/triage"), "session": "ws_1", "purpose": "x",
        "authority": wanted or authority(([S.text], ["ticket.read"], None)), "delegation": given,
        "created_at": NOW, "expires_at": NOW + timedelta(hours=1),
    }  # fmt: skip
    return Task(**(good | fields))


def test_a_question_is_asked_at_each_audience_that_the_authority_concerns() -> None:
    wide = authority(
        ([S.text + "/a", T.text], ["ticket.read"], "4711"),
        ([S.text], ["ticket.write"], None),
        ([INNER.text + "/x"], ["user.delete"], "1"),
    )
    asked = {one.audience: one for one in rules().to_begin(made(wide, acr="mfa"))}
    assert set(asked) == {S, T, INNER}
    assert asked[S].actions == {"ticket.read", "ticket.write"}
    assert (asked[S].identified, asked[T].identified, asked[T].risk, asked[S].risk) == (False, True, "low", "high")
    assert asked[INNER].actions == {"user.delete"}, "the nearest audience"
    assert {one.acr for one in asked.values()} == {"mfa"}


def test_all_of_them_must_be_allowed() -> None:
    judge = rules(PERMIT + '@id("no") forbid(principal, action, resource) when { resource.risk == Risk::"low" };')
    assert judge.may_begin(made()).is_allowed
    both = judge.may_begin(made(authority(([S.text, T.text], ["x"], None))))
    assert (both.effect, both.rules) == (Effect.DENY, ("no",))
    with pytest.raises(DeniedByPolicy) as caught:
        both.require()
    assert (caught.value.reason, caught.value.decision) == ("policy_denied", both)
    assert isinstance(caught.value, PolicyDenied)


def test_what_concerns_no_audience_is_denied() -> None:
    nowhere = made(authority((["https://gone.example.org"], ["x"], None)))
    assert rules().may_begin(nowhere).effect is Effect.DENY
    assert all_of((), bundle="h").effect is Effect.DENY


def test_a_token_needs_the_task_as_well() -> None:
    judge = rules(PERMIT + '@id("no") forbid(principal, action in Action::"begin", resource);')
    told = judge.may_issue(made(), S, made().authority, NOW)
    assert (told.effect, told.rules) == (Effect.DENY, ("no",))
    only = rules(PERMIT + '@id("no") forbid(principal, action == Action::"issueToken", resource);')
    assert only.may_begin(made()).is_allowed
    assert only.may_issue(made(), S, made().authority, NOW).rules == ("no",)
    assert only.may_issue(made(), S, made().authority, NOW, Action.TRANSACTION).is_allowed


def test_a_child_asks_as_a_child() -> None:
    parent = made()
    child = start_child(
        parent, (), id="tsk_c", agent=SpiffeId("spiffe://example.org/child"), session=None, purpose="x",
        authority=parent.authority, now=parent.created_at, ttl=timedelta(seconds=60),
    )  # fmt: skip
    (asked,) = rules().to_begin(child)
    assert (asked.action, asked.hop, str(asked.agent)) == (Action.CHILD, 1, "spiffe://example.org/child")


def test_the_same_question_is_evaluated_once() -> None:
    count = Counted()
    judge = rules(count=count)
    for number in range(5):
        assert judge.may_issue(made(id=f"tsk_{number}", root=f"tsk_{number}"), S, made().authority, NOW).is_allowed
    assert count.seen == [("startTask", "allow"), ("issueToken", "allow")]


@pytest.mark.parametrize(
    "other",
    [
        made(user="bob"),
        made(acr="mfa"),
        made(agent=SpiffeId("spiffe://example.org/other")),
        made(authority(([S.text], ["ticket.write"], None))),
        made(authority(([S.text], ["ticket.read"], "1"))),
        made(authority(([T.text], ["ticket.read"], None))),
    ],
    ids=["user", "acr", "agent", "action", "identifier", "audience"],
)
def test_another_question_is_another_answer(other: Task) -> None:
    count = Counted()
    judge = rules(count=count)
    judge.may_begin(made())
    judge.may_begin(other)
    assert len(count.seen) == 2


OLD_LOGIN = '@id("old") forbid(principal, action, resource) when { context has auth_age && context.auth_age > 60 };'


def test_time_is_part_of_the_question_where_a_rule_reads_it() -> None:
    judge = rules(PERMIT + OLD_LOGIN)
    fresh = made(auth_time=NOW, created_at=NOW)
    assert judge.may_issue(fresh, S, fresh.authority, NOW + timedelta(seconds=60)).is_allowed
    late = judge.may_issue(fresh, S, fresh.authority, NOW + timedelta(seconds=61))
    assert (late.effect, late.rules) == (Effect.DENY, ("old",))
    # A task that began is judged as it was then: it is the same question whenever it is asked again.
    assert judge.may_begin(fresh).is_allowed
    assert not judge.may_begin(made(auth_time=NOW - 2 * timedelta(seconds=60), created_at=NOW)).is_allowed


def test_time_is_not_part_of_it_where_none_does() -> None:
    count = Counted()
    judge = rules(count=count)
    one = made(auth_time=NOW, created_at=NOW)
    for seconds in range(10):
        judge.may_issue(one, S, one.authority, NOW + timedelta(seconds=seconds))
    assert len(count.seen) == 2


def test_another_bundle_has_another_memory() -> None:
    judge = rules()
    assert judge.may_begin(made()).is_allowed
    before = judge.hash
    judge.use(bundles.read('@id("none") forbid(principal, action, resource);'))
    assert judge.hash != before
    assert judge.may_begin(made()).rules == ("none",)
    judge.deny_all("sha-256:x", "not readable")
    told = judge.may_issue(made(), S, made().authority, NOW)
    assert (told.effect, told.bundle, told.errors) == (Effect.DENY, "sha-256:x", ("not readable",))
    assert "could not be evaluated" in told.message


def test_the_memory_is_bounded(monkeypatch) -> None:
    monkeypatch.setattr("broker.server.tasks.policy.rules.DECISIONS_KEPT", 4)
    judge = rules()
    for number in range(20):
        judge.may_begin(made(user=f"user{number}"))
        assert len(judge._in_force.answers) <= 4
    assert DECISIONS_KEPT > 4


BY_APPROVAL = (
    '@id("ask") @requires("approval") @advice("ask the owner") forbid(principal, action, resource)'
    ' when { context.actions.contains("ticket.delete") };'
)


def test_what_approval_would_lift() -> None:
    delete = made(authority(([S.text], ["ticket.delete"], None)))
    told = rules(PERMIT + BY_APPROVAL).may_begin(delete)
    assert (told.effect, told.code, told.rules) == (Effect.APPROVAL, "approval_required", ("ask",))
    assert told.hint == "ask the owner"
    with pytest.raises(DeniedByPolicy) as caught:
        told.require()
    assert caught.value.reason == "approval_required"
    assert rules(PERMIT + BY_APPROVAL).may_begin(made()).is_allowed


def test_approval_lifts_nothing_that_is_denied_anyway() -> None:
    delete = made(authority(([S.text], ["ticket.delete"], None)))
    no = '@id("no") forbid(principal, action, resource);'
    assert rules(PERMIT + BY_APPROVAL + no).may_begin(delete).effect is Effect.DENY
    told = rules(BY_APPROVAL).may_begin(delete)
    assert (told.effect, told.message) == (Effect.DENY, "no rule of the policy permits it")


def test_denial_weighs_more_than_approval() -> None:
    allow, ask, deny = (
        Decision(effect, "h", (effect.value,)) for effect in (Effect.ALLOW, Effect.APPROVAL, Effect.DENY)
    )
    assert all_of([allow, ask, deny], bundle="h") == deny
    assert all_of([ask, allow], bundle="h") == ask
    assert all_of([allow, replace(allow, rules=("b",))], bundle="h").rules == ("allow", "b")


def test_each_rule_says_how_it_stands() -> None:
    judge = rules(PERMIT + BY_APPROVAL + '@id("no") forbid(principal, action, resource) when { context.hop > 2 };')
    (asked,) = judge.to_begin(made(authority(([S.text], ["ticket.delete"], None))))
    assert [(rule.name, standing) for rule, standing in judge.trace(asked)] == [
        ("all", "applies"),
        ("ask", "applies"),
        ("no", "does not apply"),
    ]
