"""``broker server``: run the server, or ask one whether it serves."""

import os
from pathlib import Path

import click

from broker.cli.options import noun, option, settings
from broker.cli.output import Column, Shape

HEALTH = Shape("health", "health", (Column("program", "program"), Column("status", "status")), name="program")
EXTRA_HINT = "pip install 'identity-broker[server]'"

COMMAND = noun("server", "The server.")


@COMMAND.command("run")
@option("--config", spire=["config"], envvar="BROKER_CONFIG", type=click.Path(dir_okay=False, path_type=Path),
        help="The settings. Default: /etc/broker/server.toml where it exists.")  # fmt: skip
def run(config: Path | None) -> None:
    """Run the server until it is told to stop (SIGTERM, Ctrl-C)."""
    import asyncio  # noqa: PLC0415

    from broker.errors import Misconfigured  # noqa: PLC0415

    try:
        from broker.server import app  # noqa: PLC0415 - the whole server
        from broker.server.settings import load  # noqa: PLC0415
        from broker.telemetry.log import configure  # noqa: PLC0415
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("broker"):
            raise
        raise Misconfigured(f"the server needs {error.name}, which is not installed", hint=EXTRA_HINT) from None
    chosen = load(config, os.environ)
    if settings().dry_run:
        settings().shown.talk("the settings are valid; nothing was started (--dry-run)")
        return
    settings().shown.verbose = True  # a program's log is read afterwards: a defect shows its trace there
    configure(chosen.log_level, chosen.log_format)
    asyncio.run(app.run(chosen))


@COMMAND.command("health")
def health() -> None:
    """Ask the server on its admin socket whether it serves. Exit code 75: it does not."""
    from broker.cli.connections import with_server  # noqa: PLC0415 - imports gRPC
    from broker.client import Health  # noqa: PLC0415

    here = settings()
    with_server(here, lambda channel: Health(channel, timeout=here.timeout).require_serving())
    here.shown.one(HEALTH, {"program": "server", "status": "serving"})
