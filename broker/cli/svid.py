"""``broker svid``: what the node agent gives to this very process, and ``revoke`` for operators. Holds nothing."""

import hashlib
import os
import tempfile
from pathlib import Path
from typing import Any

import click

from broker.cli.inputs import read_token
from broker.cli.options import SPIFFE_ID, noun, option, settings
from broker.cli.output import Column, Shape, moment
from broker.cli.svid_revoke import revoke

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

COMMAND = noun("svid", "This process's identity documents; and revoking those of others.")
COMMAND.add_command(revoke)


@COMMAND.command("x509")
@option(
    "--write", spire=["write"], type=click.Path(file_okay=False, path_type=Path), help="Write the files here, 0600."
)
def x509(write: Path | None) -> None:
    """Fetch this process's X.509-SVIDs. The private keys are written with --write, and never printed."""
    from broker._proto.service import ServiceBinding  # noqa: PLC0415 - imports gRPC
    from broker._proto.spiffe import workload_pb2  # noqa: PLC0415
    from broker.cli.connections import first_of, with_agent  # noqa: PLC0415

    here = settings()
    binding = ServiceBinding.of(workload_pb2.DESCRIPTOR, "SpiffeWorkloadAPI")

    async def act(channel: Any) -> Any:
        return await first_of(channel, binding, "FetchX509SVID", workload_pb2.X509SVIDRequest(), timeout=here.timeout)

    answer = with_agent(here, act)
    rows = [_x509_row(svid) for svid in answer.svids]
    if write is not None and not here.dry_run:
        for number, svid in enumerate(answer.svids):
            rows[number]["files"] = _write(write, number, svid)
    here.shown.many(X509, rows)
    here.shown.next(
        "broker svid jwt --audience A" if write else "broker svid x509 --write DIR saves them with their keys"
    )


@COMMAND.command("jwt")
@option("--audience", spire=["audience"], multiple=True, required=True, help="Whom the token is for. Repeatable.")
@option("--spiffe-id", spire=["spiffeID"], type=SPIFFE_ID, help="Which of this process's identities.")
@option("--format", "format_", type=click.Choice(["raw", "json"]), default="raw", help="Default: the token alone.")
def jwt(audience: tuple[str, ...], spiffe_id: str | None, format_: str) -> None:
    """Fetch a JWT-SVID."""
    from broker._proto.service import ServiceBinding  # noqa: PLC0415 - imports gRPC
    from broker._proto.spiffe import workload_pb2  # noqa: PLC0415
    from broker.cli.connections import ask_agent, with_agent  # noqa: PLC0415
    from broker.cli.output import Format  # noqa: PLC0415
    from broker.errors import Unavailable  # noqa: PLC0415

    here = settings()
    binding = ServiceBinding.of(workload_pb2.DESCRIPTOR, "SpiffeWorkloadAPI")
    request = workload_pb2.JWTSVIDRequest(audience=list(audience), spiffe_id=spiffe_id or "")

    async def act(channel: Any) -> Any:
        return await ask_agent(channel, binding, "FetchJWTSVID", request, timeout=here.timeout)

    answer = with_agent(here, act)
    if not answer.svids:
        raise Unavailable("the agent answered with no JWT-SVID", code="empty_answer", hint="try again")
    if here.shown.format is None and format_ == "raw":
        here.shown.raw(answer.svids[0].svid)
        return
    if here.shown.format is None:
        here.shown.format = Format.JSON
    here.shown.many(JWT, [_jwt_row(svid) for svid in answer.svids])


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


def _x509_row(svid: Any) -> dict[str, Any]:
    from cryptography import x509 as certificates  # noqa: PLC0415 - slow to import

    from broker.spiffe.jose import b64url_encode  # noqa: PLC0415
    from broker.spiffe.x509svid import split_der  # noqa: PLC0415

    chain = split_der(svid.x509_svid)
    leaf = certificates.load_der_x509_certificate(chain[0])
    try:
        names = leaf.extensions.get_extension_for_class(certificates.SubjectAlternativeName).value
        dns_names = names.get_values_for_type(certificates.DNSName)
    except certificates.ExtensionNotFound:
        dns_names = []
    return {
        "spiffe_id": svid.spiffe_id,
        "not_before": leaf.not_valid_before_utc,
        "not_after": leaf.not_valid_after_utc,
        "serial_number": f"{leaf.serial_number:x}",
        "x5t_s256": b64url_encode(hashlib.sha256(chain[0]).digest()),
        "dns_names": dns_names,
        "hint": svid.hint,
        "certificates": _pem(svid.x509_svid),
        "bundle": _pem(svid.bundle),
        "files": [],
    }


def _jwt_row(svid: Any) -> dict[str, Any]:
    from broker.spiffe.jose import numeric_date, parse_compact  # noqa: PLC0415 - imports cryptography

    expires = numeric_date(parse_compact(svid.svid).payload, "exp", required=True)
    return {"spiffe_id": svid.spiffe_id, "expires_at": moment(expires), "hint": svid.hint, "svid": svid.svid}


def _pem(der: bytes) -> str:
    from cryptography import x509 as certificates  # noqa: PLC0415 - slow to import
    from cryptography.hazmat.primitives.serialization import Encoding  # noqa: PLC0415

    from broker.spiffe.x509svid import split_der  # noqa: PLC0415

    loaded = [certificates.load_der_x509_certificate(one) for one in split_der(der)]
    return "".join(one.public_bytes(Encoding.PEM).decode() for one in loaded)


def _write(directory: Path, number: int, svid: Any) -> list[str]:
    from cryptography.hazmat.primitives.serialization import (  # noqa: PLC0415 - slow to import
        Encoding,
        NoEncryption,
        PrivateFormat,
        load_der_private_key,
    )

    key = load_der_private_key(svid.x509_svid_key, None)
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    # SPIRE's names, so that what reads its files reads ours.
    files = {
        f"svid.{number}.key": pem,
        f"svid.{number}.pem": _pem(svid.x509_svid).encode(),
        f"bundle.{number}.pem": _pem(svid.bundle).encode(),
    }
    for name, data in files.items():
        _replace(directory / name, data)
    return [str(directory / name) for name in files]


def _replace(path: Path, data: bytes) -> None:
    """Put a whole file in place, 0600 from its first byte: a reader sees the old one or the new one."""
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
