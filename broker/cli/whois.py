"""``broker whois PID``: the live sessions of a process, and the identities it holds. Asks on the agent's admin socket."""

from typing import Any

import click

from broker.cli.options import Verb, settings
from broker.cli.output import Column, Shape, moment

SESSION = Shape(
    "workload_identity",
    "workload_identities",
    (
        Column("pid", "pid"),
        Column("spiffe id", "spiffe_id"),
        Column("entry", "entry_id"),
        Column("x509 not after", "x509_not_after"),
        Column("jwts", "jwt_svids"),
        Column("session", "session_id", wide=True),
        Column("executable", "executable", wide=True),
        Column("connections", "connections", wide=True),
    ),
    name="spiffe_id",
)


@click.command("whois", cls=Verb)
@click.argument("pid", type=click.IntRange(1, 2**31 - 1))
def COMMAND(pid: int) -> None:  # noqa: N802 - the name that the tree looks for
    """Show the identities that a process of this node holds now. Exit code 3: it has not asked for any."""
    from broker._proto.broker.agent.v1 import admin_pb2  # noqa: PLC0415 - imports protobuf
    from broker.cli.connections import ask_agent_admin  # noqa: PLC0415
    from broker.cli.explanations import process_row, strong  # noqa: PLC0415

    here = settings()
    told = ask_agent_admin(here, "FindSessions", admin_pb2.FindSessionsRequest(pid=pid))
    rows: list[dict[str, object]] = []
    for session in told.sessions:
        common = {
            **process_row(session.process),
            "connections": session.connections,
            "selectors": strong(session.selectors, session.strengths),
        }
        # A process that was attested and has nothing is an answer, too.
        rows += [common | _held(one) for one in session.identities or (admin_pb2.Identity(),)]
    here.shown.many(SESSION, rows)
    here.shown.next(f"broker explain identity --pid {pid}")


def _held(identity: Any) -> dict[str, object]:
    return {
        "spiffe_id": identity.spiffe_id or None,
        "entry_id": identity.entry_id or None,
        "session_id": identity.session_id or None,
        "x509_not_after": moment(identity.x509_not_after),
        "shared": identity.is_shared,
        "jwt_svids": identity.jwt_svids,
    }
