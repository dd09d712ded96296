"""``broker svid``: what the node agent gives to this very process; ``mint`` and ``revoke`` for operators. Holds nothing."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from broker.cli import svid_mint
from broker.cli.credential_files import CredentialDirectory, NewFile
from broker.cli.credential_formats import FORMATS, Fetched, google_failure
from broker.cli.inputs import read_token
from broker.cli.options import SPIFFE_ID, Settings, noun, option, settings
from broker.cli.output import EXIT_OK, Column, Shape, exit_code_of
from broker.cli.svid_revoke import revoke
from broker.cli.svid_texts import expiry_of, jwt_row, key_pem, pem, x509_row
from broker.cli.svid_watch import watch

X509 = Shape(
    "x509_svid",
    "x509_svids",
    (
        Column("spiffe id", "spiffe_id"),
        Column("not after", "not_after"),
        Column("hint", "hint"),
        Column("serial", "serial_number", wide=True),
        Column("x5t#S256", "x5t_s256", wide=True),
        Column("dns names", "dns_names", wide=True),
        Column("files", "files"),
    ),
    name="spiffe_id",
)
JWT = Shape(
    "jwt_svid",
    "jwt_svids",
    (Column("spiffe id", "spiffe_id"), Column("expires", "expires_at"), Column("hint", "hint"), Column("svid", "svid")),
    name="spiffe_id",
)
VALID = Shape(
    "jwt_svid_claims",
    "jwt_svid_claims",
    (Column("spiffe id", "spiffe_id"), Column("claims", "claims")),
    name="spiffe_id",
)

COMMAND = noun("svid", "This process's identity documents; minting and revoking others.")
COMMAND.add_command(revoke)
COMMAND.add_command(svid_mint.add(X509, JWT))
COMMAND.add_command(watch)


@COMMAND.command("x509")
@option(
    "--write", spire=["write"], type=click.Path(file_okay=False, path_type=Path), help="Write the files here, 0600."
)
def x509(write: Path | None) -> None:
    """Fetch this process's X.509-SVIDs. The private keys are written with --write, and never printed."""
    from broker._proto.service import ServiceBinding  # noqa: PLC0415 - imports gRPC
    from broker._proto.spiffe import workload_pb2  # noqa: PLC0415
    from broker.cli.connections import first_of, with_agent  # noqa: PLC0415
    from broker.spiffe.x509svid import split_der  # noqa: PLC0415

    here = settings()
    binding = ServiceBinding.of(workload_pb2.DESCRIPTOR, "SpiffeWorkloadAPI")

    async def act(channel: Any) -> Any:
        return await first_of(channel, binding, "FetchX509SVID", workload_pb2.X509SVIDRequest(), timeout=here.timeout)

    answer = with_agent(here, act)
    rows = [x509_row(svid.spiffe_id, split_der(svid.x509_svid), pem(svid.bundle), svid.hint) for svid in answer.svids]
    if write is not None and not here.dry_run:
        with CredentialDirectory.opened(write) as directory:
            for number, svid in enumerate(answer.svids):
                rows[number]["files"] = _write(directory, number, svid, rows[number])
    here.shown.many(X509, rows)
    here.shown.next(
        "broker svid jwt --audience A" if write else "broker svid x509 --write DIR saves them with their keys"
    )


@COMMAND.command("jwt")
@option("--audience", spire=["audience"], multiple=True, required=True, help="Whom the token is for. Repeatable.")
@option("--spiffe-id", spire=["spiffeID"], type=SPIFFE_ID, help="Which of this process's identities.")
@option("--hint", spire=["hint"], help="The identity with this hint.")
@option(
    "--format", "format_", type=click.Choice(["raw", "json", *FORMATS]), default="raw",
    help="The token alone, or the answer that another program's credential helpers give. Default: raw.",
)  # fmt: skip
def jwt(audience: tuple[str, ...], spiffe_id: str | None, hint: str | None, format_: str) -> int:
    """Fetch a JWT-SVID."""
    from broker.cli.output import Format  # noqa: PLC0415
    from broker.errors import BrokerError  # noqa: PLC0415

    here = settings()
    if format_ in FORMATS:
        here.shown.quiet = True  # what else is printed would be read as part of the answer
        try:
            svid = _fetch_jwt(here, audience, spiffe_id, hint)[0]
            fetched = Fetched(svid.spiffe_id, svid.svid, expiry_of(svid.svid))
            here.shown.raw(json.dumps(FORMATS[format_](fetched, os.environ)))
        except BrokerError as error:
            if format_ != "google-executable":
                raise
            here.shown.raw(google_failure(error))
            return exit_code_of(error)
        return EXIT_OK
    svids = _fetch_jwt(here, audience, spiffe_id, hint)
    if here.shown.format is None and format_ == "raw":
        here.shown.raw(svids[0].svid)
        return EXIT_OK
    if here.shown.format is None:
        here.shown.format = Format.JSON
    here.shown.many(JWT, [jwt_row(svid.spiffe_id, svid.svid, svid.hint) for svid in svids])
    return EXIT_OK


def _fetch_jwt(here: Settings, audience: Sequence[str], spiffe_id: str | None, hint: str | None) -> Sequence[Any]:
    """Give at least one; raises NoIdentity where there is none with this hint."""
    from broker._proto.service import ServiceBinding  # noqa: PLC0415 - imports gRPC
    from broker._proto.spiffe import workload_pb2  # noqa: PLC0415
    from broker.cli.connections import ask_agent, with_agent  # noqa: PLC0415
    from broker.errors import NoIdentity, Unavailable  # noqa: PLC0415

    binding = ServiceBinding.of(workload_pb2.DESCRIPTOR, "SpiffeWorkloadAPI")
    request = workload_pb2.JWTSVIDRequest(audience=list(audience), spiffe_id=spiffe_id or "")

    async def act(channel: Any) -> Any:
        return await ask_agent(channel, binding, "FetchJWTSVID", request, timeout=here.timeout)

    answer = with_agent(here, act)
    if not answer.svids:
        raise Unavailable("the agent answered with no JWT-SVID", code="empty_answer", hint="try again")
    found = [svid for svid in answer.svids if hint is None or svid.hint == hint]
    if not found:
        raise NoIdentity(f"no identity with the hint {hint!r}", hint="broker entry list shows the hints")
    return found


@COMMAND.command("validate")
@click.argument("token", default="-", metavar="[TOKEN|@FILE|-]")
@option("--audience", spire=["audience"], required=True, help="Whom the token must be for.")
@option("--svid", "named", spire=["svid"], hidden=True)
def validate(token: str, audience: str, named: str | None) -> None:
    """Let the node agent validate a JWT-SVID. Exit code 5: it is not valid."""
    from broker._proto.service import ServiceBinding  # noqa: PLC0415 - imports gRPC
    from broker._proto.spiffe import workload_pb2  # noqa: PLC0415
    from broker.cli.connections import ask_agent, with_agent  # noqa: PLC0415
    from broker.errors import Invalid, InvalidSvid  # noqa: PLC0415

    here = settings()
    text = read_token(named or token, "a JWT-SVID", here.shown)
    binding = ServiceBinding.of(workload_pb2.DESCRIPTOR, "SpiffeWorkloadAPI")
    request = workload_pb2.ValidateJWTSVIDRequest(audience=audience, svid=text)

    async def act(channel: Any) -> Any:
        return await ask_agent(channel, binding, "ValidateJWTSVID", request, timeout=here.timeout)

    try:
        answer = with_agent(here, act)
    except Invalid as error:
        raise InvalidSvid(error.message, code=error.reason, hint=error.hint or "ask its holder for a new one") from None
    here.shown.one(VALID, {"spiffe_id": answer.spiffe_id, "claims": _claims(answer.claims)})


def _claims(struct: Any) -> Any:
    from google.protobuf.json_format import MessageToDict  # noqa: PLC0415 - imports protobuf

    claims = MessageToDict(struct)
    # A Struct knows no whole numbers: dates come back as floats.
    return {k: int(v) if isinstance(v, float) and v.is_integer() else v for k, v in claims.items()}


def _write(directory: CredentialDirectory, number: int, svid: Any, row: Mapping[str, Any]) -> Sequence[str]:
    from cryptography.hazmat.primitives.serialization import load_der_private_key  # noqa: PLC0415 - slow to import

    # SPIRE's names, so that what reads its files reads ours.
    files = {
        f"svid.{number}.key": key_pem(load_der_private_key(svid.x509_svid_key, None)),
        f"svid.{number}.pem": row["certificates"].encode(),
        f"bundle.{number}.pem": row["bundle"].encode(),
    }
    return directory.write([NewFile(name, content, 0o600) for name, content in files.items()])
