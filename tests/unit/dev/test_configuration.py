"""What is written are settings that the programs accept."""

from pathlib import Path

from broker.agent.settings import load as load_agent
from broker.dev.configuration import Plan, Ports, agent_toml, server_toml
from broker.dev.layout import Layout
from broker.server.settings import load as load_server

LAYOUT = Layout(Path('/a "quoted" \\ place'), Path("/tmp/r"))
PORTS = Ports(server=8443, issuer=9443)


def test_the_server_accepts_it(tmp_path: Path) -> None:
    file = tmp_path / "server.toml"
    file.write_text(server_toml(LAYOUT, PORTS, Plan(audiences=("https://a.test", "https://b.test"))))
    settings = load_server(file, {})
    assert (settings.subjects[0].delegation_clients, settings.subjects[0].approval_clients) == ((), ())
    assert settings.bind_address == "127.0.0.1"
    assert settings.issuer == "https://localhost:8443"
    assert [one.resource for one in settings.audiences] == ["https://a.test", "https://b.test"]
    assert settings.subjects[0].issuer == "https://127.0.0.1:9443"
    assert settings.data_dir == LAYOUT.data("server")
    assert settings.socket_path == LAYOUT.server_socket


def test_whose_tokens_delegate_and_decide_is_the_plans(tmp_path: Path) -> None:
    file = tmp_path / "server.toml"
    file.write_text(server_toml(LAYOUT, PORTS, Plan(delegation_clients=["one"], approval_clients=["two"])))
    subject = load_server(file, {}).subjects[0]
    assert (subject.delegation_clients, subject.approval_clients) == (("one",), ("two",))


def test_the_agent_accepts_it(tmp_path: Path) -> None:
    file = tmp_path / "agent.toml"
    file.write_text(agent_toml(LAYOUT, PORTS, Plan(first_identity_wait="500ms")))
    settings = load_agent(file, {})
    assert not settings.insecure_bootstrap
    assert settings.trust_bundle_path == LAYOUT.bundle
    assert settings.first_identity_wait.total_seconds() == 0.5
    assert settings.socket_path == LAYOUT.agent_socket
