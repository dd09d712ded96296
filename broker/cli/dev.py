"""``broker dev``: a development estate on this machine: real programs, loopback only."""

import os
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from broker.cli.options import noun, option, settings
from broker.cli.output import Column, Shape

if TYPE_CHECKING:
    from broker.dev.estate import Estate

PARTS = Shape(
    "part",
    "parts",
    (
        Column("part", "name"),
        Column("state", "state"),
        Column("pid", "pid"),
        Column("address", "address"),
        Column("detail", "detail"),
        Column("log", "log", wide=True),
    ),
    name="name",
)
TOKEN = Shape("user_token", "user_tokens", (Column("user", "user"), Column("token", "token")), name="user")

COMMAND = noun("dev", "A development estate on this machine.")
_DIRECTORY = option(
    "--directory", type=click.Path(file_okay=False, path_type=Path), help="Default: ~/.local/state/broker-dev."
)


@COMMAND.command("up")
@_DIRECTORY
@option(
    "--audience", "audiences", multiple=True, help="A service that task tokens may be for: its https URI. Repeatable."
)
def up(directory: Path | None, audiences: tuple[str, ...]) -> None:
    """Start a server, a node agent and an OpenID issuer, or what of them does not run. For this machine only."""
    import asyncio  # noqa: PLC0415 - the slow imports only when used

    from broker.dev.configuration import NODE_ALIAS, Plan  # noqa: PLC0415
    from broker.dev.estate import Estate  # noqa: PLC0415
    from broker.tasks import Resource  # noqa: PLC0415

    here = settings()
    plan = Plan(audiences=[Resource(one).text for one in audiences]) if audiences else None
    estate = Estate(_chosen(directory), plan=plan)
    if here.dry_run:
        here.shown.talk(f"would start what does not run in {estate.layout.directory}; nothing was done (--dry-run)")
        return
    parts = asyncio.run(estate.up(here.shown.talk))
    here.shown.many(PARTS, [asdict(part) for part in parts])
    here.shown.talk("loopback only: anybody with this user's files is every user of this estate")
    here.shown.talk(f"parent of entries: {NODE_ALIAS}")
    here.shown.next("broker dev shell")


@COMMAND.command("down")
@_DIRECTORY
@option("--purge", is_flag=True, help="Remove the directory too: entries, tasks, keys.")
def down(directory: Path | None, *, purge: bool) -> None:
    """End the estate's programs."""
    here = settings()
    estate = _estate(directory)
    if purge:
        here.confirm(f"Remove {estate.layout.directory} with all its entries and tasks?")
    if here.dry_run:
        here.shown.talk(f"would end what runs in {estate.layout.directory}; nothing was done (--dry-run)")
        return
    ended = estate.down()
    if purge:
        estate.purge()
    here.shown.talk("ended: " + ", ".join(ended) if ended else "nothing was running")
    here.shown.next("broker dev up")


@COMMAND.command("status")
@_DIRECTORY
def status(directory: Path | None) -> int:
    """Show each program: pid, address, health. Exit code 75: not all of them serve."""
    import asyncio  # noqa: PLC0415

    here = settings()
    parts = asyncio.run(_estate(directory).status())
    here.shown.many(PARTS, [asdict(part) for part in parts])
    whole = all(part.state == "running" for part in parts)
    here.shown.next("broker dev shell" if whole else "broker dev up")
    return 0 if whole else 75


@COMMAND.command("shell")
@_DIRECTORY
def shell(directory: Path | None) -> int:
    """Open a shell in which commands and workloads find the estate."""
    here = settings()
    variables = _estate(directory).environment()
    for name, value in variables.items():
        here.shown.talk(f"{name}={value}")
    here.shown.talk("exit leaves this shell; the estate goes on (broker dev down ends it)")
    program = os.environ.get("SHELL") or "/bin/sh"
    return subprocess.run([program], env={**os.environ, **variables}, check=False).returncode  # noqa: S603 - the user's own


@COMMAND.command("user-token")
@click.argument("name")
@_DIRECTORY
def user_token(name: str, directory: Path | None) -> None:
    """Print an ID token of the development issuer for a user of this name. Nobody is asked for a password."""
    here = settings()
    token = _estate(directory).user_token(name)
    if here.shown.format is None:
        here.shown.raw(token)
    else:
        here.shown.one(TOKEN, {"user": name, "token": token})
    here.shown.next(f"broker dev user-token {name} | broker task start --user-token-file - --purpose … "
                    "--authorization-details @FILE")  # fmt: skip


def _chosen(directory: Path | None) -> Path:
    from broker.dev.layout import default_directory  # noqa: PLC0415

    return directory or default_directory(os.environ)


def _estate(directory: Path | None) -> "Estate":
    from broker.dev.estate import Estate  # noqa: PLC0415 - the slow imports only when used

    return Estate(_chosen(directory))
