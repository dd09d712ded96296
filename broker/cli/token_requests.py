"""``broker token exchange`` and ``broker token revoke``: the issuer's OAuth endpoints, as this process or with an SVID in files."""

from collections.abc import Mapping
from typing import Any

import click

from broker.cli.inputs import read_file, read_text, read_token
from broker.cli.options import SPIFFE_ID, Verb, option, settings
from broker.cli.output import Column, Shape

ISSUED = Shape(
    "issued_token",
    "issued_tokens",
    (
        Column("task", "task"),
        Column("type", "issued_token_type"),
        Column("scope", "scope"),
        Column("expires in", "expires_in"),
        Column("token", "access_token"),
    ),
    name="access_token",
)
REVOKED = Shape("revocation", "revocations", (Column("ended", "ended"),), name="ended")
URN = "urn:ietf:params:oauth:token-type:"
GRANT_TYPE = "urn:ietf:params:oauth:grant-type:token-exchange"
FILE = click.Path(dir_okay=False)


def svid_options(command: Any) -> Any:
    """Add the issuer, and where the SVID comes from."""
    for each in (
        option("--spiffe-id", type=SPIFFE_ID, default=None, help="Without --svid: which of this process's identities."),
        option("--bundle", envvar="BROKER_BUNDLE_FILE", help="With --svid: PEM roots of the server.", type=FILE),
        option("--svid-key", envvar="BROKER_SVID_KEY_FILE", help="With --svid: its PEM key.", type=FILE),
        option("--svid", envvar="BROKER_SVID_FILE", help="An X.509-SVID in a PEM file. Default: this process's.", type=FILE),
        option("--issuer", envvar="BROKER_ISSUER", required=True, metavar="URL", help="The broker, as its tokens name it."),
    ):  # fmt: skip
        command = each(command)
    return command


@click.command("exchange", cls=Verb)
@svid_options
@option("--subject-token-file", required=True, metavar="FILE|-", help="The user's token, or a task token.")
@option(
    "--subject-token-type",
    type=click.Choice(["jwt", "id_token", "access_token", "txn_token"]),
    default="jwt",
    help="What it is. Default: jwt.",
)
@option(
    "--requested-token-type",
    type=click.Choice(["access_token", "jwt", "txn_token", "id-jag"]),
    default="access_token",
    help="A task token (the default), a transaction token, or a grant for another server.",
)
@option("--resource", default=None, metavar="URI", help="The service that the token is for.")
@option("--audience", default=None, help="The trust domain, or the other server's issuer.")
@option("--scope", default=None, help="Actions.")
@option("--authorization-details", default=None, metavar="JSON|@FILE", help="What it may do (RFC 9396).")
@option("--task", default=None, metavar="ID", help="Another token of this running task.")
@option("--purpose", default=None, help="What a new task is for.")
@option("--idempotency-key", default=None, help="The same request under the same key gives the same token.")
def exchange(issuer: str, **asked: str | None) -> None:
    """Exchange a token at the issuer (RFC 8693).

    A task that this command starts is attached to the process whose SVID it shows: with its own, it ends with the command. Use
    broker task run for a task of a command, or --svid of a process that stays.
    """
    here = settings()
    subject = read_file(str(asked["subject_token_file"]), "the subject token")
    form = {
        "grant_type": GRANT_TYPE,
        "subject_token": subject,
        "subject_token_type": URN + str(asked["subject_token_type"]),
        "requested_token_type": URN + str(asked["requested_token_type"]),
    }
    for name in ("resource", "audience", "scope", "task", "purpose"):
        value = asked[name]
        if value is not None:
            form[name] = value
    details = asked["authorization_details"]
    if details is not None:
        form["authorization_details"] = read_text(details, "--authorization-details")
    if here.dry_run:
        here.shown.one(ISSUED, {name: value for name, value in form.items() if name != "subject_token"})
        here.shown.talk("nothing was sent (--dry-run)")
        return
    from broker.cli.oauth import Issuer, with_issuer  # noqa: PLC0415 - imports the SDK and httpx2

    key = asked["idempotency_key"]
    headers = {} if key is None else {"idempotency-key": key}

    async def act(found: Issuer) -> dict[str, Any]:
        return await found.post("token_endpoint", form, headers)

    issued = with_issuer(here, issuer, _presented(asked), act)
    here.shown.one(ISSUED, issued)
    if asked["svid"] is None and asked["task"] is None and issued.get("token_type") != "N_A":
        here.shown.talk("the task was started by this command, and ends with it: see broker task run")
    here.shown.next("broker token inspect -")


@click.command("revoke", cls=Verb)
@svid_options
@option("--end-task", is_flag=True, help="End its task too, with everything below it.")
@click.argument("token", default="-", metavar="[TOKEN|@FILE|-]")
def revoke(*, issuer: str, end_task: bool, token: str, **asked: str | None) -> None:
    """Give a token back (RFC 7009). It is the same answer for a token that is unknown, over, or another's."""
    here = settings()
    form = {"token": read_token(token, "a token", here.shown), "end": "task" if end_task else "token"}
    if here.dry_run:
        here.shown.one(REVOKED, {"ended": form["end"]})
        here.shown.talk("nothing was sent (--dry-run)")
        return
    from broker.cli.oauth import Issuer, with_issuer  # noqa: PLC0415 - imports the SDK and httpx2

    async def act(found: Issuer) -> dict[str, Any]:
        return await found.post("revocation_endpoint", form, {})

    with_issuer(here, issuer, _presented(asked), act)
    here.shown.one(REVOKED, {"ended": form["end"]})
    here.shown.talk(
        "where it was this identity's own: whoever follows the feed knows already, who introspects hears it next"
    )
    here.shown.talk(
        "the issuer answers the same for a token that is unknown or another's, and for a task of another process"
    )


def _presented(asked: Mapping[str, str | None]) -> Any:
    """Give what is presented: an SVID in files, or which of this process's own."""
    from broker.cli.oauth import SvidFiles  # noqa: PLC0415 - imports the SDK and httpx2
    from broker.errors import Invalid  # noqa: PLC0415

    svid, key, bundle = asked["svid"], asked["svid_key"], asked["bundle"]
    if svid is None:
        return asked["spiffe_id"] or ""
    if key is None or bundle is None:
        raise Invalid("--svid, --svid-key and --bundle come together", code="svid_files")
    return SvidFiles(svid, key, bundle)
