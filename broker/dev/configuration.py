"""The settings files of an estate, as its operator would write them. Knows the names of settings, not what they do."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from broker.dev.issuer import AUDIENCE, LOOPBACK
from broker.dev.layout import Layout

TRUST_DOMAIN = "dev.test"
NODE_ALIAS = f"spiffe://{TRUST_DOMAIN}/node/dev"
"""The node's extra identity, the parent of entries: it stays the same when the agent joins anew."""

DEFAULT_AUDIENCES = ("https://tickets.dev.test",)
HEADER = "# Written by broker dev, and written again by the next `broker dev up`. Loopback only; not for production.\n"


@dataclass(frozen=True, slots=True)
class Plan:
    """What an estate is to be: the services that tokens are for, and how it treats those who come too early."""

    audiences: Sequence[str] = field(default=DEFAULT_AUDIENCES)
    first_identity_wait: str = "2s"
    workload_attestors: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Beside ``unix``: each one's settings."""
    server: Mapping[str, str] = field(default_factory=dict)
    """Further settings of the server, and (``tasks``) of its tasks."""
    tasks: Mapping[str, str] = field(default_factory=dict)
    delegation_clients: Sequence[str] = ()
    """Whose user tokens make standing delegations: none, since here users' own application and agents get the same ones."""
    approval_clients: Sequence[str] = ()
    """Whose user tokens decide approvals: none, for the same reason."""


@dataclass(frozen=True, slots=True)
class Ports:
    """The TCP ports on loopback."""

    server: int
    issuer: int

    @property
    def server_url(self) -> str:
        """The server, as it names itself in tokens."""
        return f"https://localhost:{self.server}"

    @property
    def issuer_url(self) -> str:
        """The development issuer."""
        return f"https://{LOOPBACK}:{self.issuer}"


def server_toml(layout: Layout, ports: Ports, plan: Plan) -> str:
    """Write the server's settings."""
    lines = [
        HEADER,
        "[server]",
        f"trust_domain = {_text(TRUST_DOMAIN)}",
        f"issuer = {_text(ports.server_url)}",
        f"bind_address = {_text(LOOPBACK)}",
        f"bind_port = {ports.server}",
        f"data_dir = {_text(layout.data('server'))}",
        f"runtime_dir = {_text(layout.runtime / 'server')}",
        'log_format = "json"',
        *_settings(plan.server),
        "",
        "[server.operations]",
        "enabled = false",
        "",
        "[server.ratelimit]",
        "attestation = false  # all nodes of this estate have one address",
        "",
        "[server.tasks]",
        'supervision = "attached"',
        "allow_unsupervised = true",
        *_settings(plan.tasks),
        "",
        "[[server.subjects]]",
        f"issuer = {_text(ports.issuer_url)}",
        f"audiences = [{_text(AUDIENCE)}]",
        f"ca_path = {_text(layout.issuer / 'ca.pem')}",
        f"delegation_clients = {json.dumps([*plan.delegation_clients])}",
        f"approval_clients = {json.dumps([*plan.approval_clients])}",
    ]
    for audience in plan.audiences:
        lines += ["", "[[server.audiences]]", f"resource = {_text(audience)}", 'risk = "high"']
    return "\n".join(lines) + "\n"


def agent_toml(layout: Layout, ports: Ports, plan: Plan) -> str:
    """Write the agent's settings."""
    lines = [
        HEADER,
        "[agent]",
        f"trust_domain = {_text(TRUST_DOMAIN)}",
        f"server_address = {_text(LOOPBACK)}",
        f"server_port = {ports.server}",
        f"data_dir = {_text(layout.data('agent'))}",
        f"runtime_dir = {_text(layout.runtime / 'agent')}",
        f"trust_bundle_path = {_text(layout.bundle)}",
        f"join_token_file = {_text(layout.join_token)}",
        f"first_identity_wait = {_text(plan.first_identity_wait)}",
        'log_format = "json"',
        "",
        "[agent.attestors.workload.unix]",
        "discover_workload_path = true",
        "",
        "[agent.attestors.workload.launch]",
        f"directory = {_text(layout.runtime / 'agent' / 'private' / 'launches')}",
    ]
    for name, table in plan.workload_attestors.items():
        lines += ["", f"[agent.attestors.workload.{name}]"]
        lines += _settings(table)
    return "\n".join(lines) + "\n"


def _settings(table: Mapping[str, str]) -> list[str]:
    return [f"{setting} = {_text(value)}" for setting, value in table.items()]


def _text(value: object) -> str:
    return json.dumps(str(value))  # a JSON string is a TOML basic string
