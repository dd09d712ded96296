"""``broker delegation``: what users leave standing; and users as operators disable and enable them."""

from typing import Any

import click

from broker.cli.inputs import read_file, read_text
from broker.cli.options import DURATION, LIFETIME, noun, option, settings
from broker.cli.output import Column, Shape, moment

SHAPE = Shape(
    "delegation",
    "delegations",
    (
        Column("id", "id"),
        Column("state", "state"),
        Column("user", "user"),
        Column("agents", "agents"),
        Column("purpose", "purpose"),
        Column("expires", "expires_at"),
        Column("client", "client", wide=True),
        Column("longest task", "max_task_ttl", wide=True),
        Column("hops", "max_hops", wide=True),
        Column("ended", "ended_at", wide=True),
        Column("cause", "cause", wide=True),
        Column("authority", "authorization_details", wide=True),
    ),
)
STOPPED = Shape(
    "stop",
    "stops",
    (Column("of", "kind"), Column("name", "name"), Column("tasks ended", "tasks_ended")),
    name="name",
)
ENABLED = Shape("user", "users", (Column("user", "user"), Column("changed", "changed")), name="user")

COMMAND = noun("delegation", "Delegations that users leave standing, and the users themselves.")


@COMMAND.command("create")
@option("--user-token-file", required=True, metavar="FILE|-", help="The user's token, by a file or standard input.")
@option(
    "--agent", "agents", multiple=True, required=True, metavar="SPIFFE_ID[/*]", help="Who may act on it. Repeat it."
)
@option("--authorization-details", required=True, metavar="JSON|@FILE", help="The most that it permits (RFC 9396).")
@option("--purpose", required=True, help="What it is for, for the user who looks at it later.")
@option("--ttl", type=DURATION, required=True, help="How long it stands.")
@option("--max-task-ttl", type=LIFETIME, default=0, help="The longest task on it. Default: the server's longest.")
@option("--max-hops", type=click.IntRange(min=1), default=1, help="Most agents in one chain. Default: 1.")
def create(
    *,
    user_token_file: str,
    agents: tuple[str, ...],
    authorization_details: str,
    purpose: str,
    ttl: int,
    max_task_ttl: int,
    max_hops: int,
) -> None:
    """Leave a delegation standing for a user who has just signed in, with their own application's token."""
    from broker.spiffe import strictjson  # noqa: PLC0415 - imports cryptography
    from broker.tasks import Authority  # noqa: PLC0415 - imports cryptography

    here = settings()
    details = Authority.parse(read_text(authorization_details, "--authorization-details")).to_json()
    terms = {
        "agents": list(agents),
        "authorization_details": details,
        "purpose": purpose,
        "expires_in": ttl,
        "max_task_ttl": max_task_ttl,
        "max_hops": max_hops,
    }
    user_token = read_file(user_token_file, "the user's token")
    if here.dry_run:
        here.shown.one(SHAPE, terms)
        here.shown.talk("nothing was sent (--dry-run)")
        return
    from broker.cli.connections import with_server  # noqa: PLC0415 - imports gRPC
    from broker.client import Delegations  # noqa: PLC0415

    text = strictjson.canonical(terms).decode()
    made = with_server(here, lambda channel: Delegations(channel, timeout=here.timeout).create(user_token, text))
    here.shown.one(SHAPE, row(made))
    here.shown.next(f"broker task start --delegation {made.id} --help")


@COMMAND.command("list")
@option("--user", default="", help="Only those of this user.")
def list_(user: str) -> None:
    """List them, as an operator."""
    from broker.cli.connections import with_server  # noqa: PLC0415 - imports gRPC
    from broker.client import Delegations  # noqa: PLC0415

    here = settings()

    async def act(channel: Any) -> Any:
        return await Delegations(channel, timeout=here.timeout).list(user=user)

    rows = [row(one) for one in with_server(here, act)]
    here.shown.many(SHAPE, rows)
    here.shown.next("broker delegation show ID" if rows else "broker delegation create --help")


@COMMAND.command("show")
@click.argument("delegation_id", metavar="ID")
def show(delegation_id: str) -> None:
    """Show one, as an operator."""
    from broker.cli.connections import with_server  # noqa: PLC0415 - imports gRPC
    from broker.client import Delegations  # noqa: PLC0415

    here = settings()
    found = with_server(here, lambda channel: Delegations(channel, timeout=here.timeout).get(delegation_id))
    here.shown.one(SHAPE, row(found), full=True)
    if found.state == "standing":
        here.shown.next(f"broker delegation revoke {delegation_id}")


@COMMAND.command("revoke")
@click.argument("delegation_id", metavar="[ID]", required=False)
@option("--user", default="", help="Disable this user instead: all that they gave ends, and nothing more is taken.")
@option("--reason", default="", help="For the record.")
def revoke(delegation_id: str | None, user: str, reason: str) -> None:
    """End a delegation with every task that was started on it; or disable a user, with all that they gave."""
    if bool(delegation_id) == bool(user):
        raise click.UsageError("name a delegation, or a user by --user")
    here = settings()
    what = f"the user {user}, and end all that they gave" if user else f"the delegation {delegation_id} and its tasks"
    here.confirm(f"Disable {what}?" if user else f"End {what}?")
    if here.dry_run:
        here.shown.talk(f"would {'disable' if user else 'end'} {what} (--dry-run)")
        return
    from broker.cli.connections import with_server  # noqa: PLC0415 - imports gRPC
    from broker.client import Delegations, Stops  # noqa: PLC0415

    if user:
        done = with_server(here, lambda channel: Stops(channel, timeout=here.timeout).disable(user, reason=reason))
        here.shown.one(STOPPED, {"kind": "user", "name": user, "tasks_ended": done.tasks_ended})
        here.shown.next(f"broker delegation allow --user {user}")
        return
    ended = with_server(
        here, lambda channel: Delegations(channel, timeout=here.timeout).revoke(delegation_id or "", reason=reason)
    )
    here.shown.one(SHAPE, row(ended))
    here.shown.next(f"broker task list --user {ended.user}")


@COMMAND.command("allow")
@option("--user", required=True, help="Who was disabled.")
@option("--reason", default="", help="For the record.")
def allow(user: str, reason: str) -> None:
    """Enable a user again whom an operator disabled. They sign in anew; what an identity provider said stays."""
    here = settings()
    if here.dry_run:
        here.shown.talk(f"would enable the user {user} (--dry-run)")
        return
    from broker.cli.connections import with_server  # noqa: PLC0415 - imports gRPC
    from broker.client import Stops  # noqa: PLC0415

    changed = with_server(here, lambda channel: Stops(channel, timeout=here.timeout).enable(user, reason=reason))
    here.shown.one(ENABLED, {"user": user, "changed": changed})
    if not changed:
        here.shown.talk("no operator had disabled this user")


def row(one: Any) -> dict[str, Any]:
    """Give a delegation's members."""
    from broker.spiffe import strictjson  # noqa: PLC0415 - imports cryptography

    return {
        "id": one.id,
        "user": one.user,
        "issuer": one.issuer,
        "client": one.client,
        "state": one.state,
        "agents": list(one.agents),
        "authorization_details": strictjson.loads(one.authorization_details.encode()),
        "purpose": one.purpose,
        "max_task_ttl": one.max_task_ttl,
        "max_hops": one.max_hops,
        "created_at": moment(one.created_at),
        "expires_at": moment(one.expires_at),
        "ended_at": moment(one.ended_at),
        "cause": one.cause,
    }
