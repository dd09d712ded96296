"""The agent's settings: file below, environment above, nothing unknown."""

from datetime import timedelta
from pathlib import Path

import pytest

from broker.agent.settings import AgentSettings, AttestorSettings, load
from broker.errors import Misconfigured


def read(tmp_path, text: str = "", **environ: str) -> AgentSettings:
    path = tmp_path / "agent.toml"
    path.write_text(text)
    return load(path, environ)


def test_defaults_are_the_public_surface(tmp_path) -> None:
    settings = read(tmp_path)
    assert settings.socket_path == Path("/run/broker/agent/public/api.sock")
    assert settings.private_dir == Path("/run/broker/agent/private")
    assert settings.server == "127.0.0.1:8443"
    assert settings.first_identity_wait == timedelta(seconds=2)
    assert settings.attestors.workload == {"unix": {}}
    assert not settings.insecure_bootstrap


def test_file_then_environment(tmp_path) -> None:
    text = '[agent]\ntrust_domain = "a.example"\nserver_port = 1\n[agent.attestors.workload.unix]\ndiscover_workload_path = true\n'
    settings = read(
        tmp_path,
        text,
        BROKER_AGENT__SERVER_PORT="9443",
        BROKER_AGENT__ATTESTORS__WORKLOAD__UNIX__WORKLOAD_SIZE_LIMIT="5",
        OTHER="x",
    )
    assert (str(settings.trust_domain), settings.server_port) == ("a.example", 9443)
    assert settings.attestors.workload["unix"] == {"discover_workload_path": True, "workload_size_limit": "5"}


def test_the_socket_follows_the_runtime_directory(tmp_path) -> None:
    assert read(tmp_path, '[agent]\nruntime_dir = "/x"').socket_path == Path("/x/public/api.sock")


def test_addresses() -> None:
    assert AgentSettings(server_address="::1").server == "[::1]:8443"
    assert AgentSettings(server_address="[::1]").server == "[::1]:8443"
    assert AgentSettings(server_address="broker").server == "broker:8443"


@pytest.mark.parametrize(
    ("text", "environ", "says"),
    [
        ("[agent]\ntrust_domian = 'x'", {}, "agent.trust_domian: unknown setting"),
        ("[agent.attestors]\nworkloads = {}", {}, "agent.attestors.workloads: unknown setting"),
        ("trust_domain = 'x'", {}, "unknown table or setting 'trust_domain'"),
        ("agent = 1", {}, "not a table"),
        ("[agent", {}, "not TOML"),
        ("", {"BROKER_AGENT__SERVER_PORTS": "1"}, "BROKER_AGENT__SERVER_PORTS"),
        ("[agent]\ntrust_domain = 'EXAMPLE'", {}, "agent.trust_domain"),
        ("[agent]\nserver_port = 70000", {}, "agent.server_port"),
        ("[agent]\nfirst_identity_wait = 'soon'", {}, "agent.first_identity_wait"),
        ("[agent]\njoin_token = 'a'\njoin_token_file = '/x'", {}, "not both"),
        ("[agent]\ninsecure_bootstrap = true\ntrust_bundle_path = '/x'", {}, "not both"),
        ("[agent.attestors]\nworkload = {}", {}, "agent.attestors.workload"),
    ],
)
def test_refused_by_name(tmp_path, text, environ, says) -> None:
    with pytest.raises(Misconfigured) as refused:
        read(tmp_path, text, **environ)
    assert says in str(refused.value)


def test_a_misspelt_name_is_corrected(tmp_path) -> None:
    with pytest.raises(Misconfigured) as refused:
        read(tmp_path, "[agent]\ntrust_bundle_pth = 'x'")
    assert "trust_bundle_path" in refused.value.hint


def test_a_token_is_in_no_message(tmp_path) -> None:
    with pytest.raises(Misconfigured) as refused:
        read(tmp_path, "[agent]\njoin_token = 'hunter2'\njoin_token_file = '/x'")
    assert "hunter2" not in str(refused.value)
    assert "hunter2" not in repr(read(tmp_path, "[agent]\njoin_token = 'hunter2'"))


def test_a_named_file_must_exist(tmp_path) -> None:
    with pytest.raises(Misconfigured, match="cannot be read"):
        load(tmp_path / "none.toml", {})


@pytest.mark.parametrize("model", [AgentSettings, AttestorSettings])
def test_every_setting_is_described_and_has_a_default(model) -> None:
    for name, field in model.model_fields.items():
        assert field.description, name
        assert not field.is_required(), name
