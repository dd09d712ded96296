"""``broker version``: imports nothing but the version, so that it answers at once."""

import platform

import click

from broker.cli.options import Verb, settings
from broker.cli.output import Column, Shape
from broker.version import __version__

SHAPE = Shape("version", "versions", (Column("version", "version"), Column("python", "python")), name="version")


@click.command("version", cls=Verb)
def COMMAND() -> None:  # noqa: N802 - the name that the tree looks for
    """Print the version."""
    settings().shown.one(SHAPE, {"version": __version__, "python": platform.python_version()})
