"""``broker policy``: what can be said without a server, its exit codes, and the form of a file of cases."""

import json
from pathlib import Path

import pytest

from broker._proto.broker.server.v1 import policies_pb2
from broker.cli.main import main
from broker.cli.policy import ACTIONS, decision_lines, decision_row
from broker.server.tasks.policy.asked import Action

GOOD = '@id("all") permit(principal, action, resource);\n@id("no") forbid(principal, action, resource) when { context.hop > 2 };\n'
CASES = """
policy: policy.cedar
audiences:
  - {resource: "https://s.example.org", risk: low}
cases:
  - name: a first agent
    ask: {action: startTask, agent: "spiffe://example.org/a", user: alice, issuer: "https://idp.example.org", audience: "https://s.example.org"}
    expect: allow
    rules: [all]
  - name: a fourth agent
    ask: {action: startChild, agent: "spiffe://example.org/a", user: alice, issuer: "https://idp.example.org", audience: "https://s.example.org", hop: 3}
    expect: deny
"""


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    file = tmp_path / "policy.cedar"
    file.write_text(GOOD)
    return file


@pytest.fixture
def cases(tmp_path: Path, policy: Path) -> Path:
    file = tmp_path / "cases.yaml"
    file.write_text(CASES)
    return file


def test_a_good_policy(policy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["policy", "check", str(policy), "-o", "json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["kind"], told["valid"], told["rules"], told["problems"]) == ("policy_check", True, 2, [])
    assert told["hash"].startswith("sha-256:")


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("permit(principal", "policy_syntax"),
        ("permit(principal, action, resource);", "policy_unnamed"),
        ('@id("a") permit(principal, action, resource) when { context.act == 1 };', "policy_reads_act"),
        ('@id("a") permit(principal, action, resource) when { context.nothing };', "policy_invalid"),
    ],
)
def test_a_policy_that_a_server_would_refuse(
    policy: Path, text: str, code: str, capsys: pytest.CaptureFixture[str]
) -> None:
    policy.write_text(text)
    assert main(["policy", "check", str(policy), "-o", "json"]) == 5
    told = json.loads(capsys.readouterr().out)
    assert (told["valid"], told["problems"][0]["code"]) == (False, code)
    assert main(["policy", "check", str(policy)]) == 5
    shown = capsys.readouterr()
    assert f"({code})" in shown.out
    assert "refused" in shown.err


def test_a_closed_policy_is_told(policy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    policy.write_text("// nothing")
    assert main(["policy", "check", str(policy)]) == 0
    assert "denies everything" in capsys.readouterr().err


def test_the_built_in_policy_is_a_good_one() -> None:
    assert main(["policy", "check", "built-in"]) == 0


@pytest.mark.parametrize("content", [None, b"\xff", b" " * (64 * 1024 + 1)])
def test_what_is_no_file_of_text(policy: Path, content: bytes | None) -> None:
    if content is None:
        policy.unlink()
    else:
        policy.write_bytes(content)
    assert main(["policy", "check", str(policy)]) == 2


def test_cases_that_hold(cases: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["policy", "test", str(cases), "-o", "json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [(one["name"], one["holds"], one["decided"], one["rules"]) for one in told["items"]] == [
        ("a first agent", True, "allow", ["all"]),
        ("a fourth agent", True, "deny", ["no"]),
    ]


APPROVING = """
policy: policy.cedar
cases:
  - name: bob
    ask: {action: approve, approver: bob, agent: "spiffe://example.org/a", user: alice, issuer: "https://idp.example.org", audience: "https://s.example.org"}
    expect: allow
    rules: [bob]
  - name: another's bob
    ask: {action: approve, approver: bob, approver_issuer: "https://other.example.org", agent: "spiffe://example.org/a", user: alice, issuer: "https://idp.example.org", audience: "https://s.example.org"}
    expect: deny
  - name: carol
    ask: {action: approve, approver: carol, agent: "spiffe://example.org/a", user: alice, issuer: "https://idp.example.org", audience: "https://s.example.org"}
    expect: deny
"""
BOB = (
    '@id("bob") permit(principal == User::"bob", action == Action::"approve", resource)'
    ' when { principal in Issuer::"https://idp.example.org" };\n'
)
TO_APPROVE = '@id("ask") @requires("approval") forbid(principal, action, resource) when { context.identified };\n'


def test_cases_of_who_approves(cases: Path, policy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    policy.write_text(GOOD + BOB)
    cases.write_text(APPROVING)
    assert main(["policy", "test", str(cases)]) == 0
    assert "3 of 3 hold" in capsys.readouterr().err
    # Of every action is not of approving.
    policy.write_text(GOOD)
    assert main(["policy", "test", str(cases)]) == 5
    assert "2 of 3 hold" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        ("approver: bob, ", "", "ask has no approver"),
        ("approver: bob, ", "approver: 1, ", "approver is missing or no text"),
        ("approver: bob, ", "approver: bob, approver_issuer: x, ", "approver_issuer"),
        ("action: approve", "action: startTask", "with the action approve"),
        ("approver: bob, ", "approver: alice, approver_issuer: 'https://other.example.org', ", "two issuers"),
    ],
)
def test_a_case_of_who_approves_that_is_wrong(
    cases: Path, before: str, after: str, told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    cases.write_text(APPROVING.replace(before, after, 1))
    assert main(["policy", "test", str(cases)]) == 2
    assert told in capsys.readouterr().err


def test_a_policy_whose_approvals_nobody_gives_is_told(policy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text, told in ((GOOD + TO_APPROVE, True), (GOOD + TO_APPROVE + BOB, False), (GOOD, False)):
        policy.write_text(text)
        assert main(["policy", "check", str(policy)]) == 0
        assert ("want a person's approval" in capsys.readouterr().err) is told
    # Who may approve begins nothing: it is as closed as one that permits nothing.
    policy.write_text(BOB)
    assert main(["policy", "check", str(policy)]) == 0
    assert "denies everything" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("before", "after"), [("expect: allow", "expect: deny"), ("rules: [all]", "rules: [other]"), ("hop: 3", "hop: 2")]
)
def test_a_case_that_does_not_hold(cases: Path, before: str, after: str, capsys: pytest.CaptureFixture[str]) -> None:
    cases.write_text(CASES.replace(before, after))
    assert main(["policy", "test", str(cases)]) == 5
    shown = capsys.readouterr()
    assert "no" in shown.out
    assert "1 of 2 hold" in shown.err


def test_the_same_cases_of_another_policy(cases: Path) -> None:
    assert main(["policy", "test", str(cases), "--policy", "built-in"]) == 5


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (CASES, "["),
        (CASES, "policy: policy.cedar\ncases: []"),
        (CASES, "- 1"),
        ("expect: allow", "expects: allow"),
        ("expect: allow", "expect: perhaps"),
        ("expect: allow", ""),
        ("hop: 3", "hops: 3"),
        ("hop: 3", "hop: x"),
        ("hop: 3", "hop: -1"),
        ("hop: 3", "identified: 1"),
        ("user: alice, ", ""),
        ("startTask", "startTsak"),
        ("spiffe://example.org/a", "spiffe://Example.org/a"),
        ('"https://s.example.org", risk', '"http://s.example.org", risk'),
        ("risk: low", "risk: lowest"),
        ("rules: [all]", "rules: all"),
        ("audiences:", "audience:"),
    ],
)
def test_a_file_of_cases_that_is_wrong(cases: Path, before: str, after: str) -> None:
    text = CASES.replace(before, after, 1)
    assert text != CASES
    cases.write_text(text)
    assert main(["policy", "test", str(cases)]) in {2, 78}


def test_a_file_of_cases_may_be_json(cases: Path, policy: Path) -> None:
    ask = {
        "action": "issueToken", "agent": "spiffe://example.org/a", "user": "alice", "issuer": "https://idp.example.org",
        "audience": "https://s.example.org", "actions": ["x"], "acr": "mfa", "auth_age": 3, "identified": True,
        "supervision": "none", "risk": "normal",
    }  # fmt: skip
    cases.write_text(json.dumps({"policy": "policy.cedar", "cases": [{"ask": ask, "expect": "allow"}]}))
    assert main(["policy", "test", str(cases)]) == 0


def test_a_file_that_names_no_policy_needs_one(cases: Path, policy: Path) -> None:
    cases.write_text(CASES.replace("policy: policy.cedar\n", ""))
    assert main(["policy", "test", str(cases)]) == 2
    assert main(["policy", "test", str(cases), "--policy", str(policy)]) == 0


def test_a_push_is_of_one_policy(policy: Path) -> None:
    assert main(["policy", "push", "--yes"]) == 2
    assert main(["policy", "push", str(policy), "--built-in", "--yes"]) == 2
    assert main(["policy", "push", str(policy), "--no-input"]) != 0


def test_the_actions_are_the_rules_own() -> None:
    assert set(ACTIONS) == {one.value for one in Action}


def test_an_explanation_for_a_person_and_for_a_program() -> None:
    question = policies_pb2.PolicyQuestion(
        action="startTask", agent="spiffe://example.org/a", user="alice", audience="https://s.example.org", risk="high"
    )
    trace = [policies_pb2.ExplainedRule(id="no", effect="forbid", standing="applies")]
    part = policies_pb2.ExplainedQuestion(question=question, effect="deny", rules=["no"], trace=trace, errors=["oh"])
    told = policies_pb2.ExplainDecisionResponse(
        effect="deny", code="policy_denied", message="denied", hint="ask", policy="sha-256:x", rules=["no"], parts=[part],
        task_id="tsk_1", task_state="active",
    )  # fmt: skip
    assert list(decision_lines(told)) == [
        "task tsk_1  (active)",
        "startTask  spiffe://example.org/a  for alice  at https://s.example.org (high risk)",
        "  forbid  no  applies",
        "  error   oh",
        "  deny",
        "result: denied (policy_denied)",
        "hint: ask",
        "policy: sha-256:x",
    ]
    row = decision_row(told)
    assert (row["effect"], row["rules"], row["task"]) == ("deny", ["no"], "tsk_1")
    assert row["parts"][0]["question"]["auth_age"] is None  # type: ignore[index]
    assert row["parts"][0]["question"]["approver"] is None  # type: ignore[index]


def test_an_explanation_of_who_approves() -> None:
    question = policies_pb2.PolicyQuestion(
        action="approve", agent="spiffe://example.org/a", user="alice", audience="https://s.example.org", risk="low",
        approver="bob", approver_issuer="https://idp.example.org",
    )  # fmt: skip
    told = policies_pb2.ExplainDecisionResponse(
        effect="allow", parts=[policies_pb2.ExplainedQuestion(question=question, effect="allow")]
    )
    assert next(decision_lines(told)) == (
        "approve by bob  spiffe://example.org/a  for alice  at https://s.example.org (low risk)"
    )
    asked = decision_row(told)["parts"][0]["question"]  # type: ignore[index]
    assert (asked["approver"], asked["approver_issuer"]) == ("bob", "https://idp.example.org")
