"""``broker server``: run the server, or ask one whether it serves."""

from broker.cli.options import noun
from broker.cli.program import Ask, Load, Run, add_health, add_run

COMMAND = noun("server", "The server.")


def _parts() -> tuple[Load, Run]:
    import asyncio  # noqa: PLC0415

    from broker.server import app  # noqa: PLC0415 - the whole server
    from broker.server.settings import load  # noqa: PLC0415

    return load, lambda chosen: asyncio.run(app.run(chosen))


def _ask() -> Ask:
    from broker.cli.connections import with_server  # noqa: PLC0415 - imports gRPC

    return with_server


add_run(COMMAND, "server", _parts)
add_health(COMMAND, "server on its admin socket", _ask)
