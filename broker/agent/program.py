"""The agent as a process: signals, and one cause for its end."""

import asyncio
import signal
from contextlib import suppress
from typing import Final

from broker.agent.app import Agent
from broker.agent.settings import AgentSettings
from broker.errors import BrokerError
from broker.transport.hardening import harden, settle

ENDING: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # settings are read at the start: none says read again


def run(settings: AgentSettings) -> None:
    """Run an agent until SIGTERM, SIGINT or SIGHUP; raises BrokerError when it cannot start or may not join."""
    harden()
    try:
        asyncio.run(_run(settings))
    finally:
        for number in ENDING:  # the interpreter takes handlers away before it ends: one more signal would be its cause
            signal.signal(number, signal.SIG_IGN)


async def _run(settings: AgentSettings) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def told(number: int, frame: object) -> None:
        with suppress(RuntimeError):  # the loop is closed: it is ending already
            loop.call_soon_threadsafe(stop.set)

    # Not loop.add_signal_handler: what that sets goes with the loop, and a second signal would kill us on the way out.
    for number in ENDING:
        signal.signal(number, told)
    try:
        async with Agent(settings) as agent:
            settle()
            await agent.serve(stop)
    except BaseExceptionGroup as group:
        # One cause is enough to say what to do; the others follow from it.
        refusals, defects = group.split(BrokerError)
        if refusals is None or defects is not None:
            raise
        raise _first(refusals) from None


def _first(group: BaseExceptionGroup[BrokerError]) -> BrokerError:
    inner = group.exceptions[0]
    return _first(inner) if isinstance(inner, BaseExceptionGroup) else inner
