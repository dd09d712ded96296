"""``broker svid revoke``: an operator takes X.509-SVIDs back, over the server's admin socket or its TLS port."""

from typing import Any

import click

from broker.cli.options import SPIFFE_ID, Verb, option, settings
from broker.cli.output import Column, Shape, moment

SHAPE = Shape(
    "revocation",
    "revocations",
    (
        Column("revoked", "revoked"),
        Column("already", "already_revoked"),
        Column("sessions ended", "sessions_ended"),
        Column("tasks ended", "tasks_ended"),
        Column("svids", "svids", wide=True),
    ),
    name="revoked",
)
REASONS = {
    "unspecified": 0,
    "key-compromise": 1,
    "affiliation-changed": 3,
    "superseded": 4,
    "cessation-of-operation": 5,
    "privilege-withdrawn": 9,
}
"""RFC 5280, section 5.3.1, as far as it fits a leaf."""
_WORDS = {
    "serial": "the SVID with the serial number",
    "session_id": "what is held by the session",
    "entry_id": "every living X.509-SVID of the entry",
    "spiffe_id": "every living X.509-SVID of",
}


@click.command("revoke", cls=Verb)
@option("--serial", help="Serial number, hexadecimal, as openssl prints it.")
@option("--authority", help="With --serial: who signed it, by its key identifier. Needed if it is not known here.")
@option("--session", "session_id", help="What this workload session holds.")
@option("--entry", "entry_id", help="All of this registration entry.")
@option("--spiffe-id", spire=["spiffeID"], type=SPIFFE_ID, help="All of this identity.")
@option("--reason", type=click.Choice(list(REASONS)), default="unspecified", help="Stands on the revocation list.")
def revoke(authority: str | None, reason: str, **targets: str | None) -> None:
    """Revoke X.509-SVIDs at once. Their processes get new ones while an entry says so: delete it to end the identity."""
    chosen = {name: value for name, value in targets.items() if value}
    if len(chosen) != 1:
        raise click.UsageError("name one of --serial, --session, --entry, --spiffe-id")
    if authority and "serial" not in chosen:
        raise click.UsageError("--authority goes with --serial")
    ((what, value),) = chosen.items()
    here = settings()
    if here.dry_run:
        here.shown.talk(f"would revoke {_WORDS[what]} {value} (--dry-run)")
        return
    if what in {"entry_id", "spiffe_id"}:
        here.confirm(f"Revoke {_WORDS[what]} {value}?")
    from broker._proto.broker.server.v1 import revocations_pb2  # noqa: PLC0415 - imports protobuf
    from broker.cli.connections import with_server  # noqa: PLC0415 - imports gRPC
    from broker.client import Revocations  # noqa: PLC0415

    request = revocations_pb2.RevokeSvidsRequest(reason=revocations_pb2.RevocationReason.Name(REASONS[reason]))
    if what == "serial":
        request.serial.CopyFrom(revocations_pb2.SerialNumber(serial_number=value, authority=authority or ""))
    else:
        setattr(request, what, value)
    answer = with_server(here, lambda channel: Revocations(channel, timeout=here.timeout).revoke(request))
    here.shown.one(SHAPE, _row(answer))
    here.shown.next("broker entry delete ID keeps its processes from getting new ones")


def _row(answer: Any) -> dict[str, Any]:
    return {
        "revoked": answer.revoked,
        "already_revoked": answer.already_revoked,
        "sessions_ended": list(answer.sessions_ended),
        "tasks_ended": answer.tasks_ended,
        "svids": [
            {
                "serial_number": one.serial_number,
                "authority_id": one.authority_id,
                "spiffe_id": one.spiffe_id,
                "entry_id": one.entry_id,
                "expires_at": moment(one.expires_at),
            }
            for one in answer.svids
        ],
    }
