"""The command tree: which noun lives in which module, and what happens when one fails. Nouns are imported when used."""

import os
import re
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from itertools import pairwise, takewhile
from typing import Final

import click
from click.shell_completion import CompletionItem

from broker.cli.options import Noun, Settings
from broker.cli.output import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_OK, Format, report, report_usage

NOUNS: Final[Mapping[str, tuple[str, str]]] = {
    "agent": ("broker.cli.agent", "The node agent: one here, and all that the server knows."),
    "approval": ("broker.cli.approval", "What waits for a person's yes, and what became of it."),
    "authority": ("broker.cli.authority", "The keys that sign: seen, and rotated by hand."),
    "bundle": ("broker.cli.bundle", "Trust bundles: the own, and those of other trust domains."),
    "completion": ("broker.cli.completion", "Completion of nouns, verbs and options in a shell."),
    "config": ("broker.cli.config", "The settings of server and agent."),
    "delegation": ("broker.cli.delegation", "Delegations that users leave standing, and the users themselves."),
    "demo": ("broker.cli.demo", "The whole story with real processes, in seconds."),
    "dev": ("broker.cli.dev", "A development estate on this machine."),
    "entry": ("broker.cli.entry", "Registration entries: which process gets which identity."),
    "explain": ("broker.cli.explain", "Why a process has an identity or none; why a task or a token may be, or not."),
    "federation": ("broker.cli.federation", "Relationships with other trust domains."),
    "join-token": ("broker.cli.join_token", "One-time tokens by which a node joins."),
    "policy": ("broker.cli.policy", "The rules that narrow what agents may have."),
    "run": ("broker.cli.run", "Launch a program under a name that the agent can attest."),
    "server": ("broker.cli.server", "The server."),
    "svid": ("broker.cli.svid", "This process's identity documents; minting and revoking others."),
    "task": ("broker.cli.task", "Tasks: start, see, change and end them."),
    "token": ("broker.cli.token", "Task tokens: look into them, verify them."),
    "version": ("broker.cli.version", "The version."),
    "whoami": ("broker.cli.whoami", "Which identities this very process gets."),
    "whois": ("broker.cli.whois", "Which identities a process of this node holds."),
}
"""Name of the noun: its module, whose ``COMMAND`` it is, and its line in the help."""

_ASKS_JSON: Final = re.compile(r"(-o|--output)=?(json|jsonl)")


class _Nouns(Noun):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(NOUNS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in NOUNS:
            return None
        module = import_module(NOUNS[cmd_name][0])
        command: click.Command = module.COMMAND
        return command

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Complete a noun without importing them all; what begins with a dash is an option."""
        if incomplete.startswith("-"):
            return click.Command.shell_complete(self, ctx, incomplete)
        return [CompletionItem(name, help=text) for name, (_, text) in NOUNS.items() if name.startswith(incomplete)]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Nouns"):
            formatter.write_dl([(name, text) for name, (_, text) in NOUNS.items()])


ROOT: Final = _Nouns(
    name="broker",
    help="Identities for processes, and one short-lived token for one task.\n\nbroker NOUN VERB --help says more.",
    no_args_is_help=False,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@click.pass_context
def _bare(ctx: click.Context) -> None:
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


ROOT.callback = _bare


def run(arguments: Sequence[str]) -> int:
    """Run one command line and give the exit code; nothing but SystemExit of a child's own leaves."""
    settings = Settings()
    # Usage errors arise before the options are read: what a program asked for is seen in the text.
    if _asks_json(arguments):
        settings.shown.format = Format.JSON
    try:
        result = ROOT.main(args=list(arguments), prog_name="broker", standalone_mode=False, obj=settings)
    except click.Abort:
        settings.shown.talk("interrupted")
        return EXIT_INTERRUPTED
    except click.exceptions.NoArgsIsHelpError as error:
        if not settings.shown.machine:
            settings.shown.talk(error.ctx.get_help())
        return report_usage("a verb is missing", settings.shown, _usage_hint(error))
    except click.ClickException as error:
        return report_usage(error.format_message(), settings.shown, _usage_hint(error))
    except BrokenPipeError:
        # Whoever read the answer has read enough; the interpreter must not complain about it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - the edge: everything is mapped here, once
        return report(error, settings.shown)
    return result if isinstance(result, int) else EXIT_OK


def _usage_hint(error: click.ClickException) -> str:
    context = error.ctx if isinstance(error, click.UsageError) else None
    return f"{context.command_path} --help" if context is not None else ""


def _asks_json(arguments: Sequence[str]) -> bool:
    own = takewhile(lambda one: one != "--", arguments)  # what follows is another program's
    pairs = pairwise([*own, ""])
    return any(_ASKS_JSON.fullmatch(one) or _ASKS_JSON.fullmatch(one + two) for one, two in pairs if one[:1] == "-")
