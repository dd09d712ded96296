"""``broker run``: launch a program under a name, so that the node agent can tell it from others of its user and interpreter."""

import os
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import click

from broker.cli.options import Settings, Verb, option, settings
from broker.cli.output import Column, Shape

if TYPE_CHECKING:
    from broker.agent.launch_account import Account
    from broker.agent.launch_code import Code
    from broker.agent.launch_directory import LaunchDirectory

LAUNCH = Shape(
    "launch",
    "launches",
    (
        Column("name", "name"),
        Column("selectors", "selectors"),
        Column("runs", "arguments"),
        Column("size", "size"),
        Column("uid", "uid"),
        Column("gid", "gid"),
    ),
    name="name",
)
_HELP = """Launch a program under a name, and stay until it ends; give its exit code.

Run it as root with --user, from a service's ExecStart= or a container's entry point in the agent's pid namespace. The agent's
attestor launch then gives launch:name:NAME and launch:code:SHA256 to this one process: not to another script, not to
what it starts, and not to what it becomes. A script and its interpreter run from sealed memory; Python always with -I."""


@click.command("run", cls=Verb, help=_HELP, context_settings={"allow_interspersed_args": False})
@option("--as", "name", required=True, metavar="NAME", help="Its name: 1 to 64 of a-z, 0-9, dash and underscore.")
@option("--user", metavar="USER", help="Run it as this user: a name or a number. Needs root.")
@option("--group", metavar="GROUP", help="With --user: its group. Default: the user's own.")
@option("--directory", type=click.Path(file_okay=False, path_type=Path), metavar="DIR",
        help="The agent's launches directory. Default: private/launches beside the workload socket's directory.")  # fmt: skip
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED, metavar="-- CMD [ARGS]…")
def COMMAND(  # noqa: N802 - what the tree loads
    *, name: str, user: str | None, group: str | None, directory: Path | None, command: tuple[str, ...]
) -> int:
    """Launch it."""
    from broker.agent.launch_account import Account  # noqa: PLC0415 - pydantic, cryptography
    from broker.agent.launch_code import prepare  # noqa: PLC0415
    from broker.agent.launch_directory import LaunchDirectory  # noqa: PLC0415
    from broker.agent.launcher import Launching, launch  # noqa: PLC0415

    here = settings()
    _check(name, user, group)
    account = None if user is None else Account.find(user, group)
    with ExitStack() as stack:
        hide = account is not None and account.uid != 0
        code = prepare(command, name, stack, hide=hide)
        if here.dry_run:
            _show(here, name, code, account)
            return 0
        where = stack.enter_context(LaunchDirectory.open(directory or _directory(here)))
        _require_apart(here, where, account)
        where.sweep()
        environment = {**os.environ, **({} if account is None else account.environment)}
        return launch(Launching(name, code, account, environment), where, here.shown.talk)


def _check(name: str, user: str | None, group: str | None) -> None:
    from broker.attestation.launches import NAME  # noqa: PLC0415 - as above
    from broker.errors import Invalid  # noqa: PLC0415

    if NAME.fullmatch(name) is None:
        raise Invalid(f"not a name: {name!r}", code="launch_name", hint="1 to 64 of a-z, 0-9, dash and underscore")
    if group is not None and user is None:
        raise Invalid("--group needs --user", code="launch_no_user", hint="say --user as well")


def _directory(here: Settings) -> Path:
    """Beside the admin socket, wherever the agent's runtime directory is."""
    public = Path(here.agent_socket())
    return public.parent.parent / "private" / "launches"


def _require_apart(here: Settings, where: "LaunchDirectory", account: "Account | None") -> None:
    from broker.errors import Refused  # noqa: PLC0415

    if account is not None and account.uid == where.owner and account.uid != 0:
        raise Refused(
            "the program would run as the agent's own user, and could register itself under any name",
            code="launch_not_apart",
            hint="give each agent program a user of its own",
        )
    if account is None or account.uid == 0:
        here.shown.talk("for a trial only: this user may write registrations, so the program could take any name")


def _show(here: Settings, name: str, code: "Code", account: "Account | None") -> None:
    selectors = [f"launch:name:{name}", f"launch:code:{code.sha256}"]
    here.shown.one(
        LAUNCH,
        {
            "name": name,
            "selectors": selectors,
            "sha256": code.sha256,
            "size": code.size,
            "arguments": list(code.arguments),
            "uid": os.geteuid() if account is None else account.uid,
            "gid": os.getegid() if account is None else account.gid,
        },
    )
    here.shown.talk("nothing was started (--dry-run)")
    here.shown.next(f"broker entry create --selector {selectors[0]} --spiffe-id … --parent-id …")
