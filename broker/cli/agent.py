"""``broker agent``: run the node agent, or ask one whether it serves."""

import os
from pathlib import Path

import click

from broker.cli.options import noun, option, settings
from broker.cli.server import HEALTH

EXTRA_HINT = "pip install 'identity-broker[agent]'"

COMMAND = noun("agent", "The node agent.")


@COMMAND.command("run")
@option("--config", spire=["config"], envvar="BROKER_CONFIG", type=click.Path(dir_okay=False, path_type=Path),
        help="The settings. Default: /etc/broker/agent.toml where it exists.")  # fmt: skip
def run(config: Path | None) -> None:
    """Run the node agent until it is told to stop (SIGTERM, Ctrl-C)."""
    from broker.errors import Misconfigured  # noqa: PLC0415

    try:
        from broker.agent import app  # noqa: PLC0415 - the whole agent
        from broker.agent.settings import load  # noqa: PLC0415
        from broker.telemetry.log import configure  # noqa: PLC0415
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("broker"):
            raise
        raise Misconfigured(f"the agent needs {error.name}, which is not installed", hint=EXTRA_HINT) from None
    chosen = load(config, os.environ)
    if settings().dry_run:
        settings().shown.talk("the settings are valid; nothing was started (--dry-run)")
        return
    settings().shown.verbose = True  # a program's log is read afterwards: a defect shows its trace there
    configure(chosen.log_level, chosen.log_format)
    app.run(chosen)


@COMMAND.command("health")
def health() -> None:
    """Ask the node agent on its workload socket whether it serves. Exit code 75: it does not."""
    from broker.cli.connections import with_agent  # noqa: PLC0415 - imports gRPC
    from broker.client import Health  # noqa: PLC0415

    here = settings()
    with_agent(here, lambda channel: Health(channel, timeout=here.timeout).require_serving())
    here.shown.one(HEALTH, {"program": "agent", "status": "serving"})
