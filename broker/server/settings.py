"""What an operator may set: a TOML file (table ``[server]``), over it the environment (``BROKER_SERVER__…``).

Every setting has a description and a default that works. An unknown name is refused: a misspelt restriction must not
pass for a set one. Knows nothing of what the settings do; an attestor's own table is read by that attestor.
"""

import re
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Final, Literal
from urllib.parse import quote

from pydantic import AfterValidator, Field, SecretStr, model_validator

from broker.settings import AttestorTable, ProgramSettings, SpiffeIdText, Table, TrustDomainName, read
from broker.settings import Duration as AnyDuration
from broker.spiffe import TrustDomain
from broker.spiffe.federation import Profile

ANY_AUDIENCE: Final = "*"
"""In ``default_allowed_audiences``: whatever the workload asks for, as in SPIRE."""
MIN_TTL: Final = timedelta(seconds=1)

_STORE_URL: Final = re.compile(r"(?:sqlite:///[^\x00?#]+|postgres(?:ql)?://[^\x00]+)?")
_ISSUER: Final = re.compile(r"https://[A-Za-z0-9.\-]+(?::[0-9]{1,5})?(?:/[A-Za-z0-9._~\-]+)*")


def _lives(value: timedelta) -> timedelta:
    if value < MIN_TTL:
        raise ValueError("a duration is at least one second here")
    return value


def _issuer(value: str) -> str:
    if _ISSUER.fullmatch(value) is None:
        raise ValueError("not an https URL without query, fragment and final slash")
    return value


def _store_url(value: SecretStr) -> SecretStr:
    if _STORE_URL.fullmatch(value.get_secret_value()) is None:
        raise ValueError("write sqlite:///absolute/path.db or postgresql://user@host/database")
    return value


Duration = Annotated[AnyDuration, AfterValidator(_lives)]
IssuerUrl = Annotated[str, AfterValidator(_issuer)]


class StoreSettings(Table):
    """Where everything that must survive is kept."""

    url: Annotated[SecretStr, AfterValidator(_store_url)] = Field(
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


class SubjectSettings(Table):
    """One issuer whose user tokens are accepted."""

    issuer: str = Field(description="the issuer, exactly as in the tokens' iss")
    audiences: tuple[str, ...] = Field(min_length=1, description="a user token must be meant for one of these")
    ca_path: Path | None = Field(default=None, description="PEM roots for this issuer; unset: the machine's own")
    clients: tuple[str, ...] = Field(default=(), description="other clients whose tokens are taken (azp, client_id)")
    namespace: str = Field(default="", description="put before the user, to keep two issuers' users apart")
    required_claims: dict[str, str] = Field(default={}, description="claims that each user token must have so")
    session_lease: Duration | None = Field(
        default=None,
        description="how long a user's session counts after the newest token that was shown of it, where the issuer tells"
        " of no sign-out: beyond, its tasks are suspended until a newer one is; unset: until the tokens and tasks themselves"
        " are over",
    )
    delegation_clients: tuple[str, ...] = Field(
        default=(),
        description="clients (azp, or the only aud) whose user tokens may make standing delegations: the users' own"
        " application, never one whose tokens reach an agent; none: there are no standing delegations",
    )
    delegation_max_age: Duration = Field(
        default=timedelta(minutes=5), description="how long after the sign-in (auth_time) one may be made"
    )
    jwks_url: str = Field(
        default="",
        description="where its keys are; empty: as its configuration document says, which may name another host of the"
        " world, and none in a private network",
    )


class TransmitterSettings(Table):
    """One transmitter of security events (Shared Signals Framework 1.0)."""

    issuer: str = Field(description="the iss of its events, exactly")
    audiences: tuple[str, ...] = Field(min_length=1, description="an event must be meant for one of these")
    subject_issuer: str = Field(default="", description="whose users it speaks of, a subject issuer; empty: its own")
    ca_path: Path | None = Field(default=None, description="PEM roots for its addresses; unset: the machine's own")
    jwks_url: str = Field(default="", description="where its keys are; empty: as its configuration document says")
    poll_url: str = Field(
        default="",
        description="where its events are fetched (RFC 8936); empty: it pushes them to /ssf/events (RFC 8935)",
    )
    poll_every: Duration = Field(default=timedelta(seconds=5), description="how often they are fetched")
    token_file: Path | None = Field(
        default=None, description="a bearer token: what it must show when it pushes, or what is shown where we fetch"
    )


class SsfSettings(Table):
    """Security events about users."""

    streams: tuple[TransmitterSettings, ...] = Field(default=(), description="who is heard; none: nobody")


class WitIssuerSettings(Table):
    """One trust domain whose workload identity tokens (WIT, incubating) are taken at the token endpoint."""

    trust_domain: TrustDomainName = Field(description="its name")
    keys_path: Path = Field(description="JWK Set of the keys that sign its WITs")


class TaskSettings(Table):
    """Tasks and their tokens."""

    token_ttl: Duration = Field(default=timedelta(seconds=180), description="life of a task token, 10s to 300s")
    task_ttl: Duration = Field(default=timedelta(hours=1), description="life of a task whose request does not say")
    max_task_ttl: Duration = Field(default=timedelta(days=1), description="the longest life that a task may ask for")
    max_depth: int = Field(default=5, ge=1, le=16, description="most agents in one chain of tasks that start tasks")
    max_children: int = Field(
        default=100, ge=0, le=100_000, description="most tasks that one task may start over its life; 0: none"
    )
    max_resumes: int = Field(default=20, ge=0, description="how often a workload may resume one task by itself")
    max_resumes_per_minute: int = Field(
        default=3, ge=0, description="how often within a minute; beyond either it stays suspended for an operator"
    )
    supervision: Literal["attached", "lease", "none"] = Field(
        default="attached",
        description="of tasks whose request does not say. attached: ends with the process that started it; lease: lives by"
        " a heartbeat",
    )
    lease_ttl: Duration = Field(
        default=timedelta(seconds=30),
        description="a heartbeat that is missed for longer suspends the task: that of a lease, or of an attached process on"
        " its stream",
    )
    lapsed_ttl: Duration = Field(
        default=timedelta(minutes=10),
        description="how long a task that is suspended so waits to be resumed before it is revoked",
    )
    agent_lease_ttl: Duration = Field(
        default=timedelta(seconds=30),
        description="how long a node agent may be silent before the attached tasks of its workloads are stopped",
    )
    agent_lost: Literal["suspend", "end"] = Field(
        default="suspend",
        description="how they are stopped; end: they are revoked, and the workload sessions end with them",
    )
    allow_unsupervised: bool = Field(default=False, description="whether a caller may ask for supervision none")
    allow_bearer: bool = Field(
        default=False, description="whether a caller may ask for a token bound to nobody, where its audience takes one"
    )
    foreign_starters: tuple[str, ...] = Field(
        default=(),
        description="workloads of other trust domains that may start tasks: SPIFFE IDs, or all below one: …/*",
    )
    trusted_proxies: tuple[SpiffeIdText, ...] = Field(
        default=(), description="proxies that may forward their clients' certificates (x-forwarded-client-cert)"
    )
    wit_issuers: tuple[WitIssuerSettings, ...] = Field(
        default=(), description="trust domains whose workload identity tokens are taken (incubating); none: nobody's"
    )


class PolicySettings(Table):
    """The rules that narrow what tasks and tokens may be."""

    path: Path | None = Field(
        default=None,
        description="Cedar: the policy of all replicas, put in force at the start, the same file for each;"
        " unset: what broker policy push put in force, or the built-in one",
    )


class AudienceSettings(Table):
    """One service that task tokens may be for."""

    resource: str = Field(description="the service's https URI, the tokens' aud")
    binding: tuple[Literal["x5t", "session", "dpop", "window", "bearer"], ...] = Field(
        default=("x5t", "session"),
        min_length=1,
        description="proofs of possession that it accepts; window and bearer are weak",
    )
    risk: Literal["high", "normal", "low"] = Field(
        default="high", description="how its verifiers behave while the feed is stale"
    )
    introspectors: tuple[SpiffeIdText, ...] = Field(default=(), description="who else may introspect its tokens")
    token_ttl: Duration | None = Field(default=None, description="life of its tokens, if not the usual one")
    transactions: bool = Field(
        default=False, description="whether its tokens may become transaction tokens, at their holder's wish"
    )
    transaction_requesters: tuple[SpiffeIdText, ...] = Field(
        default=(), description="which services may do so too, with tokens that they were called with"
    )


class DetailTypeSettings(Table):
    """One registered type of authorization details (RFC 9396)."""

    type: str = Field(description="api or agent_tool")
    actions: tuple[str, ...] = Field(
        default=(), description="what may be asked for, names or families such as ticket.*; unset: anything"
    )
    members: tuple[str, ...] | None = Field(
        default=None,
        description="members that a detail may have besides type, locations and actions; unset: all that are known",
    )


class TransactionSettings(Table):
    """Transaction tokens inside the trust domain (header Txn-Token)."""

    ttl: Duration = Field(default=timedelta(seconds=30), description="life of a transaction token, 15s to 60s")
    replacers: tuple[SpiffeIdText, ...] = Field(
        default=(), description="which services may hand a transaction on under their own name; none: nobody"
    )


class OutwardSettings(Table):
    """Another authorization server that takes grants of ours."""

    issuer: str = Field(description="its issuer, exactly: the grant's only audience")
    resources: tuple[str, ...] = Field(
        min_length=1, description="what its tokens are for; each is an audience here too"
    )
    formats: tuple[Literal["id-jag", "jwt"], ...] = Field(
        default=("id-jag",), min_length=1, description="the grants that it takes: id-jag, or jwt (RFC 7523)"
    )
    ttl: Duration = Field(default=timedelta(seconds=60), description="life of a grant, 60s to 300s")
    clients: dict[SpiffeIdText, str] = Field(
        default={}, description="what an agent is called there, by its SPIFFE ID; who is not named is called by that"
    )


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
