"""What an operator may set for the agent: a TOML file (table ``[agent]``), over it the environment (``BROKER_AGENT__…``).

Every setting has a description and a default that works. An unknown name is refused: a misspelt restriction must not
pass for a set one. Knows nothing of what the settings do; an attestor's own table is read by that attestor.
"""

import difflib
import re
import tomllib
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    SecretStr,
    ValidationError,
    WithJsonSchema,
    model_validator,
)
from pydantic_settings import BaseSettings, EnvSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict
from typing_extensions import override

from broker.errors import Invalid, Misconfigured
from broker.spiffe import TrustDomain

ENVIRONMENT_PREFIX: Final = "BROKER_AGENT__"
DEFAULT_FILE: Final = Path("/etc/broker/agent.toml")
MAX_DURATION: Final = timedelta(days=366)

_DURATION: Final = re.compile(r"(?:([0-9]{1,9})h)?(?:([0-9]{1,9})m(?!s))?(?:([0-9]{1,9})s)?(?:([0-9]{1,9})ms)?")


def duration(value: object) -> timedelta:
    """Read ``500ms``, ``2s``, ``10m``, ``1h30m``, or whole seconds; raises ValueError, as pydantic wants it."""
    if isinstance(value, timedelta):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        value = f"{value}s"
    match = _DURATION.fullmatch(value) if isinstance(value, str) else None
    if not value or match is None:
        raise ValueError("not a duration: write it as 500ms, 2s, 10m or 1h30m")
    hours, minutes, seconds, milliseconds = (int(part or 0) for part in match.groups())
    total = timedelta(seconds=(hours * 60 + minutes) * 60 + seconds, milliseconds=milliseconds)
    if total > MAX_DURATION:
        raise ValueError("a duration is at most a year")
    return total


def _trust_domain(value: object) -> TrustDomain:
    if isinstance(value, TrustDomain):
        return value
    try:
        return TrustDomain(value)  # type: ignore[arg-type]  # it refuses what is not text
    except Invalid as error:
        raise ValueError(error.message) from None


Duration = Annotated[
    timedelta,
    PlainValidator(duration),
    PlainSerializer(lambda value: f"{int(value.total_seconds() * 1000)}ms", return_type=str),
    WithJsonSchema({"type": "string", "examples": ["2s", "500ms"]}),
]
TrustDomainName = Annotated[
    TrustDomain, PlainValidator(_trust_domain), PlainSerializer(str), WithJsonSchema({"type": "string"})
]


class AttestorSettings(BaseModel):
    """Who describes nodes and processes."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    node: dict[str, dict[str, Any]] = Field(
        default={"join_token": {}},
        min_length=1,
        max_length=1,
        description="how this node proves itself to the server: one table, with that attestor's settings",
    )
    workload: dict[str, dict[str, Any]] = Field(
        default={"unix": {}}, min_length=1, description="one table per workload attestor, with that attestor's settings"
    )
    trusted_distributions: tuple[str, ...] = Field(
        default=("identity-broker",), min_length=1, description="Python distributions whose attestors may be loaded"
    )


class AgentSettings(BaseSettings):
    """The whole of ``[agent]``."""

    model_config = SettingsConfigDict(
        env_prefix=ENVIRONMENT_PREFIX, env_nested_delimiter="__", extra="forbid", frozen=True, case_sensitive=False
    )

    trust_domain: TrustDomainName = Field(
        default=TrustDomain("example.org"), description="the trust domain that this node belongs to"
    )
    server_address: str = Field(default="127.0.0.1", min_length=1, description="host name or address of the server")
    server_port: int = Field(default=8443, ge=1, le=65535, description="the server's TLS port")
    data_dir: Path = Field(
        default=Path("/var/lib/broker/agent"), description="what must survive a reboot; the agent keeps no secret there"
    )
    runtime_dir: Path = Field(
        default=Path("/run/broker/agent"), description="sockets, and the agent's own key and SVID; best in memory"
    )
    socket_path: Path = Field(
        default_factory=lambda set_before: set_before["runtime_dir"] / "public" / "api.sock",
        description="the workload socket, open to every local process",
    )
    trust_bundle_path: Path | None = Field(
        default=None, description="the server's authorities for the first contact: PEM, or a SPIFFE bundle in JSON"
    )
    insecure_bootstrap: bool = Field(
        default=False, description="trust whatever server answers the first time; for trials only"
    )
    join_token: SecretStr | None = Field(default=None, description="the one-time token for join_token attestation")
    join_token_file: Path | None = Field(default=None, description="a file that holds it, read at each attempt")
    first_identity_wait: Duration = Field(
        default=timedelta(seconds=2), description="how long a caller without an entry waits for one before it is denied"
    )
    share_when_offline: bool = Field(
        default=True,
        description="while the server is away a new process may share its entry's last spare SVID, without task tokens",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(default="info", description="what is logged")
    log_format: Literal["text", "json"] = Field(default="text", description="how it is logged")
    explain_selectors: tuple[str, ...] = Field(
        default=(),
        description="selectors whose values broker explain shows though they may hold secrets, by their beginning:"
        " docker:label:app, docker:env:REGION",
    )
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
        """Take only what is given: :func:`load` merges file and environment, and nothing is read behind its back."""
        return (init_settings,)

    @property
    def private_dir(self) -> Path:
        """The directory in the runtime directory that only the agent's user may enter."""
        return self.runtime_dir / "private"

    @property
    def admin_socket_path(self) -> Path:
        """The operator's socket."""
        return self.private_dir / "admin.sock"

    @property
    def server(self) -> str:
        """``host:port`` of the server; an IPv6 address in brackets."""
        host = self.server_address
        return (
            f"[{host}]:{self.server_port}" if ":" in host and not host.startswith("[") else f"{host}:{self.server_port}"
        )


def load(path: Path | None, environ: Mapping[str, str]) -> AgentSettings:
    """Read the file, if there is one, and the environment; raises Misconfigured, naming setting and remedy.

    A file that is named must exist; without a name the default file is read where it exists.
    """
    _refuse_unknown_variables(environ)
    source = EnvSettingsSource(AgentSettings)
    source.env_vars = {name.lower(): value for name, value in environ.items()}
    try:
        return AgentSettings(**_merged(_read_table(path), source()))
    except ValidationError as error:
        raise _explained(error) from None


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for name, value in above.items():
        old = merged.get(name)
        merged[name] = _merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


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
    # The server may share the file; anything else at the top is a setting outside its table.
    for name in document.keys() - {"server", "agent"}:
        raise Misconfigured(f"{source}: unknown table or setting {name!r}", hint="settings belong under [agent]")
    table = document.get("agent", {})
    if not isinstance(table, dict):
        raise Misconfigured(f"{source}: agent is not a table", hint="write [agent]")
    return table


def _refuse_unknown_variables(environ: Mapping[str, str]) -> None:
    for name in environ:
        if not name.upper().startswith(ENVIRONMENT_PREFIX):
            continue
        first = name[len(ENVIRONMENT_PREFIX) :].lower().partition("__")[0]
        if first not in AgentSettings.model_fields:
            raise Misconfigured(f"unknown setting in the environment: {name}", hint=_meant(first))


def _explained(error: ValidationError) -> Misconfigured:
    # Values are left out: one of them may be the join token.
    lines, hints = [], []
    for problem in error.errors(include_url=False, include_context=False, include_input=False):
        where = ".".join(str(part) for part in ("agent", *problem["loc"]))
        if problem["type"] == "extra_forbidden":
            lines.append(f"{where}: unknown setting")
            hints.append(_meant(str(problem["loc"][-1])))
        else:
            lines.append(f"{where}: {problem['msg']}")
    return Misconfigured("; ".join(lines), hint=next(filter(None, hints), "broker config schema lists every setting"))


def _meant(name: str) -> str:
    close = difflib.get_close_matches(name, [*AgentSettings.model_fields, *AttestorSettings.model_fields], n=1)
    return f"did you mean {close[0]}?" if close else "broker config schema lists every setting"
