"""What an operator may set: a TOML file (table ``[server]``), over it the environment (``BROKER_SERVER__…``).

Every setting has a description and a default that works. An unknown name is refused: a misspelt restriction must not
pass for a set one. Knows nothing of what the settings do; an attestor's own table is read by that attestor.
"""

import difflib
import re
import tomllib
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    ValidationError,
    WithJsonSchema,
)
from pydantic_settings import BaseSettings, NoDecode, PydanticBaseSettingsSource, SettingsConfigDict, SettingsError
from typing_extensions import override

from broker.errors import Invalid, Misconfigured
from broker.spiffe import SpiffeId, TrustDomain

ENVIRONMENT_PREFIX: Final = "BROKER_SERVER__"
DEFAULT_FILE: Final = Path("/etc/broker/server.toml")
ANY_AUDIENCE: Final = "*"
"""In ``default_allowed_audiences``: whatever the workload asks for, as in SPIRE."""
MIN_TTL: Final = timedelta(seconds=1)
MAX_TTL: Final = timedelta(days=3650)

_DURATION: Final = re.compile(r"(?:([0-9]{1,9})d)?(?:([0-9]{1,9})h)?(?:([0-9]{1,9})m)?(?:([0-9]{1,9})s)?")
_ISSUER: Final = re.compile(r"https://[A-Za-z0-9.\-]+(?::[0-9]{1,5})?(?:/[A-Za-z0-9._~\-]+)*")


def duration(value: object) -> timedelta:
    """Read ``90s``, ``10m``, ``1h30m``, ``2d``, or whole seconds; raises ValueError, as pydantic wants it."""
    if isinstance(value, timedelta):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        value = f"{value}s"
    match = _DURATION.fullmatch(value) if isinstance(value, str) else None
    if not value or match is None:
        raise ValueError("not a duration: write it as 90s, 10m, 1h30m or 2d")
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    total = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    if not MIN_TTL.total_seconds() <= total <= MAX_TTL.total_seconds():
        raise ValueError("a duration is at least one second and at most ten years")
    return timedelta(seconds=total)


def duration_text(value: timedelta) -> str:
    """Write a duration in seconds, as the file would have it."""
    return f"{int(value.total_seconds())}s"


def _trust_domain(value: object) -> TrustDomain:
    if isinstance(value, TrustDomain):
        return value
    try:
        return TrustDomain(value)  # type: ignore[arg-type]  # it refuses what is not text
    except Invalid as error:
        raise ValueError(error.message) from None


def _spiffe_id(value: object) -> SpiffeId:
    if isinstance(value, SpiffeId):
        return value
    try:
        return SpiffeId(value)  # type: ignore[arg-type]  # it refuses what is not text
    except Invalid as error:
        raise ValueError(error.message) from None


def _issuer(value: str) -> str:
    if _ISSUER.fullmatch(value) is None:
        raise ValueError("not an https URL without query, fragment and final slash")
    return value


def _memory_only(value: object) -> object:
    if value == "disk":
        raise ValueError('keys on disk are not built yet: leave manager = "memory"')
    return value


Duration = Annotated[
    timedelta,
    PlainValidator(duration),
    PlainSerializer(duration_text, return_type=str),
    WithJsonSchema({"type": "string", "examples": ["180s", "1h"]}),
]
TrustDomainName = Annotated[
    # NoDecode: in the environment it is a plain word, though its type is a dataclass.
    TrustDomain, NoDecode, PlainValidator(_trust_domain), PlainSerializer(str), WithJsonSchema({"type": "string"})
]
SpiffeIdText = Annotated[SpiffeId, PlainValidator(_spiffe_id), PlainSerializer(str), WithJsonSchema({"type": "string"})]
IssuerUrl = Annotated[str, AfterValidator(_issuer)]


class _Table(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class StoreSettings(_Table):
    """Where everything that must survive is kept."""

    url: str = Field(
        default="",
        pattern=r"^(sqlite:///[^\x00?#]+)?$",
        description="sqlite:///absolute/path/of/the.db; empty: broker.db in data_dir",
    )


class KeySettings(_Table):
    """Where private keys live."""

    manager: Annotated[Literal["memory"], BeforeValidator(_memory_only)] = Field(
        default="memory", description="memory: keys end with the process, a restart makes new authorities"
    )


class OperationsSettings(_Table):
    """The port for metrics and health."""

    bind_address: str = Field(default="127.0.0.1", description="address of /metrics, /live and /ready")
    bind_port: int = Field(default=9901, ge=0, le=65535, description="its port; 0: the kernel chooses")
    enabled: bool = Field(default=True, description="whether that port is opened at all")


class SubjectSettings(_Table):
    """One issuer whose user tokens are accepted."""

    issuer: str = Field(description="the issuer, exactly as in the tokens' iss")
    audiences: tuple[str, ...] = Field(min_length=1, description="a user token must be meant for one of these")
    ca_path: Path | None = Field(default=None, description="PEM roots for this issuer; unset: the machine's own")
    clients: tuple[str, ...] = Field(default=(), description="other clients whose tokens are taken (azp, client_id)")
    namespace: str = Field(default="", description="put before the user, to keep two issuers' users apart")
    required_claims: dict[str, str] = Field(default={}, description="claims that each user token must have so")


class TaskSettings(_Table):
    """Tasks and their tokens."""

    token_ttl: Duration = Field(default=timedelta(seconds=180), description="life of a task token, 10s to 300s")
    task_ttl: Duration = Field(default=timedelta(hours=1), description="life of a task whose request does not say")
    max_task_ttl: Duration = Field(default=timedelta(days=1), description="the longest life that a task may ask for")
    max_depth: int = Field(default=5, ge=1, le=16, description="how deep tasks may start tasks")
    supervision: Literal["attached", "none"] = Field(
        default="attached", description="attached: a task ends with the process that started it"
    )
    allow_unsupervised: bool = Field(default=False, description="whether a caller may ask for supervision none")


class AudienceSettings(_Table):
    """One service that task tokens may be for."""

    resource: str = Field(description="the service's https URI, the tokens' aud")
    binding: tuple[Literal["x5t", "session", "dpop"], ...] = Field(
        default=("x5t", "session"), min_length=1, description="proofs of possession that it accepts"
    )
    risk: Literal["high", "normal", "low"] = Field(
        default="high", description="how its verifiers behave while the feed is stale"
    )
    introspectors: tuple[SpiffeIdText, ...] = Field(default=(), description="who else may introspect its tokens")
    token_ttl: Duration | None = Field(default=None, description="life of its tokens, if not the usual one")


class AttestorSettings(_Table):
    """Which proofs of a node this server takes."""

    node: dict[str, dict[str, Any]] = Field(
        default={"join_token": {}},
        min_length=1,
        description="one table per node attestor, with that attestor's settings; no other is taken",
    )
    trusted_distributions: tuple[str, ...] = Field(
        default=("identity-broker",), min_length=1, description="Python distributions whose attestors may be loaded"
    )


class ServerSettings(BaseSettings):
    """The whole of ``[server]``."""

    model_config = SettingsConfigDict(
        env_prefix=ENVIRONMENT_PREFIX, env_nested_delimiter="__", extra="forbid", frozen=True, case_sensitive=False
    )

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
    operations: OperationsSettings = Field(default=OperationsSettings(), description="metrics and health")
    attestors: AttestorSettings = Field(default=AttestorSettings(), description="node attestors")
    subjects: tuple[SubjectSettings, ...] = Field(
        default=(), description="whose user tokens are accepted; none: no task starts"
    )
    tasks: TaskSettings = Field(default=TaskSettings(), description="tasks and their tokens")
    audiences: tuple[AudienceSettings, ...] = Field(
        default=(), description="services that tokens may be for; none: no token"
    )

    @classmethod
    @override
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Let the environment win over what is given at construction, which is the file."""
        return env_settings, init_settings

    @property
    def database_path(self) -> Path:
        """The SQLite file."""
        return Path(self.store.url.removeprefix("sqlite://")) if self.store.url else self.data_dir / "broker.db"

    @property
    def private_dir(self) -> Path:
        """The directory in the runtime directory that only the server's user may enter."""
        return self.runtime_dir / "private"


def load(path: Path | None, environ: Mapping[str, str]) -> ServerSettings:
    """Read the file, if there is one, and the environment; raises Misconfigured, naming setting and remedy.

    A file that is named must exist; without a name the default file is read where it exists.
    """
    _refuse_unknown_variables(environ)
    table = _read_table(path)
    try:
        return ServerSettings(**table)
    except ValidationError as error:
        raise _explained(error) from None
    except SettingsError as error:
        raise Misconfigured(
            f"in the environment: {error}", hint='a list or table is written as JSON there, such as ["identity"]'
        ) from None


def _read_table(path: Path | None) -> dict[str, Any]:
    source = path or DEFAULT_FILE
    if path is None and not source.exists():
        return {}
    try:
        document = tomllib.loads(source.read_text("utf-8"))
    except OSError as error:
        raise Misconfigured(
            f"{source} cannot be read: {error.strerror}", hint="name another file with --config"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise Misconfigured(f"{source} is not TOML: {error}", hint="broker config schema lists every setting") from None
    # The agent may share the file; anything else at the top is a setting outside its table.
    for name in document.keys() - {"server", "agent"}:
        raise Misconfigured(f"{source}: unknown table or setting {name!r}", hint="settings belong under [server]")
    table = document.get("server", {})
    if not isinstance(table, dict):
        raise Misconfigured(f"{source}: server is not a table", hint="write [server]")
    return table


def _refuse_unknown_variables(environ: Mapping[str, str]) -> None:
    for name in environ:
        if not name.upper().startswith(ENVIRONMENT_PREFIX):
            continue
        first = name[len(ENVIRONMENT_PREFIX) :].lower().partition("__")[0]
        if first not in ServerSettings.model_fields:
            raise Misconfigured(f"unknown setting in the environment: {name}", hint=_meant(first))


def _explained(error: ValidationError) -> Misconfigured:
    # Values are left out: one of them may be a password.
    lines, hints = [], []
    for problem in error.errors(include_url=False, include_context=False, include_input=False):
        where = ".".join(str(part) for part in ("server", *problem["loc"]))
        if problem["type"] == "extra_forbidden":
            lines.append(f"{where}: unknown setting")
            hints.append(_meant(str(problem["loc"][-1])))
        else:
            lines.append(f"{where}: {problem['msg']}")
    return Misconfigured("; ".join(lines), hint=next(filter(None, hints), "broker config schema lists every setting"))


def _meant(name: str) -> str:
    close = difflib.get_close_matches(name, list(_names(ServerSettings)), n=1)
    return f"did you mean {close[0]}?" if close else "broker config schema lists every setting"


def _names(model: type[BaseModel]) -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield name
        arguments = (field.annotation, *getattr(field.annotation, "__args__", ()))
        for inner in arguments:
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                yield from _names(inner)
