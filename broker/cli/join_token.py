"""``broker join-token``: one-time tokens by which a node proves itself the first time."""

from typing import Any

from broker.cli.options import DURATION, SPIFFE_ID, noun, option, settings
from broker.cli.output import Column, Shape, moment

DEFAULT_TTL = 600
"""Seconds, as in SPIRE."""

SHAPE = Shape(
    "join_token",
    "join_tokens",
    (Column("token", "token"), Column("expires", "expires_at"), Column("node alias", "spiffe_id")),
    name="token",
)

COMMAND = noun("join-token", "One-time tokens by which a node joins.")


@COMMAND.command("create")
@option(
    "--spiffe-id", spire=["spiffeID"], type=SPIFFE_ID, help="An extra identity of that node, to be entries' parent."
)
@option("--ttl", spire=["ttl"], type=DURATION, default=DEFAULT_TTL, help="How long it can be used. Default: 10m.")
def create(spiffe_id: str | None, ttl: int) -> None:
    """Create a token for one node. It is shown once."""
    here = settings()
    if here.dry_run:
        here.shown.one(SHAPE, {"token": None, "expires_at": None, "ttl": ttl, "spiffe_id": spiffe_id})
        here.shown.talk("nothing was sent (--dry-run)")
        return
    from broker.cli.connections import with_server  # noqa: PLC0415 - imports gRPC
    from broker.client import Nodes  # noqa: PLC0415
    from broker.spiffe import SpiffeId  # noqa: PLC0415

    alias = SpiffeId(spiffe_id) if spiffe_id else None

    async def act(channel: Any) -> Any:
        return await Nodes(channel, timeout=here.timeout).create_join_token(ttl=ttl, agent_id=alias)

    made = with_server(here, act)
    if here.shown.format is None:
        here.shown.raw(made.value)
        here.shown.talk(f"good for one node until {moment(made.expires_at)}")
    else:
        here.shown.one(SHAPE, {"token": made.value, "expires_at": moment(made.expires_at), "spiffe_id": spiffe_id})
    here.shown.next("put it into a file (0600) that [agent] join_token_file names, then: broker agent run")
