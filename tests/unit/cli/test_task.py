"""What a task asks for is judged before anything is sent."""

import json
from pathlib import Path

import pytest

from broker.cli.main import main

DETAILS = '[{"type":"api","locations":["https://tickets.example.org"],"actions":["ticket.read"]}]'


@pytest.fixture
def token(tmp_path: Path) -> str:
    path = tmp_path / "token"
    path.write_text("a.b.c")
    return str(path)


def test_dry_run(token: str, capsys: pytest.CaptureFixture[str]) -> None:
    given = [
        "task",
        "start",
        "--user-token-file",
        token,
        "--purpose",
        "p",
        "--authorization-details",
        DETAILS,
        "--ttl",
        "10m",
    ]
    assert main([*given, "--dry-run", "-o", "json"]) == 0
    out, err = capsys.readouterr()
    shown = json.loads(out)
    assert shown["authorization_details"] == json.loads(DETAILS)
    assert shown["ttl"] == 600
    assert "a.b.c" not in out + err


def test_details_from_a_file(token: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "d.json").write_text(DETAILS)
    given = [
        "task",
        "start",
        "--user-token-file",
        token,
        "--purpose",
        "p",
        "--authorization-details",
        f"@{tmp_path}/d.json",
    ]
    assert main([*given, "--dry-run", "-o", "json"]) == 0


@pytest.mark.parametrize("details", ["{}", "[]", "nonsense", '[{"type":"unknown"}]'])
def test_wrong_details_are_2(details: str, token: str, capsys: pytest.CaptureFixture[str]) -> None:
    given = ["task", "start", "--user-token-file", token, "--purpose", "p", "--authorization-details", details]
    assert main([*given, "-o", "json"]) == 2
    assert json.loads(capsys.readouterr().err)["error"]["code"] == "invalid_authorization_details"


@pytest.mark.parametrize(
    "verb",
    [
        ["complete", "t"],
        ["revoke", "t"],
        ["suspend", "t"],
        ["resume", "t"],
        ["handoff", "t", "--to", "spiffe://example.org/b"],
    ],
)
def test_dry_run_sends_nothing(verb: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["task", *verb, "--dry-run", "-o", "name"]) == 0
    assert capsys.readouterr().out == "task/t\n"


@pytest.mark.parametrize(
    "wrong",
    [
        ["handoff", "t"],
        ["handoff", "t", "--to", "nobody"],
        ["suspend", "t", "--expected-version", "0"],
        ["revoke", "--user", "alice", "--expected-version", "1"],
        ["revoke", "--user", "alice", "--idempotency-key", "k"],
        ["revoke", "t", "--user", "alice"],
        ["tree"],
    ],
)
def test_a_wrong_command_line_is_2(wrong: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["task", *wrong, "--dry-run", "-o", "json"]) == 2
    assert json.loads(capsys.readouterr().err)["error"]["code"] == "usage"
