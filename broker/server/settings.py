"""What an operator may set: a TOML file (table ``[server]``), over it the environment (``BROKER_SERVER__…``).

Every setting has a description and a default that works. An unknown name is refused: a misspelt restriction must not
pass for a set one. Knows nothing of what the settings do; an attestor's own table is read by that attestor.
"""

from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, Final, Literal
from urllib.parse import quote

from pydantic import Field, SecretStr, model_validator

from broker.server.setting_values import Duration, IssuerUrl, StoreUrl
from broker.server.task_settings import (
    AudienceSettings,
    DetailTypeSettings,
    OutwardSettings,
    PolicySettings,
    SsfSettings,
    SubjectSettings,
    TaskSettings,
    TransactionSettings,
)
from broker.settings import AttestorTable, ProgramSettings, SpiffeIdText, Table, TrustDomainName, read
from broker.spiffe import TrustDomain
from broker.spiffe.federation import Profile

ANY_AUDIENCE: Final = "*"
"""In ``default_allowed_audiences``: whatever the workload asks for, as in SPIRE."""


class StoreSettings(Table):
    """Where everything that must survive is kept."""

    url: StoreUrl = Field(
        default=SecretStr(""),
        description="sqlite:///absolute/path/of/the.db or postgresql://user@host/database; empty: broker.db in data_dir",
    )


class KeySettings(Table):
    """Where private keys live."""

    manager: Literal["memory", "disk"] = Field(
        default="memory",
        description="memory: keys end with the process, a restart makes new authorities;"
        " disk: files that only the server's user can read, in keys in data_dir",
    )


class DiskUpstreamSettings(Table):
    """A signing certificate and its key in files."""

    cert_file_path: Path = Field(description="PEM: the certificate that signs our authorities, then those above it")
    key_file_path: Path = Field(description="PEM, PKCS#8, readable by the server's user only: its key")
    bundle_file_path: Path | None = Field(
        default=None,
        description="PEM: the roots that workloads trust; unset: cert_file_path ends with its root."
        " Take a revoked root out of it",
    )


class ServerUpstreamSettings(Table):
    """Another SPIFFE server of the same trust domain, such as SPIRE's: this one is nested below it."""

    server_address: str = Field(min_length=1, description="host of the upstream server")
    server_port: int = Field(default=8443, ge=1, le=65535, description="its port; SPIRE's is 8081")
    workload_api_socket: Path = Field(
        description="the Workload API of an agent of the upstream server, where this server's entry says downstream"
    )


class UpstreamSettings(Table):
    """Who stands above this server's X.509 authorities; nobody, unless one table is given."""

    disk: DiskUpstreamSettings | None = Field(default=None, description="a certificate and its key in files")
    spire: ServerUpstreamSettings | None = Field(default=None, description="another server, which this one is below")

    @model_validator(mode="after")
    def _one_at_most(self) -> "UpstreamSettings":
        if self.disk is not None and self.spire is not None:
            raise ValueError("there is one upstream authority at most: disk or spire")
        return self


class OperationsSettings(Table):
    """The port for metrics and health."""

    bind_address: str = Field(default="127.0.0.1", description="address of /metrics, /live and /ready")
    bind_port: int = Field(default=9901, ge=0, le=65535, description="its port; 0: the kernel chooses")
    enabled: bool = Field(default=True, description="whether that port is opened at all")


class RateLimitSettings(Table):
    """How often one address may ask. SPIRE's limits; a call above them waits its turn."""

    attestation: bool = Field(
        default=True, description="one node attestation a second for each address; off behind a load balancer"
    )
    signing: bool = Field(default=True, description="500 signatures a second for each address, of each kind")


class AttestorSettings(AttestorTable):
    """Which proofs of a node this server takes."""

    node: dict[str, dict[str, Any]] = Field(
        default={"join_token": {}},
        min_length=1,
        description="one table per node attestor, with that attestor's settings; no other is taken",
    )


class BundleEndpointSettings(Table):
    """The port where other trust domains fetch our bundle. Certificates by ACME are not built: use files."""

    address: str = Field(default="0.0.0.0", description="address of the bundle endpoint")  # noqa: S104  # others must reach it
    port: int = Field(default=8444, ge=0, le=65535, description="its port; 0: the kernel chooses")
    refresh_hint: Duration = Field(default=timedelta(minutes=5), description="how often others should look")
    profile: Profile = Field(
        default=Profile.HTTPS_SPIFFE,
        description="https_spiffe: shows the server's SVID; https_web: the files' certificate",
    )
    cert_file_path: Path | None = Field(default=None, description="https_web: PEM certificate chain, leaf first")
    key_file_path: Path | None = Field(default=None, description="https_web: its PEM private key")
    file_sync_interval: Duration = Field(
        default=timedelta(minutes=1), description="https_web: how often the files are looked at for a change"
    )

    @model_validator(mode="after")
    def _has_files(self) -> "BundleEndpointSettings":
        has_files = self.cert_file_path is not None and self.key_file_path is not None
        if self.profile is Profile.HTTPS_WEB and not has_files:
            raise ValueError("https_web needs cert_file_path and key_file_path; certificates by ACME are not built")
        return self


class FederatesWithSettings(Table):
    """One other trust domain whose bundle is fetched. Stands before a relationship made by command."""

    trust_domain: TrustDomainName = Field(description="its name")
    bundle_endpoint_url: str = Field(description="the https URL of its bundle endpoint")
    bundle_endpoint_profile: Profile = Field(description="https_web or https_spiffe; never guessed")
    endpoint_spiffe_id: SpiffeIdText | None = Field(default=None, description="https_spiffe: whom the endpoint must be")
    trust_domain_bundle_path: Path | None = Field(
        default=None, description="its bundle to begin with, SPIFFE or PEM; used until one is stored"
    )


class FederationSettings(Table):
    """Other trust domains."""

    bundle_endpoint: BundleEndpointSettings | None = Field(
        default=None, description="where others fetch our bundle; without this table nothing is opened"
    )
    federates_with: tuple[FederatesWithSettings, ...] = Field(default=(), description="whose bundles we fetch")
    web_ca_path: Path | None = Field(
        default=None, description="PEM roots for https_web endpoints; unset: the machine's own"
    )


class ServerSettings(ProgramSettings):
    """The whole of ``[server]``."""

    trust_domain: TrustDomainName = Field(
        default=TrustDomain("example.org"), description="the trust domain whose identities this server issues"
    )
    roles: frozenset[Literal["identity", "tasks"]] = Field(
        default=frozenset({"identity", "tasks"}), min_length=1, description="which halves this replica runs"
    )
    issuer: IssuerUrl = Field(
        default="https://localhost:8443", description="the https URL under which this server issues tokens"
    )
    bind_address: str = Field(default="0.0.0.0", description="address of the TLS port")  # noqa: S104  # nodes must reach it
    bind_port: int = Field(default=8443, ge=0, le=65535, description="the TLS port; 0: the kernel chooses")
    data_dir: Path = Field(default=Path("/var/lib/broker/server"), description="what must survive a reboot")
    runtime_dir: Path = Field(default=Path("/run/broker/server"), description="what must not; best in memory")
    socket_path: Path = Field(
        default_factory=lambda set_before: set_before["runtime_dir"] / "private" / "api.sock",
        description="the admin socket, for root and the server's own user",
    )
    ca_ttl: Duration = Field(default=timedelta(hours=24), description="life of an authority, X.509 and JWT alike")
    default_x509_svid_ttl: Duration = Field(default=timedelta(hours=1), description="for entries that set none")
    default_jwt_svid_ttl: Duration = Field(default=timedelta(minutes=5), description="for entries that set none")
    agent_ttl: Duration = Field(default=timedelta(hours=1), description="life of an agent's own SVID")
    default_allowed_audiences: tuple[str, ...] = Field(
        default=(ANY_AUDIENCE,), description="JWT-SVID audiences for entries that name none; * is any"
    )
    admin_ids: tuple[SpiffeIdText, ...] = Field(default=(), description="SPIFFE IDs that may use the admin services")
    log_level: Literal["debug", "info", "warning", "error"] = Field(default="info", description="what is logged")
    log_format: Literal["text", "json"] = Field(default="text", description="how it is logged")
    allow_failpoints: bool = Field(default=False, description="for fault tests only: honour BROKER_FAILPOINTS")
    store: StoreSettings = Field(default=StoreSettings(), description="the store")
    keys: KeySettings = Field(default=KeySettings(), description="the key manager")
    upstream: UpstreamSettings = Field(default=UpstreamSettings(), description="who stands above our authorities")
    ratelimit: RateLimitSettings = Field(default=RateLimitSettings(), description="how often one address may ask")
    prune_attested_nodes_expired_for: Duration | None = Field(
        default=None, description="forget nodes whose SVID has been expired for so long; unset: never. Banned ones stay"
    )
    prune_attested_nodes_batch_size: int = Field(
        default=1000, ge=1, le=10_000, description="how many of them at most at a time"
    )
    prune_non_reattestable_nodes: bool = Field(
        default=False, description="also those that can attest only once, and will need a new proof to come back"
    )
    operations: OperationsSettings = Field(default=OperationsSettings(), description="metrics and health")
    attestors: AttestorSettings = Field(default=AttestorSettings(), description="node attestors")
    federation: FederationSettings = Field(default=FederationSettings(), description="other trust domains")
    subjects: tuple[SubjectSettings, ...] = Field(
        default=(), description="whose user tokens are accepted; none: no task starts"
    )
    ssf: SsfSettings = Field(default=SsfSettings(), description="security events about users")
    tasks: TaskSettings = Field(default=TaskSettings(), description="tasks and their tokens")
    policy: PolicySettings = Field(default=PolicySettings(), description="the rules that narrow all of it")
    audiences: tuple[AudienceSettings, ...] = Field(
        default=(), description="services that tokens may be for; none: no token"
    )
    authorization_details: tuple[DetailTypeSettings, ...] = Field(
        default=(), description="which types of authorization details may be asked for; none given: all that are known"
    )
    transactions: TransactionSettings = Field(
        default=TransactionSettings(), description="transaction tokens inside the trust domain"
    )
    outward: tuple[OutwardSettings, ...] = Field(
        default=(), description="other authorization servers that take grants of ours; none: no grant leaves"
    )

    @property
    def database_url(self) -> SecretStr:
        """The store's URL, which may hold a password."""
        if self.store.url.get_secret_value():
            return self.store.url
        return SecretStr(f"sqlite://{quote(str(self.data_dir / 'broker.db'))}")

    @property
    def private_dir(self) -> Path:
        """The directory in the runtime directory that only the server's user may enter."""
        return self.runtime_dir / "private"


def load(path: Path | None, environ: Mapping[str, str]) -> ServerSettings:
    """Read the file and the environment, as :func:`broker.settings.read` does."""
    return read(ServerSettings, "server", path, environ)
