"""What an operator may set for the agent: a TOML file (table ``[agent]``), over it the environment (``BROKER_AGENT__…``).

Every setting has a description and a default that works. An unknown name is refused: a misspelt restriction must not
pass for a set one. Knows nothing of what the settings do; an attestor's own table is read by that attestor.
"""

from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, SecretStr, model_validator

from broker.settings import AttestorTable, Duration, ProgramSettings, SpiffeIdText, Table, TrustDomainName, read
from broker.spiffe import TrustDomain


class AttestorSettings(AttestorTable):
    """Who describes nodes and processes."""

    node: dict[str, dict[str, Any]] = Field(
        default={"join_token": {}},
        min_length=1,
        max_length=1,
        description="how this node proves itself to the server: one table, with that attestor's settings",
    )
    workload: dict[str, dict[str, Any]] = Field(
        default={"unix": {}}, min_length=1, description="one table per workload attestor, with that attestor's settings"
    )


class SdsSettings(Table):
    """Envoy's secret discovery: the names by which it asks."""

    default_svid_name: str = Field(default="default", min_length=1, description="the first of a workload's SVIDs")
    default_bundle_name: str = Field(default="ROOTCA", min_length=1, description="the trust domain's own bundle")
    default_all_bundles_name: str = Field(default="ALL", min_length=1, description="all bundles of a workload at once")
    disable_spiffe_cert_validation: bool = Field(
        default=False, description="give authorities alone instead of Envoy's SPIFFE validator"
    )


class AgentSettings(ProgramSettings):
    """The whole of ``[agent]``."""

    trust_domain: TrustDomainName = Field(
        default=TrustDomain("example.org"), description="the trust domain that this node belongs to"
    )
    server_address: str = Field(default="127.0.0.1", min_length=1, description="host name or address of the server")
    server_port: int = Field(default=8443, ge=1, le=65535, description="the server's TLS port")
    data_dir: Path = Field(
        default=Path("/var/lib/broker/agent"), description="what must survive a reboot; the agent keeps no secret there"
    )
    runtime_dir: Path = Field(
        default=Path("/run/broker/agent"),
        description="sockets, and what a restart needs: the agent's key and SVID, its entries, spare SVIDs; best in memory",
    )
    at_rest_key_path: Path | None = Field(
        default=None,
        description="a file of 32 random bytes that encrypts what the agent keeps in runtime_dir; unset: a key of this boot,"
        " and the agent's own key in clear",
    )
    socket_path: Path = Field(
        default_factory=lambda set_before: set_before["runtime_dir"] / "public" / "api.sock",
        description="the workload socket, open to every local process",
    )
    admin_socket_path: Path = Field(
        default_factory=lambda set_before: set_before["runtime_dir"] / "private" / "admin.sock",
        description="the operator's socket, and the delegates'; delegates of other users need one outside private/",
    )
    authorized_delegates: tuple[SpiffeIdText, ...] = Field(
        default=(), description="SPIFFE IDs of local workloads that may fetch other workloads' identities"
    )
    trust_bundle_path: Path | None = Field(
        default=None, description="the server's authorities for the first contact: PEM, or a SPIFFE bundle in JSON"
    )
    insecure_bootstrap: bool = Field(
        default=False, description="trust whatever server answers the first time; for trials only"
    )
    rebootstrap_mode: Literal["never", "auto", "always"] = Field(
        default="never",
        description="when the server's authority is unknown, settle the first trust anew: never, where the node can prove"
        " itself again (auto), or always",
    )
    rebootstrap_delay: Duration = Field(
        default=timedelta(minutes=10), description="for how long the server must have been unknown before that"
    )
    join_token: SecretStr | None = Field(default=None, description="the one-time token for join_token attestation")
    join_token_file: Path | None = Field(default=None, description="a file that holds it, read at each attempt")
    first_identity_wait: Duration = Field(
        default=timedelta(seconds=2), description="how long a caller without an entry waits for one before it is denied"
    )
    attest_again_every: Duration = Field(
        default=timedelta(seconds=30),
        ge=timedelta(seconds=1),
        description="how often the attestors are asked again about a connected process: its labels may have changed",
    )
    attestors_bridged_for: Duration = Field(
        default=timedelta(minutes=5),
        description="for how long an attested process keeps its identities while an attestor gets no answer, such as"
        " from a runtime that restarts",
    )
    share_when_offline: bool = Field(
        default=True,
        description="while the server is away a new process may share its entry's last spare SVID, without task tokens",
    )
    max_offline: Duration | None = Field(
        default=None,
        description="for how long workloads are served without a word from the server; unset: until their SVIDs expire",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(default="info", description="what is logged")
    log_format: Literal["text", "json"] = Field(default="text", description="how it is logged")
    explain_selectors: tuple[str, ...] = Field(
        default=(),
        description="selectors whose values broker explain shows though they may hold secrets, by their beginning:"
        " docker:label:app, docker:env:REGION",
    )
    sds: SdsSettings = Field(default=SdsSettings(), description="Envoy's secret discovery")
    attestors: AttestorSettings = Field(default=AttestorSettings(), description="node and workload attestors")

    @model_validator(mode="after")
    def _one_token(self) -> "AgentSettings":
        if self.join_token is not None and self.join_token_file is not None:
            raise ValueError("set join_token or join_token_file, not both")
        if self.attestors.node.get("join_token"):
            raise ValueError("join_token and join_token_file stand in [agent] itself")
        if self.insecure_bootstrap and self.trust_bundle_path is not None:
            raise ValueError("set trust_bundle_path or insecure_bootstrap, not both")
        return self

    @property
    def private_dir(self) -> Path:
        """The directory in the runtime directory that only the agent's user may enter."""
        return self.runtime_dir / "private"

    @property
    def server(self) -> str:
        """``host:port`` of the server; an IPv6 address in brackets."""
        host = self.server_address
        return (
            f"[{host}]:{self.server_port}" if ":" in host and not host.startswith("[") else f"{host}:{self.server_port}"
        )


def load(path: Path | None, environ: Mapping[str, str]) -> AgentSettings:
    """Read the file and the environment, as :func:`broker.settings.read` does."""
    return read(AgentSettings, "agent", path, environ)
