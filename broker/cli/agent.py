"""``broker agent``: run the node agent, or ask one whether it serves."""

from broker.cli.options import noun
from broker.cli.program import Ask, Load, Run, add_health, add_run

COMMAND = noun("agent", "The node agent.")


def _parts() -> tuple[Load, Run]:
    from broker.agent import app  # noqa: PLC0415 - the whole agent
    from broker.agent.settings import load  # noqa: PLC0415

    return load, app.run


def _ask() -> Ask:
    from broker.cli.connections import with_agent  # noqa: PLC0415 - imports gRPC

    return with_agent


add_run(COMMAND, "node agent", _parts)
add_health(COMMAND, "node agent on its workload socket", _ask)
