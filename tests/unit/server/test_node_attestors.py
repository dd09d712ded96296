"""Where an operator names the node attestors, for both sides."""

import pytest

from broker.agent import settings as agent_settings
from broker.errors import Misconfigured
from broker.server import settings as server_settings


@pytest.fixture
def read(tmp_path):
    def load(module, text: str = "", **environ: str):
        path = tmp_path / "broker.toml"
        path.write_text(text)
        return module.load(path, environ)

    return load


def test_a_server_takes_join_tokens_until_told_otherwise(read) -> None:
    assert read(server_settings).attestors.node == {"join_token": {}}
    told = read(server_settings, "[server.attestors.node.x509pop]\nca_bundle_path = '/ca.pem'")
    assert told.attestors.node == {"x509pop": {"ca_bundle_path": "/ca.pem"}}


def test_the_environment_adds_to_a_servers_table(read, monkeypatch) -> None:
    name = "BROKER_SERVER__ATTESTORS__NODE__X509POP__MODE"
    monkeypatch.setenv(name, "spiffe")
    told = read(server_settings, "[server.attestors.node.join_token]", **{name: "spiffe"})
    assert told.attestors.node == {"join_token": {}, "x509pop": {"mode": "spiffe"}}


def test_an_agent_has_one_node_attestor(read) -> None:
    assert read(agent_settings).attestors.node == {"join_token": {}}
    table = "[agent.attestors.node.x509pop]\nprivate_key_path = '/k'"
    told = read(agent_settings, table, BROKER_AGENT__ATTESTORS__NODE__X509POP__CERTIFICATE_PATH="/c")
    assert told.attestors.node == {"x509pop": {"private_key_path": "/k", "certificate_path": "/c"}}
    assert told.attestors.workload == {"unix": {}}


@pytest.mark.parametrize(
    ("module", "text", "says"),
    [
        (server_settings, "[server.attestors]\nnode = {}", "server.attestors.node"),
        (server_settings, "[server.attestors]\nnode = 'x509pop'", "server.attestors.node"),
        (server_settings, "[server.attestors]\nnodes = {}", "server.attestors.nodes"),
        (agent_settings, "[agent.attestors]\nnode = {}", "agent.attestors.node"),
        (agent_settings, "[agent.attestors.node]\njoin_token = {}\nx509pop = {}", "agent.attestors.node"),
        (agent_settings, "[agent.attestors.node.join_token]\njoin_token = 'x'", "stand in"),
    ],
)
def test_refused_by_name(read, module, text, says) -> None:
    with pytest.raises(Misconfigured, match=says) as refused:
        read(module, text)
    assert "'x'" not in str(refused.value)
