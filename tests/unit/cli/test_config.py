"""``broker config`` says what can be set, what is set, and what is wrong, from the models that the programs read."""

import json
from pathlib import Path

import pytest

from broker.agent.settings import AgentSettings
from broker.cli.main import main
from broker.server.settings import ServerSettings


def answer(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> dict:
    assert main([*arguments, "-o", "json"]) == code
    told = capsys.readouterr()
    return json.loads(told.err if code else told.out or "{}")


@pytest.mark.parametrize(("program", "model"), [("server", ServerSettings), ("agent", AgentSettings)])
def test_every_setting_is_described(program: str, model: type, capsys: pytest.CaptureFixture[str]) -> None:
    items = answer(capsys, "config", "schema", program)["items"]
    assert {item["setting"].split(".")[1].removesuffix("[]") for item in items} == set(model.model_fields)
    assert [item["setting"] for item in items if not item["description"]] == []


def test_a_wrong_setting_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "server.toml"
    file.write_text('[server]\ntrust_domian = "example.org"\n')
    error = answer(capsys, "config", "check", "server", "--config", str(file), code=78)["error"]
    assert "trust_domian" in error["message"]
    assert "trust_domain" in error["hint"]


def test_what_is_set_is_shown_and_a_secret_is_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "agent.toml"
    file.write_text('[agent]\ntrust_domain = "one.test"\njoin_token = "very-secret-token"\n')
    shown = answer(capsys, "config", "show", "agent", "--config", str(file))
    values = {item["setting"]: item["value"] for item in shown["items"]}
    assert values["agent.trust_domain"] == "one.test"
    assert values["agent.join_token"] == "<secret>"
    assert "very-secret-token" not in json.dumps(shown)
