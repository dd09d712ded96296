"""``broker federation``: where the bundles of other trust domains come from. Members have SPIRE's names."""

import json
from collections.abc import Callable
from typing import Any, Final

import click

from broker.cli.bundle import one_name, refresh_now
from broker.cli.bundle_texts import FORMAT, read_bundle
from broker.cli.inputs import read_file
from broker.cli.options import SPIFFE_ID, TRUST_DOMAIN, noun, option, settings
from broker.cli.output import Column, Shape
from broker.errors import Invalid

PROFILES: Final = ("https_web", "https_spiffe")
SHAPE = Shape(
    "federation_relationship",
    "federation_relationships",
    (
        Column("trust domain", "trust_domain"),
        Column("bundle endpoint", "bundle_endpoint_url"),
        Column("profile", "bundle_endpoint_profile"),
        Column("endpoint id", "endpoint_spiffe_id"),
        Column("bundle sequence", "bundle_sequence_number"),
    ),
    name="trust_domain",
)

COMMAND = noun("federation", "Relationships with other trust domains.")


def _fields(command: Callable[..., None]) -> Callable[..., None]:
    for decorate in reversed(
        (
            option("--trust-domain", spire=["trustDomain"], type=TRUST_DOMAIN, help="The other trust domain."),
            option("--bundle-endpoint-url", "url", spire=["bundleEndpointURL"], help="Where its bundle is, by https."),
            option(
                "--bundle-endpoint-profile",
                "profile",
                spire=["bundleEndpointProfile"],
                type=click.Choice(PROFILES),
                help="How that place is authenticated.",
            ),
            option(
                "--endpoint-spiffe-id",
                spire=["endpointSpiffeID"],
                type=SPIFFE_ID,
                help="https_spiffe: whom it must be.",
            ),
            option("--trust-domain-bundle-path", "path", spire=["trustDomainBundlePath"], help="Its bundle, to begin."),
            option(
                "--trust-domain-bundle-format",
                "form",
                spire=["trustDomainBundleFormat"],
                type=FORMAT,
                help="pem or spiffe. Default: seen from the text.",
            ),
            option("--data", spire=["data"], help="A file of relationships as JSON, in SPIRE's form; - is input."),
        )
    ):
        command = decorate(command)
    return command


@COMMAND.command("create")
@_fields
def create(**given: Any) -> None:
    """Federate with another trust domain: its bundle is fetched now and from then on."""
    _send("create", _relationships(**given))


@COMMAND.command("update")
@_fields
def update(**given: Any) -> None:
    """Replace a relationship; its bundle is kept, unless one is given."""
    _send("update", _relationships(**given))


@COMMAND.command("list")
def list_() -> None:
    """List the relationships that were made by command; those of the server's settings are not among them."""
    from broker.cli.connections import with_server  # noqa: PLC0415 - imports gRPC
    from broker.client import Relationships  # noqa: PLC0415

    here = settings()
    found = with_server(here, lambda channel: Relationships(channel, timeout=here.timeout).list())
    here.shown.many(SHAPE, map(row, found))
    here.shown.next("broker federation show TRUST-DOMAIN" if found else "broker federation create --help")


@COMMAND.command("show")
@click.argument("trust_domain", metavar="TRUST-DOMAIN", type=TRUST_DOMAIN, required=False)
@option("--trust-domain", "named", spire=["trustDomain"], type=TRUST_DOMAIN, hidden=True)
def show(trust_domain: str | None, named: str | None) -> None:
    """Show one relationship."""
    wanted = one_name(trust_domain, named)
    from broker.cli.connections import with_server  # noqa: PLC0415 - imports gRPC
    from broker.client import Relationships  # noqa: PLC0415

    here = settings()
    found = with_server(here, lambda channel: Relationships(channel, timeout=here.timeout).get(wanted))
    here.shown.one(SHAPE, row(found), full=True)
    here.shown.next(f"broker federation refresh {wanted}")


@COMMAND.command("delete")
@click.argument("trust_domain", metavar="TRUST-DOMAIN", type=TRUST_DOMAIN, required=False)
@option("--id", "named", spire=["id"], type=TRUST_DOMAIN, hidden=True)
def delete(trust_domain: str | None, named: str | None) -> None:
    """End a relationship. The bundle that it brought is withdrawn from the workloads at once."""
    wanted = one_name(trust_domain, named)
    here = settings()
    here.confirm(f"End the relationship with {wanted}? Nobody of it is trusted any more.")
    if here.dry_run:
        here.shown.one(SHAPE, {"trust_domain": wanted})
        here.shown.talk("nothing was sent (--dry-run)")
        return
    from broker.cli.connections import with_server  # noqa: PLC0415 - imports gRPC
    from broker.client import Relationships  # noqa: PLC0415

    with_server(here, lambda channel: Relationships(channel, timeout=here.timeout).delete(wanted))
    if here.shown.format is not None:
        here.shown.one(SHAPE, {"trust_domain": wanted})
    here.shown.talk(f"deleted the relationship with {wanted}")
    here.shown.next("broker federation list")


@COMMAND.command("refresh")
@click.argument("trust_domain", metavar="TRUST-DOMAIN", type=TRUST_DOMAIN, required=False)
@option("--id", "named", spire=["id"], type=TRUST_DOMAIN, hidden=True)
def refresh(trust_domain: str | None, named: str | None) -> None:
    """Fetch the other trust domain's bundle now."""
    refresh_now(one_name(trust_domain, named))


def _send(verb: str, relationships: list[Any]) -> None:
    here = settings()
    if here.dry_run:
        here.shown.many(SHAPE, map(row, relationships))
        here.shown.talk("nothing was sent (--dry-run)")
        return
    from broker.cli.connections import with_server  # noqa: PLC0415 - imports gRPC
    from broker.client import Relationships  # noqa: PLC0415

    async def act(channel: Any) -> Any:
        client = Relationships(channel, timeout=here.timeout)
        return await (client.create(relationships) if verb == "create" else client.update(relationships))

    made = with_server(here, act)
    if len(made) == 1:
        here.shown.one(SHAPE, row(made[0]), full=True)
    else:
        here.shown.many(SHAPE, map(row, made))
    here.shown.next(f"broker federation refresh {made[0].trust_domain}" if made else "broker federation list")


def _relationships(*, data: str | None, **fields: Any) -> list[Any]:
    if data is None:
        return [_relationship(**fields)]
    if any(fields.values()):
        raise click.UsageError("--data stands alone: the file says everything", click.get_current_context())
    return [_of_members(members) for members in _read_data(data)]


def _read_data(data: str) -> list[dict[str, Any]]:
    from broker.spiffe import strictjson  # noqa: PLC0415 - imports cryptography

    # NOTE(security): a bundle stands within: a name that is there twice would be one bundle here and another elsewhere.
    document: Any = strictjson.loads(read_file(data, "the relationships").encode())
    listed = document.get("federationRelationships") if isinstance(document, dict) else None
    if not isinstance(listed, list) or not all(isinstance(one, dict) for one in listed):
        raise Invalid("the file is not a JSON object with a list federationRelationships", code="invalid_data")
    return listed


def _of_members(members: dict[str, Any]) -> Any:
    known = {
        "trustDomain": "trust_domain",
        "bundleEndpointURL": "url",
        "bundleEndpointProfile": "profile",
        "endpointSPIFFEID": "endpoint_spiffe_id",
        "trustDomainBundleFormat": "form",
        "trustDomainBundle": "bundle",
    }
    unknown = members.keys() - known.keys()
    if unknown:
        raise Invalid(f"a relationship of the file has a member that is not known: {min(unknown)}", code="invalid_data")
    given: dict[str, Any] = {known[name]: value for name, value in members.items()}
    if not all(isinstance(value, str) for name, value in given.items() if name != "bundle"):
        raise Invalid("a member of a relationship of the file is not text", code="invalid_data")
    if "bundle" in given and not isinstance(given["bundle"], str):
        given["bundle"] = json.dumps(given["bundle"])
    return _relationship(**given)


def _relationship(
    *,
    trust_domain: str | None = None,
    url: str | None = None,
    profile: str | None = None,
    endpoint_spiffe_id: str | None = None,
    path: str | None = None,
    form: str | None = None,
    bundle: str | None = None,
) -> Any:
    from broker._proto.spire.api.types import federationrelationship_pb2  # noqa: PLC0415 - imports protobuf

    missing = [
        name
        for name, value in (
            ("--trust-domain", trust_domain),
            ("--bundle-endpoint-url", url),
            ("--bundle-endpoint-profile", profile),
            ("--endpoint-spiffe-id", endpoint_spiffe_id or profile != "https_spiffe"),
        )
        if not value
    ]
    if missing or trust_domain is None:
        # Nothing of a relationship is inferred: SPIFFE Federation §5.1.
        raise Invalid(f"the relationship lacks {', '.join(missing)}", code="relationship_incomplete")
    if profile not in PROFILES:
        raise Invalid(f"the profile is one of {', '.join(PROFILES)}", code="bundle_endpoint_profile")
    message = federationrelationship_pb2.FederationRelationship(
        trust_domain=trust_domain, bundle_endpoint_url=url or ""
    )
    if profile == "https_spiffe":
        message.https_spiffe.endpoint_spiffe_id = endpoint_spiffe_id or ""
    else:
        message.https_web.SetInParent()
    text = read_file(path, "the bundle") if path else bundle
    if text is not None:
        message.trust_domain_bundle.CopyFrom(read_bundle(text, form, trust_domain))
    return message


def row(message: Any) -> dict[str, Any]:
    """Give a relationship's members, by SPIRE's names."""
    is_spiffe = message.WhichOneof("bundle_endpoint_profile") == "https_spiffe"
    has_bundle = message.HasField("trust_domain_bundle")
    return {
        "trust_domain": message.trust_domain,
        "bundle_endpoint_url": message.bundle_endpoint_url,
        "bundle_endpoint_profile": message.WhichOneof("bundle_endpoint_profile"),
        "endpoint_spiffe_id": message.https_spiffe.endpoint_spiffe_id if is_spiffe else None,
        "bundle_sequence_number": message.trust_domain_bundle.sequence_number if has_bundle else None,
    }
