"""``broker config``: what can be set, what is set, and whether it is right. Starts nothing."""

import json
import os
import types
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, Union, get_args, get_origin

import click

from broker.cli.options import noun, option, settings
from broker.cli.output import Column, Shape

SCHEMA = Shape(
    "setting",
    "settings",
    (Column("setting", "setting"), Column("default", "default"), Column("description", "description")),
    name="setting",
)
VALUES = Shape("setting", "settings", (Column("setting", "setting"), Column("value", "value")), name="setting")
HIDDEN = "<secret>"

COMMAND = noun("config", "The settings of server and agent.")
PROGRAM = click.argument("program", type=click.Choice(["server", "agent"]))
CONFIG = option(
    "--config", type=click.Path(dir_okay=False, path_type=Path), help="The file. Default: as the program's."
)


@COMMAND.command("schema")
@PROGRAM
def schema(program: str) -> None:
    """Show every setting with its default and what it means."""
    model, _ = _program(program)
    rows = (
        {"setting": name, "default": default, "description": text} for name, default, text in _fields(model, program)
    )
    settings().shown.many(SCHEMA, rows)


@COMMAND.command("check")
@PROGRAM
@CONFIG
def check(program: str, config: Path | None) -> None:
    """Read the file and the environment as the program would. Exit code 78: something is wrong, and what."""
    _, load = _program(program)
    load(config, os.environ)
    settings().shown.talk(f"the settings of the {program} are valid")
    settings().shown.next(f"broker {program} run")


@COMMAND.command("show")
@PROGRAM
@CONFIG
def show(program: str, config: Path | None) -> None:
    """Show every setting as it would be in force; secrets are hidden."""
    _, load = _program(program)
    rows = ({"setting": name, "value": value} for name, value in _values(load(config, os.environ), program))
    settings().shown.many(VALUES, rows)


def _program(program: str) -> tuple[Any, Any]:
    if program == "server":
        from broker.server import settings as server  # noqa: PLC0415 - imports pydantic

        return server.ServerSettings, server.load
    from broker.agent import settings as agent  # noqa: PLC0415

    return agent.AgentSettings, agent.load


def _fields(model: Any, prefix: str) -> Iterator[tuple[str, str, str]]:
    for name, field in model.model_fields.items():
        here = f"{prefix}.{name}"
        inner, is_list = _inner(field.annotation)
        if inner is None:
            yield here, _default(field), field.description or ""
        else:
            yield from _fields(inner, f"{here}[]" if is_list else here)


def _default(field: Any) -> str:
    if field.is_required():
        return "(required)"
    if field.default_factory_takes_validated_data:
        return "(from the others)"
    return _text(field.get_default(call_default_factory=True))


def _inner(annotation: Any) -> tuple[Any, bool]:
    """Give the model below a field, and whether the field is a list of such tables."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        found = [one for one in arguments if hasattr(one, "model_fields")]
        return (found[0] if found else None), False
    if origin in (list, tuple) and arguments and hasattr(arguments[0], "model_fields"):
        return arguments[0], True
    return (annotation, False) if hasattr(annotation, "model_fields") else (None, False)


def _values(value: Any, prefix: str) -> Iterator[tuple[str, str]]:
    if hasattr(type(value), "model_fields"):
        for name in type(value).model_fields:
            yield from _values(getattr(value, name), f"{prefix}.{name}")
    elif isinstance(value, (list, tuple)) and value and hasattr(type(value[0]), "model_fields"):
        for number, each in enumerate(value):
            yield from _values(each, f"{prefix}[{number}]")
    else:
        yield prefix, _text(value)


def _text(value: object) -> str:
    if hasattr(value, "get_secret_value"):
        return HIDDEN if value.get_secret_value() else ""
    if isinstance(value, timedelta):
        from broker.settings import duration_text  # noqa: PLC0415 - imports pydantic

        return duration_text(value)
    if isinstance(value, (dict, list)):
        return json.dumps(value, default=str, sort_keys=True)
    if isinstance(value, (tuple, set, frozenset)):
        return ", ".join(sorted(map(str, value)))
    return "" if value is None else str(value)
