"""``broker agent``: run the node agent, ask one whether it serves, and administer those that the server knows."""

from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import click

from broker.cli import agent_filters
from broker.cli.options import DURATION, SPIFFE_ID, noun, option, settings
from broker.cli.output import EXIT_FAILED, EXIT_OK, Column, Shape, moment
from broker.cli.program import Ask, Load, Run, add_health, add_run

SHAPE = Shape(
    "agent",
    "agents",
    (
        Column("spiffe id", "spiffe_id"),
        Column("attestation", "attestation_type"),
        Column("expires", "x509_svid_expires_at"),
        Column("can reattest", "can_reattest"),
        Column("banned", "banned"),
        Column("version", "agent_version"),
        Column("serial", "x509_svid_serial_number", wide=True),
        Column("selectors", "selectors", wide=True),
    ),
    name="spiffe_id",
)
COUNT = Shape("agent_count", "agent_counts", (Column("agents", "count"),), name="count")
PURGED = Shape(
    "purged_agent",
    "purged_agents",
    (
        Column("spiffe id", "spiffe_id"),
        Column("expired", "x509_svid_expires_at"),
        Column("deleted", "deleted"),
        Column("error", "error"),
    ),
    name="spiffe_id",
)
EXPIRED_FOR: Final = 86400
"""Seconds, as in SPIRE."""
_NEVER: Final = datetime.max.replace(tzinfo=UTC)

COMMAND = noun("agent", "The node agent: one here, and all that the server knows.")


def _parts() -> tuple[Load, Run]:
    from broker.agent import program  # noqa: PLC0415 - the whole agent
    from broker.agent.settings import load  # noqa: PLC0415

    return load, program.run


def _ask() -> Ask:
    from broker.cli.connections import with_agent  # noqa: PLC0415 - imports gRPC

    return with_agent


add_run(COMMAND, "node agent", _parts)
add_health(COMMAND, "node agent on its workload socket", _ask)


# ---- what the server knows of its agents


@COMMAND.command("list")
@agent_filters.options
def list_(**given: Any) -> None:
    """List the agents that the server has attested."""
    wanted = agent_filters.message("ListAgentsRequest", given)
    from broker.cli.connections import with_server  # noqa: PLC0415 - imports gRPC
    from broker.client import Nodes  # noqa: PLC0415

    here = settings()
    found = with_server(here, lambda channel: Nodes(channel, timeout=here.timeout).list(wanted))
    here.shown.many(SHAPE, map(_row, found))
    here.shown.next("broker agent show SPIFFE-ID" if found else "broker join-token create")


@COMMAND.command("count")
@agent_filters.options
def count(**given: Any) -> None:
    """Count them."""
    wanted = agent_filters.message("CountAgentsRequest", given)
    from broker.cli.connections import with_server  # noqa: PLC0415 - imports gRPC
    from broker.client import Nodes  # noqa: PLC0415

    here = settings()
    number = with_server(here, lambda channel: Nodes(channel, timeout=here.timeout).count(wanted))
    if here.shown.format is None:
        here.shown.raw(str(number))
    else:
        here.shown.one(COUNT, {"count": number})
    here.shown.next("broker agent list" if number else "broker join-token create")


def _named(verb: Callable[..., None]) -> Callable[..., None]:
    verb = option("--spiffe-id", "named", spire=["spiffeID"], type=SPIFFE_ID, hidden=True)(verb)
    return click.argument("spiffe_id", metavar="SPIFFE-ID", type=SPIFFE_ID, required=False)(verb)


@COMMAND.command("show")
@_named
def show(spiffe_id: str | None, named: str | None) -> None:
    """Show one."""
    wanted = _one_id(spiffe_id, named)
    from broker.cli.connections import with_server  # noqa: PLC0415 - imports gRPC
    from broker.client import Nodes  # noqa: PLC0415

    here = settings()
    found = with_server(here, lambda channel: Nodes(channel, timeout=here.timeout).get(wanted))
    here.shown.one(SHAPE, _row(found), full=True)
    here.shown.next(f"broker entry list --parent-id {wanted}")


@COMMAND.command("ban")
@_named
def ban(spiffe_id: str | None, named: str | None) -> None:
    """Refuse an agent for good: it serves nobody from now on, and cannot attest again until it is evicted."""
    _end(_one_id(spiffe_id, named), "ban", "Ban the agent {}? Every workload of its node loses its identity.")


@COMMAND.command("evict")
@_named
def evict(spiffe_id: str | None, named: str | None) -> None:
    """Forget an agent: it serves nobody until it has attested again, which it may. Lifts a ban, too."""
    _end(_one_id(spiffe_id, named), "evict", "Evict the agent {}? Its node serves nobody until it attests again.")


def _end(agent_id: Any, act: str, question: str) -> None:
    here = settings()
    here.confirm(question.format(agent_id))
    if here.dry_run:
        here.shown.one(SHAPE, {"spiffe_id": str(agent_id)})
        here.shown.talk("nothing was sent (--dry-run)")
        return
    from broker.cli.connections import with_server  # noqa: PLC0415 - imports gRPC
    from broker.client import Nodes  # noqa: PLC0415

    with_server(here, lambda channel: getattr(Nodes(channel, timeout=here.timeout), act)(agent_id))
    if here.shown.format is not None:
        here.shown.one(SHAPE, {"spiffe_id": str(agent_id)})
    here.shown.talk(f"{'banned' if act == 'ban' else 'evicted'} {agent_id}")
    here.shown.next(f"broker agent {'show ' + str(agent_id) if act == 'ban' else 'list'}")


@COMMAND.command("purge")
@option(
    "--expired-for", spire=["expiredFor"], type=DURATION, default=EXPIRED_FOR,
    help="For how long the agent's SVID must have been over. Default: 24h.",
)  # fmt: skip
@option("--spire-dry-run", spire=["dryRun"], is_flag=True, hidden=True)
def purge(expired_for: int, spire_dry_run: bool) -> int:
    """Evict the agents that expired long ago and can attest again any time. Others, and banned ones, are kept.

    Exit code 1: one of them could not be evicted.
    """
    from broker.cli.connections import with_server  # noqa: PLC0415 - imports gRPC

    here = settings()
    here.dry_run = here.dry_run or spire_dry_run
    rows = with_server(here, lambda channel: _expired(channel, expired_for))
    if rows:
        here.confirm(f"Evict {len(rows)} expired agents?")
    if not here.dry_run:
        with_server(here, lambda channel: _evict_all(channel, rows))
    here.shown.many(PURGED, rows)
    if here.dry_run:
        here.shown.talk("nothing was evicted (--dry-run)")
    here.shown.next("broker agent list")
    return EXIT_FAILED if any(row["error"] for row in rows) else EXIT_OK


async def _expired(channel: Any, expired_for: int) -> Sequence[dict[str, Any]]:
    from broker.client import Nodes  # noqa: PLC0415 - imports gRPC
    from broker.clock import SystemClock  # noqa: PLC0415

    over = SystemClock().now() - timedelta(seconds=expired_for)
    given = {"can_reattest": True, "banned": False, "expires_before": over.isoformat(), "selectors": ()}
    wanted = agent_filters.message("ListAgentsRequest", given)
    # NOTE(security): looked at here, too. A server that does not know a filter passes over it, and every agent of such
    # a list would be evicted. A ban outlives the certificate: once forgotten, the agent could attest again.
    return [
        {"spiffe_id": row["spiffe_id"], "x509_svid_expires_at": ended, "deleted": False, "error": None}
        for row in map(_row, await Nodes(channel, timeout=settings().timeout).list(wanted))
        if row["can_reattest"] and not row["banned"] and (ended := row["x509_svid_expires_at"] or _NEVER) < over
    ]


async def _evict_all(channel: Any, rows: Sequence[dict[str, Any]]) -> None:
    from broker.client import Nodes  # noqa: PLC0415 - imports gRPC
    from broker.errors import BrokerError  # noqa: PLC0415
    from broker.spiffe import SpiffeId  # noqa: PLC0415

    nodes = Nodes(channel, timeout=settings().timeout)
    for row in rows:
        try:
            await nodes.evict(SpiffeId(row["spiffe_id"]))
        except BrokerError as error:
            row["error"] = error.message
        else:
            row["deleted"] = True


def _one_id(argument: str | None, named: str | None) -> Any:
    given = [one for one in (argument, named) if one]
    if len(given) != 1:
        raise click.UsageError("one SPIFFE ID is needed; broker agent list shows them", click.get_current_context())
    from broker.spiffe import SpiffeId  # noqa: PLC0415 - imports cryptography

    return SpiffeId(given[0])


def _row(agent: Any) -> dict[str, Any]:
    from broker.client.calls import spiffe_id_text  # noqa: PLC0415 - imports gRPC

    return {
        "spiffe_id": spiffe_id_text(agent.id),
        "attestation_type": agent.attestation_type,
        "x509_svid_serial_number": agent.x509svid_serial_number,
        "x509_svid_expires_at": moment(agent.x509svid_expires_at),
        "selectors": [f"{one.type}:{one.value}" for one in agent.selectors],
        "banned": agent.banned,
        "can_reattest": agent.can_reattest,
        "agent_version": agent.agent_version,
    }
