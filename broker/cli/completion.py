"""``broker completion``: the script by which a shell completes nouns, verbs and options. The shell asks ``broker`` itself."""

import click
from click.shell_completion import get_completion_class

from broker.cli.options import Verb, settings

ASKS = "_BROKER_COMPLETE"
"""The variable by which the script says that it wants completions: click's, for a program of this name."""


@click.command("completion", cls=Verb)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def COMMAND(shell: str) -> None:  # noqa: N802 - the name that the tree looks for
    """Print a shell's completion script; in bash: eval "$(broker completion bash)"."""
    kind = get_completion_class(shell)
    assert kind is not None  # one of the three
    # Not source(), which runs the shell to see its version: the script itself is what is wanted.
    script = kind(click.get_current_context().find_root().command, {}, "broker", ASKS)
    settings().shown.raw(script.source_template % script.source_vars())
