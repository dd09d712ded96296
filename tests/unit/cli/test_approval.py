"""What a person sees of an approval, and what is judged before anything is sent."""

from pathlib import Path

import pytest

from broker._proto.broker.server.v1 import approvals_pb2
from broker.cli.approval import ONE, SHAPE, STATES, lines, row
from broker.cli.main import main
from broker.cli.output import Output
from broker.tasks.approval import ApprovalState

DETAILS = (
    '[{"actions":["payment.transfer"],"constraints":{"max_amount":{"amount":"100","currency":"EUR"},'
    '"recipient_domain":["shop.example"]},"identifier":"inv-4711","locations":["https://bank.example.org"],"type":"api"},'
    '{"actions":["payment.read"],"locations":["https://bank.example.org"],"type":"api"}]'
)
WAITING = approvals_pb2.Approval(
    id="apr_1", state="pending", task="tsk_1", agent="spiffe://example.org/triage", user="alice",
    issuer="https://idp.example.org", audience="https://bank.example.org", authorization_details=DETAILS,
    scope="payment.read payment.transfer", purpose="pay the invoice", rules=["payments"], created_at=1_800_000_000,
    expires_at=1_800_003_600,
)  # fmt: skip


@pytest.fixture
def token(tmp_path: Path) -> str:
    path = tmp_path / "token"
    path.write_text("a.b.c")
    return str(path)


def test_the_states_are_those_there_are() -> None:
    assert set(STATES) == {one.value for one in ApprovalState}


def test_a_person_sees_every_limit_that_they_say_yes_to() -> None:
    assert list(lines(row(WAITING))) == [
        "",
        "permits 1",
        "  actions: payment.transfer",
        "  identifier: inv-4711",
        "  locations: https://bank.example.org",
        "  type: api",
        '  max_amount: {"amount":"100","currency":"EUR"}',
        "  recipient_domain: shop.example",
        "",
        "permits 2",
        "  actions: payment.read",
        "  locations: https://bank.example.org",
        "  type: api",
    ]


def test_what_is_not_yet_is_none_and_nothing_of_a_token_is_there() -> None:
    members = row(WAITING)
    assert {name for name, value in members.items() if value is None} == {
        "parameter_digest", "decided_at", "decided_by", "reason", "approved_until", "used_at",
    }  # fmt: skip
    shown = {column.key for shape in (SHAPE, ONE) for column in shape.columns}
    assert shown <= members.keys()
    assert members.keys() - {column.key for column in ONE.columns} == {"authorization_details"}


def test_the_table_says_who_wants_what(capsys: pytest.CaptureFixture[str]) -> None:
    Output().many(SHAPE, [row(WAITING)])
    heading, line = capsys.readouterr().out.splitlines()
    assert heading.split() == ["ID", "STATE", "USER", "AGENT", "AUDIENCE", "SCOPE", "EXPIRES"]
    assert line.split()[:4] == ["apr_1", "pending", "alice", "spiffe://example.org/triage"]
    assert line.endswith("2027-01-15T09:00:00Z")


@pytest.mark.parametrize("verb", ["approve", "deny", "withdraw"])
def test_a_dry_run_sends_nothing(verb: str, token: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["approval", verb, "apr_1", "--user-token-file", token, "--reason", "seen", "--dry-run"]) == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert "apr_1 (--dry-run)" in err
    assert "a.b.c" not in err


@pytest.mark.parametrize(
    "wrong",
    [
        ["approve", "apr_1"],
        ["approve", "--user-token-file", "-"],
        ["approve", "apr_1", "--user-token-file", "/nowhere"],
        ["approve", "apr_1", "--user-token-file", "-", "--use-within", "0"],
        ["deny"],
        ["deny", "apr_1", "--user-token-file", "/nowhere"],
        ["deny", "apr_1", "--no-input"],
        ["withdraw", "apr_1", "--no-input"],
        ["list", "--state", "open"],
    ],
)
def test_what_makes_no_sense_is_2(wrong: list[str]) -> None:
    assert main(["approval", *wrong]) == 2
