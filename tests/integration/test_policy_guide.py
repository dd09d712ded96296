"""The how-to's policy is one that a server accepts, and its cases hold."""

import re
from pathlib import Path

import pytest

from broker.cli.main import main

GUIDE = Path(__file__).resolve().parents[2] / "docs/how-to/write-policies.md"


def test_the_guides_policy_and_its_cases(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"<!-- (\S+) -->\n```\w+\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    assert [name for name, _ in blocks] == ["policy.cedar", "cases.yaml"]
    for name, text in blocks:
        (tmp_path / name).write_text(text)
    assert main(["policy", "check", str(tmp_path / "policy.cedar")]) == 0
    assert main(["policy", "test", str(tmp_path / "cases.yaml")]) == 0
    assert "6 of 6 hold" in capsys.readouterr().err
