"""``broker run`` as it is typed: names, options, and what stands behind the program's name."""

import json
import sys
from pathlib import Path

import pytest

from broker.cli.main import main
from tests.fakes.launching import private, run, script


@pytest.mark.parametrize("name", ["", "One", "a b", "a" * 65, "é", "a\n", "a:b"])
def test_names(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--as", name, "-o", "json", "--", "/bin/true"]) == 2
    assert json.loads(capsys.readouterr().err)["error"]["code"] == "launch_name"


def test_dry_run_tells_the_selectors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = script(tmp_path, "pass")
    assert main(["run", "--as", "a-1_b", "--dry-run", "-o", "json", sys.executable, path, "--dry-run"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["kind"] == "launch"
    assert shown["selectors"] == ["launch:name:a-1_b", f"launch:code:{shown['sha256']}"]
    assert shown["arguments"][1:] == ["-I", "/proc/self/fd/3", "--dry-run"]


@pytest.mark.parametrize(
    "arguments", [["--", "/bin/true"], ["--as", "one"], ["--as", "one", "--group", "g", "--", "/bin/true"]]
)
def test_usage(arguments: list[str]) -> None:
    assert main(["run", *arguments]) == 2


def test_the_programs_options_are_its_own(tmp_path: Path) -> None:
    """Neither an answer's format nor help is ours to give behind the program's name."""
    directory = private(tmp_path)
    ended = run("--as", "one", "--directory", str(directory), "--", "/bin/echo", "-o", "json", "--help")
    assert ended.stdout == "-o json --help\n"
    ended = run("--as", "one", "--directory", str(directory), "--", "/nonexistent", "-o", "json")
    assert ended.stderr.startswith("error: ")


def test_the_directory_is_found_beside_the_socket(tmp_path: Path) -> None:
    private(tmp_path)
    socket = f"unix://{tmp_path}/public/api.sock"
    ended = run("--as", "one", "--socket", socket, "--", "/bin/ls", str(tmp_path / "private" / "launches"))
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.endswith(".json\n")
