"""``broker bundle``: the trust domain's own bundle, and those of other trust domains. Members have SPIRE's names."""

from typing import Any

import click

from broker.cli.bundle_texts import FORMAT, PEM, bundle_row, read_bundle, write_bundle
from broker.cli.inputs import read_file
from broker.cli.options import TRUST_DOMAIN, Settings, noun, option, settings
from broker.cli.output import Column, Shape

SHAPE = Shape(
    "bundle",
    "bundles",
    (
        Column("trust domain", "trust_domain"),
        Column("x509", "x509_count"),
        Column("jwt", "jwt_count"),
        Column("sequence", "sequence_number"),
        Column("refresh hint", "refresh_hint"),
        Column("x509 authorities", "x509_authorities", wide=True),
        Column("jwt authorities", "jwt_authorities", wide=True),
    ),
    name="trust_domain",
)
MODES = ("restrict", "delete", "dissociate")

COMMAND = noun("bundle", "Trust bundles: the own, and those of other trust domains.")


@COMMAND.command("show")
@option("--format", "form", spire=["format"], type=FORMAT, default=PEM, help="pem (default) or spiffe.")
def show(form: str) -> None:
    """Show the own trust domain's bundle: what agents and other trust domains trust."""
    from broker.cli.connections import with_server  # noqa: PLC0415 - imports gRPC
    from broker.client import Bundles  # noqa: PLC0415

    here = settings()
    found = with_server(here, lambda channel: Bundles(channel, timeout=here.timeout).get())
    _print(here, [found], form, single=True)


@COMMAND.command("list")
@option("--trust-domain", "name", spire=["id"], type=TRUST_DOMAIN, help="Only this one.")
@option("--format", "form", spire=["format"], type=FORMAT, help="Print them whole: pem or spiffe.")
def list_(name: str | None, form: str | None) -> None:
    """List the bundles of other trust domains."""
    from broker.cli.connections import with_server  # noqa: PLC0415 - imports gRPC
    from broker.client import Bundles  # noqa: PLC0415

    here = settings()

    async def act(channel: Any) -> Any:
        bundles = Bundles(channel, timeout=here.timeout)
        return await bundles.list_federated() if name is None else [await bundles.get_federated(name)]

    _print(here, with_server(here, act), form)
    here.shown.next("broker bundle set --help")


@COMMAND.command("set")
@click.argument("trust_domain", metavar="TRUST-DOMAIN", type=TRUST_DOMAIN, required=False)
@option("--id", "named", spire=["id"], type=TRUST_DOMAIN, hidden=True)
@option("--path", spire=["path"], default="-", help="The bundle's file. Default: standard input.")
@option("--format", "form", spire=["format"], type=FORMAT, help="pem or spiffe. Default: seen from the text.")
def set_(trust_domain: str | None, named: str | None, path: str, form: str | None) -> None:
    """Set another trust domain's bundle, whatever was there before."""
    message = read_bundle(read_file(path, "the bundle"), form, one_name(trust_domain, named))
    here = settings()
    if here.dry_run:
        here.shown.one(SHAPE, bundle_row(message))
        here.shown.talk("nothing was sent (--dry-run)")
        return
    from broker.cli.connections import with_server  # noqa: PLC0415 - imports gRPC
    from broker.client import Bundles  # noqa: PLC0415

    made = with_server(here, lambda channel: Bundles(channel, timeout=here.timeout).set_federated(message))
    here.shown.one(SHAPE, bundle_row(made))
    here.shown.next(f"broker entry create --federates-with {made.trust_domain} …")


@COMMAND.command("delete")
@click.argument("trust_domain", metavar="TRUST-DOMAIN", type=TRUST_DOMAIN, required=False)
@option("--id", "named", spire=["id"], type=TRUST_DOMAIN, hidden=True)
@option(
    "--mode",
    spire=["mode"],
    type=click.Choice(MODES),
    default="restrict",
    help="With entries that federate with it: refuse (default), delete them, or take it out of them.",
)
def delete(trust_domain: str | None, named: str | None, mode: str) -> None:
    """Delete another trust domain's bundle. It is withdrawn from the workloads at once."""
    wanted = one_name(trust_domain, named)
    here = settings()
    here.confirm(f"Delete the bundle of {wanted} ({mode})? Nobody of it is trusted any more.")
    if here.dry_run:
        here.shown.one(SHAPE, {"trust_domain": wanted})
        here.shown.talk("nothing was sent (--dry-run)")
        return
    from broker.cli.connections import with_server  # noqa: PLC0415 - imports gRPC
    from broker.client import Bundles  # noqa: PLC0415

    with_server(here, lambda channel: Bundles(channel, timeout=here.timeout).delete_federated(wanted, mode))
    if here.shown.format is not None:
        here.shown.one(SHAPE, {"trust_domain": wanted})
    here.shown.talk(f"deleted the bundle of {wanted}")
    here.shown.next("broker bundle list")


@COMMAND.command("refresh")
@click.argument("trust_domain", metavar="TRUST-DOMAIN", type=TRUST_DOMAIN, required=False)
@option("--id", "named", spire=["id"], type=TRUST_DOMAIN, hidden=True)
def refresh(trust_domain: str | None, named: str | None) -> None:
    """Have the server fetch another trust domain's bundle now."""
    refresh_now(one_name(trust_domain, named))


def refresh_now(trust_domain: str) -> None:
    """Refresh one bundle and show it; for both nouns that can."""
    here = settings()
    if here.dry_run:
        here.shown.one(SHAPE, {"trust_domain": trust_domain})
        here.shown.talk("nothing was sent (--dry-run)")
        return
    from broker.cli.connections import with_server  # noqa: PLC0415 - imports gRPC
    from broker.client import Bundles, Relationships  # noqa: PLC0415

    async def act(channel: Any) -> Any:
        await Relationships(channel, timeout=here.timeout).refresh(trust_domain)
        return await Bundles(channel, timeout=here.timeout).get_federated(trust_domain)

    here.shown.one(SHAPE, bundle_row(with_server(here, act)))
    here.shown.next("broker bundle list")


def one_name(argument: str | None, named: str | None) -> str:
    """Give the one trust domain that was named, as an argument or in SPIRE's way."""
    given = [one for one in (argument, named) if one]
    if len(given) != 1:
        raise click.UsageError("one trust domain is needed", click.get_current_context())
    return given[0]


def _print(here: Settings, found: list[Any], form: str | None, *, single: bool = False) -> None:
    if here.shown.format is None and form is not None:
        for message in found:
            if not single:
                here.shown.talk(f"# {message.trust_domain}")
            here.shown.raw(write_bundle(message, form))
    elif single:
        here.shown.one(SHAPE, bundle_row(found[0]))
    else:
        here.shown.many(SHAPE, map(bundle_row, found))
