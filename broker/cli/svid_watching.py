"""Watching: the files of a plan are kept, and who reads them is told, until a signal or the program's own end.

Ties :mod:`broker.cli.svid_keeping` to :mod:`broker.cli.svid_reload`. Knows nothing of options.
"""

import asyncio
import signal
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from broker.cli.connections import agent_channel
from broker.cli.credential_files import CredentialDirectory
from broker.cli.options import Settings
from broker.cli.output import EXIT_INTERRUPTED, EXIT_OK
from broker.cli.svid_health import health_port
from broker.cli.svid_keeping import JWT, RETRY_MOST, Keeping, Wanted
from broker.cli.svid_reload import Reload, ReloadPlan
from broker.clock import SystemClock
from broker.errors import BrokerError, Unavailable
from broker.sdk import background

AGENT_AGAIN: Final = 1.0
"""Seconds until a node agent that is not there is looked for again, doubling: it may be started after this."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchPlan:
    """What is kept where, who is told, and whether once."""

    directory: Path
    wanted: Wanted
    reload: ReloadPlan
    once: bool = False
    health: tuple[str, int] | None = None


def watch(settings: Settings, plan: WatchPlan) -> tuple[int, Sequence[str]]:
    """Watch; gives the exit code, and the files.

    Raises:
        Unavailable, Refused: with ``once``: what is wanted cannot be had now, or not by this process.
        Invalid: the node agent says that what is asked for makes no sense; the program cannot be run.
        Misconfigured: the directory cannot be used.
    """
    return asyncio.run(_watch(settings, plan))


async def _watch(settings: Settings, plan: WatchPlan) -> tuple[int, Sequence[str]]:
    names = [name for names in plan.wanted.parts.values() for name in names]
    files = [str(plan.directory / name) for name in names]
    with CredentialDirectory.opened(plan.directory) as directory:
        directory.sweep(names)
        watching = _Watching(settings, plan, directory)
        if plan.once:
            async with agent_channel(settings) as channel:
                await watching.over(channel).once()
            await watching.tell()
            return EXIT_OK, files
        return await watching.until_told(), files


class _Watching:
    def __init__(self, settings: Settings, plan: WatchPlan, directory: CredentialDirectory) -> None:
        self._settings = settings
        self._plan = plan
        self._directory = directory
        self._reload = Reload(plan.reload, settings.shown.talk)
        self._keeping: Keeping | None = None
        self._telling = asyncio.Lock()
        self._told = False

    def over(self, channel: Any) -> Keeping:
        """Prepare the keeping of the files over this connection."""
        self._keeping = Keeping(
            channel,
            self._plan.wanted,
            self._directory,
            SystemClock(),
            changed=self._changed,
            say=self._settings.shown.talk,
            timeout=self._settings.timeout,
        )
        return self._keeping

    def lacking(self) -> Mapping[str, str]:
        """Give the parts that nobody can use now."""
        if self._keeping is None:
            return dict.fromkeys(self._plan.wanted.parts, "there is no node agent yet")
        return self._keeping.lacking()

    async def tell(self) -> None:
        """Tell who reads the files, one after the other."""
        async with self._telling:
            self._told = True
            await self._reload.changed()

    async def until_told(self) -> int:
        """Go on until a signal, or the end of the program that was started; gives the exit code."""
        async with _signals() as stopped, health_port(self._plan.health, self.lacking) as port:
            if port:
                self._settings.shown.talk(f"health: http://{(self._plan.health or ('',))[0]}:{port}/ready")
            running = asyncio.create_task(self._run())
            try:
                ends: tuple[asyncio.Future[Any], ...] = (running, stopped, self._reload.ended)
                await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
                if running.done():
                    running.result()
                if self._reload.ended.done():
                    return self._reload.ended.result()
                return EXIT_INTERRUPTED if stopped.result() == signal.SIGINT else EXIT_OK
            finally:
                try:
                    with suppress(BrokerError, BaseExceptionGroup):
                        await background.end(running)
                finally:
                    await self._reload.stop()

    async def _run(self) -> None:
        pause = AGENT_AGAIN
        while True:
            try:
                async with agent_channel(self._settings) as channel:
                    return await self.over(channel).run()
            except Unavailable as error:
                self._settings.shown.talk(f"{error.message}; trying again")
            await asyncio.sleep(pause)
            pause = min(pause * 2, RETRY_MOST)

    async def _changed(self, part: str) -> None:
        lacking = self.lacking()
        withdrawn = part in lacking
        shown = ", ".join(self._plan.wanted.parts[part])
        self._settings.shown.talk(f"{'removed what was secret of' if withdrawn else 'wrote'} {shown}")
        if self._plan.once or (lacking and not (withdrawn and self._told)):
            return  # the first time everybody is told when everything is there
        # A token is read anew for each use; whoever reads certificates must be told to.
        if not (self._told and part.startswith(JWT) and self._others()):
            await self.tell()

    def _others(self) -> bool:
        return any(not part.startswith(JWT) for part in self._plan.wanted.parts)


@asynccontextmanager
async def _signals() -> AsyncIterator["asyncio.Future[int]"]:
    loop = asyncio.get_running_loop()
    told: asyncio.Future[int] = loop.create_future()

    def tell(number: int) -> None:
        if not told.done():
            told.set_result(number)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    for number in numbers:
        loop.add_signal_handler(number, tell, number)
    try:
        yield told
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)
