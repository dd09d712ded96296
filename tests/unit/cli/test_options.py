"""SPIRE's spellings mean what ours mean; the options that stand everywhere may stand anywhere."""

import json

import click
import pytest
from click.testing import CliRunner

from broker.cli.options import (
    DURATION,
    LIFETIME,
    SELECTOR,
    SPIFFE_ID,
    Settings,
    Verb,
    noun,
    option,
    settings,
    socket_path,
)
from broker.cli.output import Format
from broker.errors import Invalid

THING = noun("thing", "A thing.")


@THING.command("make")
@option("--spiffe-id", spire=["spiffeID"], type=SPIFFE_ID)
@option("--selector", spire=["selector"], type=SELECTOR, multiple=True)
@option("--ttl", spire=["ttl"], type=DURATION, default=7)
@option("--life", type=LIFETIME, default=0)
@option("--admin", spire=["admin"], is_flag=True)
def make(**given: object) -> None:
    here = settings()
    click.echo(
        json.dumps(
            {**given, "output": here.output, "quiet": here.quiet, "socket": here.socket, "timeout": here.timeout}
        )
    )


def run(*arguments: str) -> dict[str, object]:
    result = CliRunner().invoke(THING, arguments, obj=Settings(), standalone_mode=False)
    if result.exception is not None:
        raise result.exception
    return json.loads(result.stdout)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--spiffe-id", "spiffe://a.test/b", "--selector", "x:1", "--selector", "x:2", "--ttl", "1h", "--admin"],
        ["-spiffeID", "spiffe://a.test/b", "-selector", "x:1", "-selector", "x:2", "-ttl", "3600", "-admin"],
        ["--spiffeID=spiffe://a.test/b", "-selector=x:1", "--selector=x:2", "-ttl=60m", "--admin"],
    ],
)
def test_spire_s_spellings(arguments: list[str]) -> None:
    given = run("make", *arguments)
    assert given["spiffe_id"] == "spiffe://a.test/b"
    assert given["selector"] == ["x:1", "x:2"]
    assert (given["ttl"], given["admin"]) == (3600, True)


def test_help_shows_only_ours() -> None:
    result = CliRunner().invoke(THING, ["make", "--help"], obj=Settings())
    assert "--spiffe-id" in result.stdout
    assert "spiffeID" not in result.stdout
    assert "Everywhere" in result.stdout


@pytest.mark.parametrize(
    "arguments",
    [
        ["-o", "json", "-q", "--socket", "/s", "--timeout", "2m", "make"],
        ["make", "-o", "json", "-q", "-socketPath", "/s", "--timeout", "120"],
        ["-q", "make", "-ojson", "--socketPath=/s", "--timeout=120s"],
        ["make", "-q", "-output", "json", "-socketPath", "/s", "-timeout", "120s"],
    ],
)
def test_everywhere(arguments: list[str]) -> None:
    given = run(*arguments)
    assert (given["output"], given["quiet"], given["socket"], given["timeout"]) == (Format.JSON, True, "/s", 120)


@pytest.mark.parametrize(
    ("text", "seconds"), [("600", 600), ("10m", 600), ("90s", 90), ("1h30m", 5400), ("2d", 172800), ("1d1h1m1s", 90061)]
)
def test_durations(text: str, seconds: int) -> None:
    assert run("make", "--ttl", text)["ttl"] == seconds


@pytest.mark.parametrize("text", ["", "x", "-1", "1w", "1m1h", "9999d", "1.5h", "\u0661s"])
def test_no_durations(text: str) -> None:
    with pytest.raises(click.UsageError):
        run("make", "--ttl", text)


def test_no_lifetime_is_not_the_default_one() -> None:
    assert (run("make")["life"], run("make", "--life", "1s")["life"]) == (0, 1)
    for text in ("0", "0s", "0h0m"):
        with pytest.raises(click.UsageError):
            run("make", "--life", text)


@pytest.mark.parametrize(("name", "text"), [("--spiffe-id", "https://a"), ("--selector", "no-colon")])
def test_our_parsers_judge_the_values(name: str, text: str) -> None:
    with pytest.raises(click.UsageError):
        run("make", name, text)


@pytest.mark.parametrize("text", ["unix:///a/b", "unix:/a/b", "/a/b"])
def test_socket_path(text: str) -> None:
    assert socket_path(text) == "/a/b"


@pytest.mark.parametrize("text", ["tcp://1.2.3.4:5", "unix://host/path", "a/b", ""])
def test_no_socket_path(text: str) -> None:
    with pytest.raises(Invalid):
        socket_path(text)


def test_where_the_sockets_are(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SPIFFE_ENDPOINT_SOCKET", "BROKER_SERVER_SOCKET", "BROKER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    assert Settings().server_socket() == "/run/broker/server/private/api.sock"
    assert Settings().agent_socket() == "/run/broker/agent/public/api.sock"
    monkeypatch.setenv("SPIFFE_ENDPOINT_SOCKET", "unix:///a")
    monkeypatch.setenv("BROKER_ADDR", "h:1")
    assert Settings().agent_socket() == "/a"
    assert Settings().server_address() == "h:1"
    monkeypatch.setenv("BROKER_SERVER_SOCKET", "unix:///s")
    assert Settings().server_socket() == "/s"
    assert Settings().server_address() is None
    assert Settings(addr="other:2").server_address() == "other:2"
    assert Settings(socket="/mine").server_socket() == "/mine"


class Input:
    def __init__(self, *, terminal: bool) -> None:
        self._terminal = terminal

    def isatty(self) -> bool:
        return self._terminal


def test_who_may_not_ask_refuses() -> None:
    with pytest.raises(Invalid) as caught:
        Settings(no_input=True).confirm("Really?", Input(terminal=True))  # type: ignore[arg-type]
    assert caught.value.reason == "confirmation_required"


def test_yes_and_scripts_are_not_asked() -> None:
    Settings(yes=True, no_input=True).confirm("Really?", Input(terminal=True))  # type: ignore[arg-type]
    Settings().confirm("Really?", Input(terminal=False))  # type: ignore[arg-type]


def test_a_person_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(click, "confirm", lambda *_, **__: False)
    with pytest.raises(Invalid, match="nothing was done"):
        Settings().confirm("Really?", Input(terminal=True))  # type: ignore[arg-type]


def test_verbs_are_verbs() -> None:
    assert isinstance(make, Verb)
