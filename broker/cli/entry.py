"""``broker entry``: which process gets which identity. The answer's members have SPIRE's names."""

from collections.abc import Callable
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from broker.cli import entry_apply, entry_filters
from broker.cli.entry_values import DEFAULTS, mask, message, row
from broker.cli.options import DURATION, SELECTOR, SPIFFE_ID, noun, option, settings
from broker.cli.output import Column, Shape

F = TypeVar("F", bound=Callable[..., Any])

SHAPE = Shape(
    "entry",
    "entries",
    (
        Column("id", "id"),
        Column("spiffe id", "spiffe_id"),
        Column("parent", "parent_id", wide=True),
        Column("selectors", "selectors"),
        Column("x509 ttl", "x509_svid_ttl", wide=True),
        Column("jwt ttl", "jwt_svid_ttl", wide=True),
        Column("dns names", "dns_names", wide=True),
        Column("audiences", "allowed_audiences", wide=True),
        Column("tasks", "may_start_tasks"),
        Column("hint", "hint", wide=True),
        Column("expires", "expires_at", wide=True),
        Column("revision", "revision_number", wide=True),
        Column("description", "description", wide=True),
        Column("owner", "owner", wide=True),
    ),
)

COUNT = Shape("count", "counts", (Column("entries", "count"),), name="count")

COMMAND = noun("entry", "Registration entries: which process gets which identity.")


def _members(command: F) -> F:
    """Add the options that say what an entry is, in SPIRE's spellings too."""
    for add in reversed(
        (
            option("--spiffe-id", spire=["spiffeID"], type=SPIFFE_ID, help="The identity to give."),
            option("--parent-id", spire=["parentID"], type=SPIFFE_ID, help="The node agent, or its alias."),
            option(
                "--selector", "selectors", spire=["selector"], type=SELECTOR, multiple=True, help="All must hold. Repeatable."
            ),
            option("--x509-svid-ttl", spire=["x509SVIDTTL"], type=DURATION, default=0, help="Default: the server's."),
            option("--jwt-svid-ttl", spire=["jwtSVIDTTL"], type=DURATION, default=0, help="Default: the server's."),
            option("--ttl", spire=["ttl"], type=DURATION, default=0, help="Both of them."),
            option("--dns-name", "dns_names", spire=["dns"], multiple=True, help="DNS name in the certificate. Repeatable."),
            option("--federates-with", spire=["federatesWith"], multiple=True, help="Trust domain whose bundle it gets."),
            option("--hint", spire=["hint"], default="", help="How a workload with several identities tells this one."),
            option("--expires-at", spire=["entryExpiry"], type=int, default=0, help="Seconds since 1970; 0: never."),
            option("--admin/--no-admin", spire=["admin"], default=False, help="May use the server's admin services."),
            option("--downstream/--no-downstream", spire=["downstream"], default=False, help="May be a server below this one."),
            option("--store-svid/--no-store-svid", spire=["storeSVID"], default=False, help="Is for a store, not for a process."),
            option(
                "--disable-x509-svid-prefetch/--no-disable-x509-svid-prefetch", spire=["disableX509SVIDPrefetch"],
                default=False, help="Its agent signs no X.509-SVID before one is asked for.",
            ),
            option(
                "--jwt-svid-include-jti/--no-jwt-svid-include-jti", spire=["jwtSVIDIncludeJTI"], default=False,
                help="Each JWT-SVID is a new one with its own jti.",
            ),
            option("--allowed-audience", "allowed_audiences", multiple=True, help="JWT-SVID audience it may ask for. Repeatable."),
            option("--may-start-tasks/--no-may-start-tasks", default=False, help="May start tasks for users."),
            option("--description", default="", help="For people."),
            option("--owner", default="", help="Whose it is: apply --prune deletes what the same owner no longer lists."),
        )
    ):  # fmt: skip
        command = add(command)
    return command


@COMMAND.command("create")
@_members
@option("--entry-id", "id", spire=["entryID"], default="", help="Your own id for the entry.")
@option("--node", spire=["node"], is_flag=True, help="Names nodes by their selectors: the parent is the server.")
@option("--data", spire=["data"], hidden=True, help="SPIRE's file of entries.")
def create(node: bool, data: str | None, **given: Any) -> None:
    """Create an entry."""
    if data is not None:
        entry_apply.create_all(data)
        return
    values = _values(given)
    if node and given["spiffe_id"] and not given["parent_id"]:
        values["parent_id"] = _server_of(given["spiffe_id"])
    for name, wanted in (("spiffe_id", "--spiffe-id"), ("parent_id", "--parent-id"), ("selectors", "--selector")):
        if not values.get(name):
            raise click.UsageError(f"Missing option '{wanted}'.", click.get_current_context())
    entry = message(values)
    here = settings()
    if here.dry_run:
        here.shown.one(SHAPE, row(entry))
        here.shown.talk("nothing was sent (--dry-run)")
        return
    from broker.cli.connections import with_server  # noqa: PLC0415 - imports gRPC
    from broker.client import Entries  # noqa: PLC0415

    made = with_server(here, lambda channel: Entries(channel, timeout=here.timeout).create(entry))
    here.shown.one(SHAPE, row(made))
    here.shown.next(f"broker entry show {made.entry.id}")


@COMMAND.command("update")
@click.argument("entry_id", metavar="ID", required=False)
@_members
@option("--entry-id", "named", spire=["entryID"], hidden=True)
@option(
    "--clear", multiple=True, type=click.Choice(sorted(name for name in DEFAULTS if name != "selectors")),
    help="A member to set back to its default. Repeatable.",
)  # fmt: skip
def update(entry_id: str | None, named: str | None, clear: tuple[str, ...], **given: Any) -> None:
    """Change what the options name of an entry, and nothing else. A repeatable option gives the whole list anew."""
    wanted = _one_id(entry_id, named)
    ctx = click.get_current_context()
    said = {name for name in given if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE}
    if "ttl" in said:
        said = (said - {"ttl"}) | {"x509_svid_ttl", "jwt_svid_ttl"}
    if said & set(clear):
        raise click.UsageError("what is cleared cannot be set at once", ctx)
    if not said and not clear:
        raise click.UsageError("nothing is to be changed; --help shows what can be", ctx)
    values = {name: value for name, value in _values(given).items() if name in said}
    entry = message({**values, "id": wanted})
    here = settings()
    if here.dry_run:
        here.shown.one(SHAPE, {"id": wanted, **{name: DEFAULTS[name] for name in clear}, **values}, full=True)
        here.shown.talk("nothing was sent (--dry-run)")
        return
    from broker.cli.connections import with_server  # noqa: PLC0415 - imports gRPC
    from broker.client import Entries  # noqa: PLC0415

    changed = with_server(
        here,
        lambda channel: Entries(channel, timeout=here.timeout).update(entry, mask(said | set(clear))),
    )
    here.shown.one(SHAPE, row(changed), full=True)
    here.shown.next(f"broker entry show {wanted}")


@COMMAND.command("list")
@entry_filters.options
def list_(**given: Any) -> None:
    """List the entries."""
    wanted = entry_filters.message(given)
    from broker.cli.connections import with_server  # noqa: PLC0415 - imports gRPC
    from broker.client import Entries  # noqa: PLC0415

    here = settings()
    found = with_server(here, lambda channel: Entries(channel, timeout=here.timeout).list(wanted))
    here.shown.many(SHAPE, [row(one) for one in found])
    here.shown.next("broker entry show ID" if found else "broker entry create --help")


@COMMAND.command("count")
@entry_filters.options
def count(**given: Any) -> None:
    """Count the entries."""
    wanted = entry_filters.message(given)
    from broker.cli.connections import with_server  # noqa: PLC0415 - imports gRPC
    from broker.client import Entries  # noqa: PLC0415

    here = settings()
    found = with_server(here, lambda channel: Entries(channel, timeout=here.timeout).count(wanted))
    if here.shown.format is None:
        here.shown.raw(str(found))
    else:
        here.shown.one(COUNT, {"count": found})


@COMMAND.command("show")
@click.argument("entry_id", metavar="ID", required=False)
@option("--entry-id", "named", spire=["entryID"], hidden=True)
def show(entry_id: str | None, named: str | None) -> None:
    """Show one entry."""
    wanted = _one_id(entry_id, named)
    from broker.cli.connections import with_server  # noqa: PLC0415 - imports gRPC
    from broker.client import Entries  # noqa: PLC0415

    here = settings()
    found = with_server(here, lambda channel: Entries(channel, timeout=here.timeout).get(wanted))
    here.shown.one(SHAPE, row(found), full=True)
    here.shown.next(f"broker entry delete {wanted}")


@COMMAND.command("delete")
@click.argument("entry_id", metavar="ID", required=False)
@option("--entry-id", "named", spire=["entryID"], hidden=True)
def delete(entry_id: str | None, named: str | None) -> None:
    """Delete an entry. What was issued by it is withdrawn, and its tasks end."""
    wanted = _one_id(entry_id, named)
    here = settings()
    here.confirm(f"Delete the entry {wanted}? Its identity is withdrawn at once.")
    if here.dry_run:
        here.shown.one(SHAPE, {"id": wanted})
        here.shown.talk("nothing was sent (--dry-run)")
        return
    from broker.cli.connections import with_server  # noqa: PLC0415 - imports gRPC
    from broker.client import Entries  # noqa: PLC0415

    with_server(here, lambda channel: Entries(channel, timeout=here.timeout).delete(wanted))
    if here.shown.format is not None:
        here.shown.one(SHAPE, {"id": wanted})
    here.shown.talk(f"deleted {wanted}")
    here.shown.next("broker entry list")


def _one_id(argument: str | None, named: str | None) -> str:
    given = [one for one in (argument, named) if one]
    if len(given) != 1:
        raise click.UsageError("one entry ID is needed; broker entry list shows them", click.get_current_context())
    return given[0]


def _values(given: dict[str, Any]) -> dict[str, Any]:
    values = {name: list(value) if isinstance(value, tuple) else value for name, value in given.items()}
    ttl = values.pop("ttl")
    for name in ("x509_svid_ttl", "jwt_svid_ttl"):
        values[name] = values[name] or ttl
    return values


def _server_of(spiffe_id: str) -> str:
    from broker.spiffe import SpiffeId  # noqa: PLC0415 - imports cryptography

    return f"spiffe://{SpiffeId(spiffe_id).trust_domain}/spire/server"


entry_apply.add(COMMAND)
