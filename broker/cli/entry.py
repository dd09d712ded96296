"""``broker entry``: which process gets which identity. The answer's members have SPIRE's names."""

from typing import Any

import click

from broker.cli.options import DURATION, SELECTOR, SPIFFE_ID, noun, option, settings
from broker.cli.output import Column, Shape, moment

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

COMMAND = noun("entry", "Registration entries: which process gets which identity.")


@COMMAND.command("create")
@option("--spiffe-id", spire=["spiffeID"], type=SPIFFE_ID, required=True, help="The identity to give.")
@option("--parent-id", spire=["parentID"], type=SPIFFE_ID, required=True, help="The node agent, or its alias.")
@option(
    "--selector", spire=["selector"], type=SELECTOR, multiple=True, required=True, help="All must hold. Repeatable."
)
@option("--x509-svid-ttl", spire=["x509SVIDTTL"], type=DURATION, default=0, help="Default: the server's.")
@option("--jwt-svid-ttl", spire=["jwtSVIDTTL"], type=DURATION, default=0, help="Default: the server's.")
@option("--ttl", spire=["ttl"], type=DURATION, default=0, help="Both of them.")
@option("--dns-name", "dns_names", spire=["dns"], multiple=True, help="DNS name in the certificate. Repeatable.")
@option("--federates-with", spire=["federatesWith"], multiple=True, help="Trust domain whose bundle it gets.")
@option("--hint", spire=["hint"], default="", help="How a workload with several identities tells this one.")
@option("--entry-id", spire=["entryID"], default="", help="Your own id for the entry.")
@option("--expires-at", spire=["entryExpiry"], type=int, default=0, help="Seconds since 1970; 0: never.")
@option("--admin", spire=["admin"], is_flag=True, help="May use the server's admin services.")
@option("--downstream", spire=["downstream"], is_flag=True, help="May be a server below this one.")
@option("--store-svid", spire=["storeSVID"], is_flag=True, help="Is for a store, not for a process.")
@option("--allowed-audience", "audiences", multiple=True, help="JWT-SVID audience it may ask for. Repeatable.")
@option("--may-start-tasks", is_flag=True, help="May start tasks for users.")
@option("--description", default="", help="For people.")
@option("--owner", default="", help="Whom to ask.")
def create(**given: Any) -> None:
    """Create an entry."""
    entry = _message(**given)
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


@COMMAND.command("list")
@option("--spiffe-id", spire=["spiffeID"], type=SPIFFE_ID, help="Only this identity.")
@option("--parent-id", spire=["parentID"], type=SPIFFE_ID, help="Only below this parent.")
@option("--selector", spire=["selector"], type=SELECTOR, multiple=True, help="Only entries that ask for it.")
def list_(spiffe_id: str | None, parent_id: str | None, selector: tuple[str, ...]) -> None:
    """List the entries."""
    from broker.cli.connections import with_server  # noqa: PLC0415 - imports gRPC
    from broker.client import Entries  # noqa: PLC0415

    here = settings()
    found = with_server(here, lambda channel: Entries(channel, timeout=here.timeout).list())
    rows = [
        one
        for one in map(row, found)
        if spiffe_id in {None, one["spiffe_id"]}
        and parent_id in {None, one["parent_id"]}
        and set(selector) <= set(one["selectors"])
    ]
    here.shown.many(SHAPE, rows)
    here.shown.next("broker entry show ID" if rows else "broker entry create --help")


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


def _message(
    *,
    spiffe_id: str,
    parent_id: str,
    selector: tuple[str, ...],
    x509_svid_ttl: int,
    jwt_svid_ttl: int,
    ttl: int,
    dns_names: tuple[str, ...],
    federates_with: tuple[str, ...],
    hint: str,
    entry_id: str,
    expires_at: int,
    admin: bool,
    downstream: bool,
    store_svid: bool,
    audiences: tuple[str, ...],
    may_start_tasks: bool,
    description: str,
    owner: str,
) -> Any:
    from broker._proto.broker.server.v1 import entries_pb2  # noqa: PLC0415 - imports protobuf
    from broker._proto.spire.api.types import entry_pb2, selector_pb2  # noqa: PLC0415
    from broker.client.calls import spiffe_id_message  # noqa: PLC0415
    from broker.spiffe import Selector, SpiffeId  # noqa: PLC0415

    parsed = [Selector(text) for text in selector]
    return entries_pb2.RegisteredEntry(
        entry=entry_pb2.Entry(
            id=entry_id,
            spiffe_id=spiffe_id_message(SpiffeId(spiffe_id)),
            parent_id=spiffe_id_message(SpiffeId(parent_id)),
            selectors=[selector_pb2.Selector(type=one.type, value=one.value) for one in parsed],
            x509_svid_ttl=x509_svid_ttl or ttl,
            jwt_svid_ttl=jwt_svid_ttl or ttl,
            federates_with=federates_with,
            admin=admin,
            downstream=downstream,
            expires_at=expires_at,
            dns_names=dns_names,
            store_svid=store_svid,
            hint=hint,
        ),
        allowed_audiences=audiences,
        may_start_tasks=may_start_tasks,
        description=description,
        owner=owner,
    )


def row(registered: Any) -> dict[str, Any]:
    """Give an entry's members, by SPIRE's names."""
    from broker.client.calls import spiffe_id_text  # noqa: PLC0415 - imports gRPC

    entry = registered.entry
    return {
        "id": entry.id,
        "spiffe_id": spiffe_id_text(entry.spiffe_id),
        "parent_id": spiffe_id_text(entry.parent_id),
        "selectors": [f"{one.type}:{one.value}" for one in entry.selectors],
        "x509_svid_ttl": entry.x509_svid_ttl,
        "jwt_svid_ttl": entry.jwt_svid_ttl,
        "federates_with": list(entry.federates_with),
        "admin": entry.admin,
        "downstream": entry.downstream,
        "expires_at": moment(entry.expires_at),
        "dns_names": list(entry.dns_names),
        "revision_number": entry.revision_number,
        "store_svid": entry.store_svid,
        "hint": entry.hint,
        "created_at": moment(entry.created_at),
        "allowed_audiences": list(registered.allowed_audiences),
        "may_start_tasks": registered.may_start_tasks,
        "description": registered.description,
        "owner": registered.owner,
    }
