"""``broker authority``: the keys that sign, and their rotation by hand. Below it stands one noun per kind."""

from collections.abc import Awaitable, Callable
from typing import Any, Final

import click

from broker.cli.options import Noun, noun, option, settings
from broker.cli.output import Column, Shape, moment
from broker.errors import Invalid

SHAPE: Final = Shape(
    "authority",
    "authorities",
    (
        Column("id", "id"),
        Column("state", "state"),
        Column("tainted", "tainted"),
        Column("here", "local"),
        Column("begins", "not_before", wide=True),
        Column("ends", "not_after"),
        Column("replica", "replica", wide=True),
        Column("upstream", "upstream", wide=True),
    ),
)
_STATES: Final = {1: "prepared", 2: "active", 3: "old"}
_WORDS: Final = {"x509": "X.509 authorities", "jwt": "JWT authorities", "task": "keys of task tokens"}

COMMAND = noun("authority", "The keys that sign: seen, and rotated by hand.")


def row(authority: Any) -> dict[str, object]:
    """Give the members that are shown of a message."""
    return {
        "id": authority.id,
        "state": _STATES.get(authority.state, "unknown"),
        "tainted": authority.tainted,
        "local": authority.is_local,
        "not_before": moment(authority.not_before),
        "not_after": moment(authority.not_after),
        "replica": authority.replica,
        "upstream": authority.upstream or None,
    }


def _call(act: Callable[[Any], Awaitable[Any]]) -> Any:
    from broker.cli.connections import with_server  # noqa: PLC0415 - imports gRPC
    from broker.client import Authorities  # noqa: PLC0415

    here = settings()

    async def over(channel: Any) -> Any:
        return await act(Authorities(channel, timeout=here.timeout))

    return with_server(here, over)


def _below(kind: str) -> Noun:
    below = noun(kind, f"The {_WORDS[kind]}.")

    @below.command("show")
    def show() -> None:
        """Show them all, oldest first: of every replica, in every state."""
        found = _call(lambda client: client.list(kind))
        settings().shown.many(SHAPE, [row(one) for one in found])
        settings().shown.next(f"broker authority {kind} prepare")

    @below.command("prepare")
    def prepare() -> None:
        """Make a successor and publish it; nothing is signed with it yet."""
        if _is_dry():
            return
        made = _call(lambda client: client.prepare(kind))
        settings().shown.one(SHAPE, row(made))
        settings().shown.next(f"broker authority {kind} activate {made.id}")

    _change(below, kind, "activate", "Sign with the prepared one from now on; the active one becomes old.")
    _change(below, kind, "taint", "Have everything that an old one signed replaced at once.")
    _change(below, kind, "revoke", "Accept nothing any more that a tainted one signed.")
    return below


def _change(below: Noun, kind: str, verb: str, help: str) -> None:  # noqa: A002 - click's own name
    def act(authority_id: str | None, named: str | None, *, upstream: bool = False) -> None:
        wanted = _one_id(authority_id, named)
        here = settings()
        if verb == "revoke":
            here.confirm(f"Revoke {wanted}? What it signed is refused everywhere, at once and for ever.")
        if _is_dry():
            return
        if upstream:
            key_id = _call(lambda client: getattr(client, f"{verb}_upstream")(wanted))
            here.shown.talk(f"{verb}: {key_id}")
        else:
            changed = _call(lambda client: getattr(client, verb)(kind, wanted))
            here.shown.one(SHAPE, row(changed))
        here.shown.next(_after(kind, verb, wanted, "--upstream " if upstream else ""))

    decorated: Any = act
    if kind == "x509" and verb != "activate":
        decorated = option("--upstream", is_flag=True, help="It is a root above the server, by its key identifier.")(
            act
        )
    decorated = option("--authority-id", "named", spire=["authorityID", "subjectKeyID"], help="The same as ID.")(
        decorated
    )
    decorated = click.argument("authority_id", metavar="ID", required=False)(decorated)
    below.command(verb, help=help)(decorated)


def _after(kind: str, verb: str, wanted: str, flag: str) -> str:
    if verb == "taint":
        return f"broker authority {kind} revoke {flag}{wanted}, when every agent has had time to replace what it signed"
    return f"broker authority {kind} show"


def _is_dry() -> bool:
    if settings().dry_run:
        settings().shown.talk("nothing was sent (--dry-run)")
    return settings().dry_run


def _one_id(positional: str | None, named: str | None) -> str:
    if bool(positional) == bool(named):
        raise Invalid("name one authority", code="authority_unnamed", hint="broker authority x509 show lists them")
    return positional or named or ""


for _kind in _WORDS:
    COMMAND.add_command(_below(_kind))
