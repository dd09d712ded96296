"""What both programs' settings have in common: file below, environment above, every name known, no value shown."""

from datetime import timedelta
from pathlib import Path

import pytest
from pydantic import Field, SecretStr, TypeAdapter, ValidationError

from broker.errors import Misconfigured
from broker.settings import (
    MAX_FILE,
    AttestorTable,
    Duration,
    ProgramSettings,
    SpiffeIdText,
    Table,
    TrustDomainName,
    duration_text,
    parse_duration,
    read,
)
from broker.spiffe import SpiffeId, TrustDomain


class Below(Table):
    depth: int = Field(default=1, ge=1)
    free: dict[str, dict[str, object]] = Field(default={"a": {}})


class Listed(Table):
    resource: str


class Agent(ProgramSettings):
    trust_domain: TrustDomainName = TrustDomain("example.org")
    admin_ids: tuple[SpiffeIdText, ...] = ()
    wait: Duration = timedelta(seconds=2)
    token: SecretStr | None = None
    below: Below = Below()
    listed: tuple[Listed, ...] = ()


def load(tmp_path: Path, text: str = "", **environ: str) -> Agent:
    path = tmp_path / "settings.toml"
    path.write_text(text)
    return read(Agent, "agent", path, environ)


def test_without_anything_the_defaults_hold(tmp_path) -> None:
    assert load(tmp_path) == load(tmp_path, "[agent]\n[server]\nanything = 1") == Agent()


def test_the_environment_lies_over_the_file_table_by_table(tmp_path) -> None:
    settings = load(
        tmp_path,
        '[agent]\ntrust_domain = "a.example"\nwait = "1s"\n[agent.below]\ndepth = 2\n[agent.below.free.x]\ny = 1',
        BROKER_AGENT__TRUST_DOMAIN="b.example",
        BROKER_AGENT__BELOW__FREE__X__Z="2",
        broker_agent__wait="500ms",
        BROKER_AGENT__ADMIN_IDS='["spiffe://b.example/x"]',
        BROKER_AGENT__LISTED='[{"resource": "r"}]',
        BROKER_AGENT_SOCKET="/not/a/setting",
        BROKER_SERVER__TRUST_DOMAIN="c.example",
    )
    assert (str(settings.trust_domain), settings.wait) == ("b.example", timedelta(seconds=0.5))
    assert settings.below == Below(depth=2, free={"x": {"y": 1, "z": "2"}})
    assert settings.admin_ids == (SpiffeId("spiffe://b.example/x"),)
    assert settings.listed == (Listed(resource="r"),)


def test_nothing_is_read_behind_its_back(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("BROKER_AGENT__WAIT", "9s")
    assert load(tmp_path).wait == Agent().wait == timedelta(seconds=2)


@pytest.mark.parametrize(
    ("text", "environ", "says", "hint"),
    [
        ("[agent]\ntrust_domian = 'x'", {}, "agent.trust_domian: unknown setting", "did you mean trust_domain?"),
        ("[agent.below]\ndept = 1", {}, "agent.below.dept: unknown setting", "did you mean depth?"),
        ("[[agent.listed]]\nresource = 'x'\nresources = 1", {}, "agent.listed.0.resources", "did you mean resource?"),
        ("[agent]\nzzz = 1", {}, "agent.zzz: unknown setting", "broker config schema"),
        ("[agent.below]\ndepth = 0", {}, "agent.below.depth:", "broker config schema"),
        ("wait = 1", {}, "unknown table or setting 'wait'", "[agent]"),
        ("agent = 1", {}, "agent is not a table", "[agent]"),
        ("[agent", {}, "not TOML", "broker config schema"),
        ("", {"BROKER_AGENT__WAITS": "1s"}, "BROKER_AGENT__WAITS", "did you mean wait?"),
        ("", {"BROKER_AGENT__BELOW__DEPTHS": "1"}, "agent.below.depths", "did you mean depth?"),
        ("", {"BROKER_AGENT__LISTED": "hunter2, no JSON"}, "listed", "JSON"),
        ("[agent]\ntoken = ['hunter2']", {}, "agent.token:", "broker config schema"),
        ("[agent]\nwait = 'hunter2'", {}, "agent.wait:", "broker config schema"),
        ("[agent]\ntrust_domain = 'Hunter2'", {}, "agent.trust_domain:", "broker config schema"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_with_a_remedy_and_never_shown(tmp_path, text, environ, says, hint) -> None:
    with pytest.raises(Misconfigured) as refused:
        load(tmp_path, text, **environ)
    assert says in refused.value.message and hint in refused.value.hint
    assert "unter2" not in f"{refused.value} {refused.value.hint} {refused.value.__cause__!r}"


def test_a_file_that_cannot_be_read(tmp_path) -> None:
    with pytest.raises(Misconfigured, match="cannot be read"):
        read(Agent, "agent", tmp_path / "none.toml", {})
    with pytest.raises(Misconfigured, match="cannot be read"):
        read(Agent, "agent", tmp_path, {})
    (tmp_path / "bytes").write_bytes(b"\xff")
    with pytest.raises(Misconfigured, match="not TOML"):
        read(Agent, "agent", tmp_path / "bytes", {})
    with pytest.raises(Misconfigured, match="longer than"):
        load(tmp_path, "#" * (MAX_FILE + 1))


def test_unnamed_files_need_not_exist() -> None:
    assert read(Agent, "no-such-program", None, {}) == Agent()


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("500ms", 0.5),
        ("90s", 90),
        ("10m", 600),
        ("1h30m", 5400),
        ("2d", 172800),
        ("1m5ms", 60.005),
        (45, 45),
        ("0s", 0),
    ],
)
def test_durations(text, seconds) -> None:
    duration = parse_duration(text)
    assert duration.total_seconds() == seconds
    assert parse_duration(duration_text(duration)) == parse_duration(duration) == duration


@pytest.mark.parametrize(
    "text",
    ["", "2", "5 s", "-5s", "1.5s", "s", "1s1h", "5s\n", True, 1.5, None, "\u0662s", "9000h9999999m", "999999999d"],
)
def test_what_is_no_duration(text) -> None:
    with pytest.raises(ValueError, match="duration"):
        parse_duration(text)


def test_names_are_parsed_once() -> None:
    for kind, parse, text in (
        (TrustDomainName, TrustDomain, "a.example"),
        (SpiffeIdText, SpiffeId, "spiffe://a.example/x"),
    ):
        adapter = TypeAdapter(kind)
        assert adapter.validate_python(text) == adapter.validate_python(parse(text)) == parse(text)
        assert adapter.dump_python(parse(text)) == text
        with pytest.raises(ValidationError):
            adapter.validate_python(7)


def test_the_tables_of_attestors_are_closed() -> None:
    assert AttestorTable().trusted_distributions == ("identity-broker",)
    with pytest.raises(ValidationError):
        AttestorTable(trusted_distributions=())
