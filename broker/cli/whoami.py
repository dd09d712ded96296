"""``broker whoami``: which identities the node agent gives to this very process. It is told no reasons; nobody is."""

import click

from broker.cli.options import Verb, settings
from broker.cli.output import Column, Shape

WHOAMI = Shape(
    "identity",
    "identities",
    (
        Column("spiffe id", "spiffe_id"),
        Column("not after", "not_after"),
        Column("hint", "hint"),
        Column("x5t#S256", "x5t_s256", wide=True),
    ),
    name="spiffe_id",
)


@click.command("whoami", cls=Verb)
def COMMAND() -> None:  # noqa: N802 - the name that the tree looks for
    """Show the identities of this very process. Exit code 4: it has none."""
    from broker._proto.service import ServiceBinding  # noqa: PLC0415 - imports gRPC
    from broker._proto.spiffe import workload_pb2  # noqa: PLC0415
    from broker.cli.connections import first_of, with_agent  # noqa: PLC0415

    here = settings()
    binding = ServiceBinding.of(workload_pb2.DESCRIPTOR, "SpiffeWorkloadAPI")
    answer = with_agent(
        here,
        lambda channel: first_of(
            channel, binding, "FetchX509SVID", workload_pb2.X509SVIDRequest(), timeout=here.timeout
        ),
    )
    here.shown.many(WHOAMI, [_row(svid.spiffe_id, svid.hint, svid.x509_svid) for svid in answer.svids])


def _row(spiffe_id: str, hint: str, chain: bytes) -> dict[str, object]:
    import hashlib  # noqa: PLC0415

    from cryptography import x509  # noqa: PLC0415 - slow to import

    from broker.spiffe.jose import b64url_encode  # noqa: PLC0415
    from broker.spiffe.x509svid import split_der  # noqa: PLC0415

    leaf = split_der(chain)[0]
    return {
        "spiffe_id": spiffe_id,
        "not_after": x509.load_der_x509_certificate(leaf).not_valid_after_utc,
        "hint": hint,
        "x5t_s256": b64url_encode(hashlib.sha256(leaf).digest()),
    }
