"""Reads a program's settings: a TOML file (a table of the program's name), over it the environment (``BROKER_<PROGRAM>__…``).

An unknown name is refused with the one that was probably meant: a misspelt restriction must not pass for a set one. No
message shows a value, for some are secrets. Knows no setting: each program declares its own as a :class:`ProgramSettings`.
"""

import difflib
import re
import tomllib
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Final, TypeVar

from pydantic import BaseModel, ConfigDict, Field, PlainSerializer, PlainValidator, ValidationError, WithJsonSchema
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)
from typing_extensions import override

from broker.errors import Invalid, Misconfigured
from broker.spiffe import SpiffeId, TrustDomain

TABLES: Final = frozenset({"server", "agent"})  # the programs may share one file
MAX_FILE: Final = 1 << 20  # bytes; a file that sets everything has some 8 KiB
MAX_DURATION: Final = timedelta(days=3650)
_TOO_LONG: Final = "a duration is at most ten years"
_LIST: Final = "broker config schema lists every setting"
_DURATION: Final = re.compile(
    r"(?:([0-9]{1,9})d)?(?:([0-9]{1,9})h)?(?:([0-9]{1,9})m(?!s))?(?:([0-9]{1,9})s)?(?:([0-9]{1,9})ms)?"
)
P = TypeVar("P", bound="ProgramSettings")


class Table(BaseModel):
    """A table below a program's own."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class AttestorTable(Table):
    """Who may be loaded as an attestor; the tables by kind of attestor stand in each program's own."""

    trusted_distributions: tuple[str, ...] = Field(
        default=("identity-broker",), min_length=1, description="Python distributions whose attestors may be loaded"
    )


class ProgramSettings(BaseSettings):
    """A program's whole table. Made by :func:`read`; made directly, it takes nothing but its arguments."""

    model_config = SettingsConfigDict(env_nested_delimiter="__", extra="forbid", frozen=True, case_sensitive=False)

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
        """Take only what is given: :func:`read` merges file and environment, and nothing is read behind its back."""
        return (init_settings,)


def read(model: type[P], program: str, path: Path | None, environ: Mapping[str, str]) -> P:
    """Read the file, if there is one, and the environment; raises Misconfigured, naming setting and remedy.

    A file that is named must exist; without a name ``/etc/broker/<program>.toml`` is read where it exists.
    """
    prefix = f"BROKER_{program.upper()}__"
    _refuse_unknown_variables(model, prefix, environ)
    source = EnvSettingsSource(model, env_prefix=prefix)
    source.env_vars = {name.lower(): value for name, value in environ.items()}
    try:
        return model(**_merged(_read_table(program, path), source()))
    except ValidationError as error:
        raise _explained(model, program, error) from None
    except SettingsError as error:
        raise Misconfigured(
            f"in the environment: {error}", hint='a list or table is written as JSON there, such as ["identity"]'
        ) from None


def parse_duration(value: object) -> timedelta:
    """Read ``500ms``, ``90s``, ``10m``, ``1h30m``, ``2d``, or whole seconds; raises ValueError, as pydantic wants it."""
    if isinstance(value, timedelta):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        value = f"{value}s"
    match = _DURATION.fullmatch(value) if isinstance(value, str) else None
    if not value or match is None:
        raise ValueError("not a duration: write it as 500ms, 90s, 10m, 1h30m or 2d")
    days, hours, minutes, seconds, milliseconds = (int(part or 0) for part in match.groups())
    if days > MAX_DURATION.days:
        raise ValueError(_TOO_LONG)
    total = timedelta(days, seconds, 0, milliseconds, minutes, hours)
    if total > MAX_DURATION:
        raise ValueError(_TOO_LONG)
    return total


def duration_text(value: timedelta) -> str:
    """Write a duration as the file would have it."""
    milliseconds = value // timedelta(milliseconds=1)
    return f"{milliseconds}ms" if milliseconds % 1000 else f"{milliseconds // 1000}s"


def _parsed_by(kind: type[TrustDomain] | type[SpiffeId]) -> PlainValidator:
    def parse(value: object) -> TrustDomain | SpiffeId:
        if isinstance(value, kind):
            return value
        try:
            return kind(value)  # type: ignore[arg-type]  # it refuses what is not text
        except Invalid as error:
            raise ValueError(error.message) from None

    return PlainValidator(parse)


_TEXT: Final = WithJsonSchema({"type": "string"})
# NoDecode: in the environment these are plain words, though their types are dataclasses.
TrustDomainName = Annotated[TrustDomain, NoDecode, _parsed_by(TrustDomain), PlainSerializer(str), _TEXT]
SpiffeIdText = Annotated[SpiffeId, NoDecode, _parsed_by(SpiffeId), PlainSerializer(str), _TEXT]
Duration = Annotated[
    timedelta,
    PlainValidator(parse_duration),
    PlainSerializer(duration_text, return_type=str),
    WithJsonSchema({"type": "string", "examples": ["2s", "500ms", "1h"]}),
]


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for name, value in above.items():
        old = merged.get(name)
        merged[name] = _merged(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _read_table(program: str, path: Path | None) -> dict[str, Any]:
    source = path or Path(f"/etc/broker/{program}.toml")
    if path is None and not source.exists():
        return {}
    try:
        document = tomllib.loads(_text_of(source))
    except OSError as error:
        raise Misconfigured(
            f"{source} cannot be read: {error.strerror}", hint="name another file with --config"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise Misconfigured(f"{source} is not TOML: {error}", hint=_LIST) from None
    # Anything else at the top is a setting outside its table.
    for name in document.keys() - TABLES:
        raise Misconfigured(f"{source}: unknown table or setting {name!r}", hint=f"settings belong under [{program}]")
    table = document.get(program, {})
    if not isinstance(table, dict):
        raise Misconfigured(f"{source}: {program} is not a table", hint=f"write [{program}]")
    return table


def _text_of(source: Path) -> str:
    with source.open("rb") as file:
        content = file.read(MAX_FILE + 1)
    if len(content) > MAX_FILE:
        raise Misconfigured(f"{source} is longer than {MAX_FILE} bytes", hint="name another file with --config")
    return content.decode("utf-8")


def _refuse_unknown_variables(model: type[BaseModel], prefix: str, environ: Mapping[str, str]) -> None:
    for name in environ:
        if not name.upper().startswith(prefix):
            continue
        first = name[len(prefix) :].lower().partition("__")[0]
        if first not in model.model_fields:
            raise Misconfigured(f"unknown setting in the environment: {name}", hint=_meant(model, first))


def _explained(model: type[BaseModel], program: str, error: ValidationError) -> Misconfigured:
    lines, hints = [], []
    for problem in error.errors(include_url=False, include_context=False, include_input=False):
        where = ".".join(str(part) for part in (program, *problem["loc"]))
        if problem["type"] == "extra_forbidden":
            lines.append(f"{where}: unknown setting")
            hints.append(_meant(model, str(problem["loc"][-1])))
        elif problem["type"] != "default_factory_not_called":  # for want of another, which is told of
            lines.append(f"{where}: {problem['msg'].removeprefix('Value error, ')}")
    return Misconfigured("; ".join(lines), hint=next(filter(None, hints), _LIST))


def _meant(model: type[BaseModel], name: str) -> str:
    close = difflib.get_close_matches(name, list(_names(model)), n=1)
    return f"did you mean {close[0]}?" if close else _LIST


def _names(model: type[BaseModel]) -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield name
        arguments = (field.annotation, *getattr(field.annotation, "__args__", ()))
        for inner in arguments:
            if isinstance(inner, type) and issubclass(inner, BaseModel):
                yield from _names(inner)
