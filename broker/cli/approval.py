"""``broker approval``: what waits for a person's yes, and what became of it. A person decides by their own token, an operator stops."""

from collections.abc import Callable, Iterator
from typing import Any

import click

from broker.cli.inputs import read_file
from broker.cli.options import LIFETIME, noun, option, settings
from broker.cli.output import Column, Format, Shape, moment

STATES = ("pending", "approved", "denied", "used", "withdrawn", "expired")
SHAPE = Shape(
    "approval",
    "approvals",
    (
        Column("id", "id"),
        Column("state", "state"),
        Column("user", "user"),
        Column("agent", "agent"),
        Column("audience", "audience"),
        Column("scope", "scope"),
        Column("expires", "expires_at"),
        Column("purpose", "purpose", wide=True),
        Column("task", "task", wide=True),
        Column("rules", "rules", wide=True),
        Column("decided by", "decided_by", wide=True),
        Column("reason", "reason", wide=True),
    ),
)
ONE = Shape(
    SHAPE.kind,
    SHAPE.plural,
    (
        Column("id", "id"),
        Column("state", "state"),
        Column("who", "agent"),
        Column("for", "user"),
        Column("of", "issuer"),
        Column("why", "purpose"),
        Column("where", "audience"),
        Column("what", "scope"),
        Column("in the call", "parameter_digest"),
        Column("wanted by", "rules"),
        Column("task", "task"),
        Column("asked", "created_at"),
        Column("decide until", "expires_at"),
        Column("decided", "decided_at"),
        Column("decided by", "decided_by"),
        Column("reason", "reason"),
        Column("good until", "approved_until"),
        Column("used", "used_at"),
    ),
)
"""One, as a person decides on it; what exactly it permits stands below, line by line."""

COMMAND = noun("approval", "What waits for a person's yes, and what became of it.")
_ID = click.argument("approval_id", metavar="ID")
_REASON = option("--reason", default="", help="For the record, and for who looks at it later.")
_WHOSE = "The token of the person who decides, by a file or standard input."
_TOKEN = option("--user-token-file", metavar="FILE|-", help=f"{_WHOSE} Default: you do, as an operator.")
_PEOPLE = frozenset({None, Format.TABLE, Format.WIDE})


@COMMAND.command("list")
@option("--state", type=click.Choice((*STATES, "all")), default="pending", help="In which state. Default: pending.")
@option("--user", default="", help="Only what is done for this user.")
@option("--task", default="", metavar="ID", help="Only those of this task.")
def list_(state: str, user: str, task: str) -> None:
    """List what waits for a person, or what became of it, as an operator."""
    from broker.cli.connections import with_server  # noqa: PLC0415 - imports gRPC
    from broker.client import Approvals  # noqa: PLC0415

    here = settings()
    wanted = "" if state == "all" else state

    async def act(channel: Any) -> Any:
        return await Approvals(channel, timeout=here.timeout).list(state=wanted, user=user, task=task)

    rows = [row(one) for one in with_server(here, act)]
    here.shown.many(SHAPE, rows)
    here.shown.next("broker approval show ID" if rows or state == "all" else "broker approval list --state all")


@COMMAND.command("show")
@_ID
def show(approval_id: str) -> None:
    """Show one: who wants what for whom, why, and until when it may be decided. As an operator."""
    from broker.cli.connections import with_server  # noqa: PLC0415 - imports gRPC
    from broker.client import Approvals  # noqa: PLC0415

    here = settings()
    members = row(with_server(here, lambda channel: Approvals(channel, timeout=here.timeout).get(approval_id)))
    here.shown.one(ONE, members)
    if here.shown.format in _PEOPLE:
        here.shown.lines(lines(members))
    if members["state"] == "pending":
        here.shown.next(f"broker approval approve {approval_id} --user-token-file -, or deny {approval_id}")


@COMMAND.command("approve")
@_ID
@option("--user-token-file", required=True, metavar="FILE|-", help=_WHOSE)
@_REASON
@option("--use-within", type=LIFETIME, default=0, help="How long the yes is good. Default: 5m; at most 1h.")
def approve(*, approval_id: str, user_token_file: str, reason: str, use_within: int) -> None:
    """Say yes for a person who has just signed in, with their own application's token: for one token, once."""
    here = settings()
    token = read_file(user_token_file, "the person's token")
    if here.dry_run:
        here.shown.talk(f"would approve {approval_id} (--dry-run)")
        return

    def act(approvals: Any) -> Any:
        return approvals.approve(approval_id, token, reason=reason, use_within=use_within)

    _change(act)
    here.shown.next(f"broker approval withdraw {approval_id} takes it back")


@COMMAND.command("deny")
@_ID
@_TOKEN
@_REASON
def deny(*, approval_id: str, user_token_file: str | None, reason: str) -> None:
    """Say no: for the person whose token it is, or as an operator. The agent is not granted it by this task."""
    here = settings()
    token = _token(user_token_file)
    here.confirm(f"Deny {approval_id}?")
    if here.dry_run:
        here.shown.talk(f"would deny {approval_id} (--dry-run)")
        return
    _change(lambda approvals: approvals.deny(approval_id, user_token=token, reason=reason))
    here.shown.next("broker approval list")


@COMMAND.command("withdraw")
@_ID
@_TOKEN
@_REASON
def withdraw(*, approval_id: str, user_token_file: str | None, reason: str) -> None:
    """Take back a yes: for the person whose token it is, or as an operator. A token that was issued on it dies."""
    here = settings()
    token = _token(user_token_file)
    here.confirm(f"Take back {approval_id}?")
    if here.dry_run:
        here.shown.talk(f"would take back {approval_id} (--dry-run)")
        return
    over = _change(lambda approvals: approvals.withdraw(approval_id, user_token=token, reason=reason))
    here.shown.next(f"broker task show {over.task}")


def row(one: Any) -> dict[str, Any]:
    """Give an approval's members."""
    from broker.spiffe import strictjson  # noqa: PLC0415 - imports cryptography

    return {
        "id": one.id,
        "state": one.state,
        "task": one.task,
        "agent": one.agent,
        "user": one.user,
        "issuer": one.issuer,
        "audience": one.audience,
        "authorization_details": strictjson.loads(one.authorization_details.encode()),
        "scope": one.scope,
        "purpose": one.purpose,
        "parameter_digest": one.parameter_digest or None,
        "rules": list(one.rules),
        "created_at": moment(one.created_at),
        "expires_at": moment(one.expires_at),
        "decided_at": moment(one.decided_at),
        "decided_by": one.decided_by or None,
        "reason": one.reason or None,
        "approved_until": moment(one.approved_until),
        "used_at": moment(one.used_at),
    }


def lines(members: dict[str, Any]) -> Iterator[str]:
    """Write what a yes permits for a person: every member of every detail, each limit on a line of its own."""
    for number, detail in enumerate(members["authorization_details"], 1):
        yield ""
        yield f"permits {number}"
        limits = detail.get("constraints", {})
        for name, value in (*((n, v) for n, v in detail.items() if n != "constraints"), *limits.items()):
            yield f"  {name}: {_value(value)}"


def _value(value: Any) -> str:
    from broker.spiffe import strictjson  # noqa: PLC0415 - imports cryptography

    if isinstance(value, list) and all(isinstance(one, str) for one in value):
        return ", ".join(value)
    return value if isinstance(value, str) else strictjson.canonical(value).decode()


def _token(file: str | None) -> str:
    return "" if file is None else read_file(file, "the person's token")


def _change(act: Callable[[Any], Any]) -> Any:
    from broker.cli.connections import with_server  # noqa: PLC0415 - imports gRPC
    from broker.client import Approvals  # noqa: PLC0415

    here = settings()
    changed = with_server(here, lambda channel: act(Approvals(channel, timeout=here.timeout)))
    here.shown.one(SHAPE, row(changed))
    return changed
