"""The tree starts fast, loads what it uses, and tells people apart from programs when it fails."""

import json
import subprocess
import sys

import pytest

from broker.cli import connections
from broker.cli.main import main
from broker.cli.root import NOUNS
from broker.sdk import endpoint
from broker.version import __version__

HEAVY = (
    "grpc",
    "google.protobuf",
    "pydantic",
    "pydantic_settings",
    "structlog",
    "cryptography",
    "uvicorn",
    "sqlite_utils",
    "httpx2",
)


def run(*arguments: str, code: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code] if code else [sys.executable, "-m", "broker.cli.main"]
    return subprocess.run([*command, *arguments], capture_output=True, text=True, check=False, timeout=30)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["version", "-o", "json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert (answer["kind"], answer["version"]) == ("version", __version__)


def test_version_imports_nothing_heavy() -> None:
    code = (
        "import sys, broker.cli.main as m\n"
        "m.main(['version', '-q'])\n"
        f"print([n for n in {HEAVY!r} if n in sys.modules], file=sys.stderr)"
    )
    assert run(code=code).stderr == "[]\n"


@pytest.mark.parametrize("noun", ["svid", "token", "entry", "join-token", "task"])
def test_help_imports_nothing_heavy(noun: str) -> None:
    code = (
        "import sys, broker.cli.main as m\n"
        f"m.main([{noun!r}, '--help'])\n"
        f"print([n for n in {HEAVY!r} if n in sys.modules], file=sys.stderr)"
    )
    assert run(code=code).stderr == "[]\n"


def test_svid_and_token_never_import_settings_and_logs() -> None:
    code = (
        "import sys, broker.cli.main as m\n"
        "m.main(['svid', 'jwt', '--audience', 'a', '--socket', '/nonexistent', '-q'])\n"
        "m.main(['token', 'inspect', 'x', '-q'])\n"
        "bad = ('pydantic', 'pydantic_settings', 'structlog', 'uvicorn', 'broker.server', 'broker.agent')\n"
        "print([n for n in bad if n in sys.modules], file=sys.stderr)"
    )
    assert run(code=code).stderr.splitlines()[-1] == "[]"


def test_without_click_it_says_which_extra() -> None:
    code = "import sys; sys.modules['click'] = None\nfrom broker.cli.main import main\nsys.exit(main(['version']))"
    ended = run(code=code)
    assert ended.returncode == 78
    assert "identity-broker[agent]" in ended.stderr
    assert ended.stdout == ""


@pytest.mark.parametrize("noun", sorted(NOUNS))
def test_each_noun_has_help(noun: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([noun, "--help"]) == 0
    assert "Usage: broker" in capsys.readouterr().out


def test_the_bare_command_is_its_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    out = capsys.readouterr().out
    assert all(noun in out for noun in NOUNS)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nonsense"], "No such command"),
        (["entry"], "a verb is missing"),
        (["entry", "create"], "Missing option '--spiffe-id'"),
        (["entry", "show"], "one entry ID is needed"),
        (["version", "--nope"], "No such option"),
        (["version", "-o", "xml"], "Invalid value"),
        (["token", "verify", "--audience", "a"], "Missing option"),
        (["entry", "delete", "x", "--no-input"], "Nobody may be asked"),
    ],
)
def test_wrong_usage_is_2_with_a_hint(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err
    assert "hint: " in err


@pytest.mark.parametrize("spelling", [["-o", "json"], ["-ojson"], ["--output=json"], ["--output", "jsonl"]])
def test_usage_errors_are_json_for_programs(spelling: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["entry", "create", *spelling]) == 2
    assert json.loads(capsys.readouterr().err)["error"]["code"] == "usage"


@pytest.mark.parametrize(
    "arguments",
    [
        ["entry", "list"],
        ["join-token", "create"],
        ["svid", "x509"],
        ["task", "list"],
        ["server", "health"],
        ["agent", "health"],
    ],
)
def test_nobody_there_is_75(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*arguments, "--socket", "/nonexistent/api.sock", "-o", "json"]) == 75
    error = json.loads(capsys.readouterr().err)["error"]
    assert error["code"] == "no_socket"
    assert "broker dev up" in error["hint"]


def test_a_missing_settings_file_is_78(capsys: pytest.CaptureFixture[str]) -> None:
    for noun in ("server", "agent"):
        assert main([noun, "run", "--config", "/nonexistent.toml"]) == 78
    assert "--config" in capsys.readouterr().err


def test_a_reader_that_leaves_is_no_trace() -> None:
    ended = subprocess.run(
        ["/bin/sh", "-c", f"{sys.executable} -m broker.cli.main --help | head -c 1"],
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    assert "Traceback" not in ended.stderr


def test_svid_jwt_imports_only_what_a_credential_helper_needs() -> None:
    code = (
        "import sys, broker.cli.main as m\n"
        "m.main(['svid', 'jwt', '--audience', 'a', '--socket', '/nonexistent', '-q'])\n"
        "bad = ('cryptography', 'broker.spiffe', 'broker.tasks', 'broker.sdk', 'pydantic', 'structlog')\n"
        "print([n for n in bad if n in sys.modules], file=sys.stderr)"
    )
    assert run(code=code).stderr.splitlines()[-1] == "[]"


def test_the_security_header_is_the_sdk_s() -> None:
    assert connections.SECURITY_HEADER == endpoint.SECURITY_HEADER
