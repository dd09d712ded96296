"""``broker task``: start, run and end a task as this process, over the workload socket. The operators' verbs stand beside."""

import click

from broker.cli.inputs import read_file, read_text
from broker.cli.options import DURATION, LIFETIME, SPIFFE_ID, noun, option, settings
from broker.cli.task_operator import VERBS
from broker.cli.task_rows import SHAPE, parsed, row

COMMAND = noun("task", "Tasks: start, see, change and end them.")
for _verb in VERBS:
    COMMAND.add_command(_verb)


@COMMAND.command("start")
@option("--user-token-file", metavar="FILE|-", help="The user's token, by a file or standard input.")
@option("--delegation", default="", metavar="ID", help="Instead: a delegation that the user left standing.")
@option("--purpose", required=True, help="What it is for, for people who look at it later.")
@option("--authorization-details", required=True, metavar="JSON|@FILE", help="What it may do (RFC 9396).")
@option("--ttl", type=LIFETIME, default=0, help="Its end at the latest. Default: the server's.")
@option("--supervision", type=click.Choice(["attached", "lease", "none"]), default=None, help="Default: the server's.")
@option("--spiffe-id", spire=["spiffeID"], type=SPIFFE_ID, help="Which of this process's identities acts.")
def start(
    *,
    user_token_file: str | None,
    delegation: str,
    purpose: str,
    authorization_details: str,
    ttl: int,
    supervision: str | None,
    spiffe_id: str | None,
) -> int:
    """Start a task as this process, for a user.

    While the task is attached it lives as long as this command, which also sends the heartbeats of a leased one: Ctrl-C
    ends it. With supervision none it goes on.
    """
    from broker.tasks import Authority  # noqa: PLC0415 - imports cryptography

    _require_one_word(user_token_file, delegation)
    here = settings()
    details = Authority.parse(read_text(authorization_details, "--authorization-details")).text()
    user_token = read_file(user_token_file, "the user's token") if user_token_file else ""
    if here.dry_run:
        wanted = {"purpose": purpose, "authorization_details": parsed(details), "ttl": ttl, "supervision": supervision}
        here.shown.one(SHAPE, wanted)
        here.shown.talk("nothing was sent (--dry-run)")
        return 0
    from broker.cli.held_task import StartRequest, hold  # noqa: PLC0415 - imports gRPC

    return hold(
        here,
        StartRequest(
            user_token=user_token,
            purpose=purpose,
            authorization_details=details,
            ttl=ttl,
            supervision=supervision or "",
            spiffe_id=spiffe_id or "",
            delegation=delegation,
        ),
    )


@COMMAND.command("run", context_settings={"allow_interspersed_args": False})
@option("--user-token-file", metavar="FILE|-", help="The user's token, by a file or standard input.")
@option("--delegation", default="", metavar="ID", help="Instead: a delegation that the user left standing.")
@option("--purpose", required=True, help="What it is for, for people who look at it later.")
@option("--authorization-details", required=True, metavar="JSON|@FILE", help="What it may do (RFC 9396).")
@option("--resource", required=True, metavar="URI", help="The service that the token is for: a token is for one.")
@option("--scope", default="", help="Less than the task may do there.")
@option("--ttl", type=LIFETIME, default=0, help="Its end at the latest. Default: the server's.")
@option(
    "--grace", type=DURATION, default=10, help="Between SIGTERM and SIGKILL when the task ends first. Default: 10s."
)
@option("--spiffe-id", spire=["spiffeID"], type=SPIFFE_ID, help="Which of this process's identities acts.")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED, metavar="-- CMD [ARGS]…")
def run(
    *,
    user_token_file: str | None,
    delegation: str,
    purpose: str,
    authorization_details: str,
    resource: str,
    scope: str,
    ttl: int,
    grace: int,
    spiffe_id: str | None,
    command: tuple[str, ...],
) -> int:
    """Run a command with a task of its own; the task ends with it. Exit code: the command's; 4: the task ended first.

    The command finds the token in the file that BROKER_TASK_TOKEN_FILE names, and what it is bound to in BROKER_SVID_FILE,
    BROKER_SVID_KEY_FILE and BROKER_BUNDLE_FILE. The files change: read them for each use.
    """
    from broker.tasks import Authority, Resource  # noqa: PLC0415 - imports cryptography

    _require_one_word(user_token_file, delegation)
    here = settings()
    details = Authority.parse(read_text(authorization_details, "--authorization-details")).text()
    audience = Resource(resource).text
    user_token = read_file(user_token_file, "the user's token") if user_token_file else ""
    if here.dry_run:
        here.shown.one(SHAPE, {"purpose": purpose, "authorization_details": parsed(details), "ttl": ttl})
        here.shown.talk(f"would run {command[0]} with a token for {audience}; nothing was sent (--dry-run)")
        return 0
    from broker.cli.task_run import RunRequest  # noqa: PLC0415 - imports gRPC
    from broker.cli.task_run import run as run_command  # noqa: PLC0415

    return run_command(
        here,
        RunRequest(
            user_token=user_token,
            delegation=delegation,
            purpose=purpose,
            authorization_details=details,
            ttl=ttl,
            spiffe_id=spiffe_id or "",
            resource=audience,
            scope=scope,
            grace=grace,
            command=command,
        ),
    )


@COMMAND.command("complete")
@click.argument("task_id", metavar="ID")
@option("--spiffe-id", spire=["spiffeID"], type=SPIFFE_ID, help="Which of this process's identities.")
def complete(task_id: str, spiffe_id: str | None) -> None:
    """End a task of this process's own identity: its work is done. Every token of it dies."""
    here = settings()
    if here.dry_run:
        here.shown.one(SHAPE, {"id": task_id})
        here.shown.talk("nothing was sent (--dry-run)")
        return
    from broker.cli.connections import with_agent  # noqa: PLC0415 - imports gRPC
    from broker.cli.held_task import complete as end  # noqa: PLC0415

    ended = with_agent(here, lambda channel: end(channel, task_id, spiffe_id=spiffe_id or "", timeout=here.timeout))
    here.shown.one(SHAPE, row(ended))
    here.shown.next(f"broker task show {task_id}")


def _require_one_word(user_token_file: str | None, delegation: str) -> None:
    """Refuse a task on no word of a user, or on two."""
    if bool(user_token_file) == bool(delegation):
        raise click.UsageError("name --user-token-file or --delegation")
