"""The two verbs of a program: ``run``, and ``health`` of one that runs. Knows neither the server nor the agent."""

import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final, TypeAlias

import click

from broker.cli.options import Noun, Settings, option, settings
from broker.cli.output import Column, Shape

HEALTH: Final = Shape("health", "health", (Column("program", "program"), Column("status", "status")), name="program")

Load: TypeAlias = Callable[[Path | None, Any], Any]
Run: TypeAlias = Callable[[Any], None]
Ask: TypeAlias = Callable[[Settings, Callable[[Any], Awaitable[None]]], None]


def add_run(program: Noun, title: str, parts: Callable[[], tuple[Load, Run]]) -> None:
    """Add ``run``; ``parts`` imports the program, which the verb alone needs, and says how it is set and how it runs."""

    @program.command("run", help=f"Run the {title} until it is told to stop (SIGTERM, Ctrl-C).")
    @option("--config", spire=["config"], envvar="BROKER_CONFIG", type=click.Path(dir_okay=False, path_type=Path),
            help=f"The settings. Default: /etc/broker/{program.name}.toml where it exists.")  # fmt: skip
    def run(config: Path | None) -> None:
        from broker.errors import Misconfigured  # noqa: PLC0415
        from broker.transport.hardening import silence_grpc  # noqa: PLC0415

        silence_grpc()
        try:
            load, start = parts()
            from broker.telemetry.log import configure  # noqa: PLC0415
        except ModuleNotFoundError as error:
            if (error.name or "").startswith("broker"):
                raise
            raise Misconfigured(
                f"the {program.name} needs {error.name}, which is not installed",
                hint=f"pip install 'identity-broker[{program.name}]'",
            ) from None
        chosen = load(config, os.environ)
        if settings().dry_run:
            settings().shown.talk("the settings are valid; nothing was started (--dry-run)")
            return
        settings().shown.verbose = True  # a program's log is read afterwards: a defect shows its trace there
        configure(chosen.log_level, chosen.log_format)
        start(chosen)


def add_health(program: Noun, where: str, ask: Callable[[], Ask]) -> None:
    """Add ``health``; ``ask`` imports what opens a channel to the program for a while."""

    @program.command("health", help=f"Ask the {where} whether it serves. Exit code 75: it does not.")
    def health() -> None:
        from broker.client import Health  # noqa: PLC0415

        here = settings()
        ask()(here, lambda channel: Health(channel, timeout=here.timeout).require_serving())
        here.shown.one(HEALTH, {"program": program.name, "status": "serving"})
