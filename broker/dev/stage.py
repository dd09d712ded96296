"""The stage of the demo: a temporary estate, and the processes that play on it. All of it is gone afterwards.

Knows how to start and end; what is played is told elsewhere.
"""

import asyncio
import json
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from broker.dev.configuration import Plan
from broker.dev.estate import Estate
from broker.dev.issuer import LOOPBACK
from broker.dev.lines import MAX_LINE
from broker.dev.processes import tail
from broker.dev.programs import install_program, program_environment
from broker.errors import BrokerError, Unavailable

ANSWER_SECONDS = 20.0
"""For one answer of a process of the demo, its start included."""
END_SECONDS = 3.0
OTHER_AUDIENCE = "https://billing.dev.test"
FIRST_IDENTITY_WAIT = "500ms"
"""A stranger waits this long for an entry before it is denied: the audience of a demo waits with it."""


class NotHeld(BrokerError):
    """A step of the demo did not come out as it must."""

    code = "step_failed"


class Process:
    """One process of the demo, talked with line by line."""

    def __init__(self, name: str, process: asyncio.subprocess.Process, log: Path) -> None:
        """Hold a process that was just started."""
        self.name = name
        self.pid = process.pid
        self._process = process
        self._log = log

    async def hear(self) -> Mapping[str, Any]:
        """Give its next line; raises Unavailable when it ends or stays silent."""
        assert self._process.stdout is not None
        with suppress(TimeoutError):
            async with asyncio.timeout(ANSWER_SECONDS):
                line = await self._process.stdout.readline()
                if line:
                    answer: Mapping[str, Any] = json.loads(line)
                    return answer
                code = await self._process.wait()
                raise Unavailable(
                    f"the {self.name} ended with exit code {code}; it said\n{tail(self._log)}", code="process_ended"
                )
        raise Unavailable(f"the {self.name} does not answer; it said\n{tail(self._log)}", code="process_silent")

    async def try_(self, command: str, **arguments: Any) -> Mapping[str, Any]:
        """Tell it to do something; a refusal is in the answer's ``error``."""
        assert self._process.stdin is not None
        with suppress(ConnectionError):
            self._process.stdin.write(json.dumps({"do": command, "with": arguments}).encode() + b"\n")
            await self._process.stdin.drain()
        return await self.hear()

    async def do(self, command: str, **arguments: Any) -> Mapping[str, Any]:
        """Tell it to do something that must succeed; raises NotHeld."""
        answer = await self.try_(command, **arguments)
        if "error" in answer:
            error = answer["error"]
            raise NotHeld(
                f"the {self.name} was refused: {error['message']} ({error['code']})", hint=error.get("hint", "")
            )
        return answer

    async def end(self) -> None:
        """Close its input, which ends it; kill it when that does not."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            async with asyncio.timeout(END_SECONDS):
                await self._process.wait()
        except TimeoutError:
            with suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()

    def kill(self) -> None:
        """End it without another word."""
        with suppress(ProcessLookupError):
            self._process.kill()


@dataclass(slots=True)
class Stage:
    """Everything of one run. Use it with ``async with``."""

    python: str = sys.executable
    directory: Path = field(init=False)
    estate: Estate = field(init=False)
    service_port: int = field(init=False)
    programs: dict[str, Path] = field(default_factory=dict)
    processes: list[Process] = field(default_factory=list)
    kept: dict[str, Any] = field(default_factory=dict)
    server: Mapping[str, str] = field(default_factory=dict)
    """Settings of the server and of its tasks that differ from the usual ones."""
    tasks: Mapping[str, str] = field(default_factory=dict)

    async def __aenter__(self) -> Self:
        """Make the directory; nothing runs yet."""
        self.directory = _temporary_directory()
        self.service_port = _free_port()
        plan = Plan(
            audiences=(self.service_url, OTHER_AUDIENCE),
            first_identity_wait=FIRST_IDENTITY_WAIT,
            server=self.server,
            tasks=self.tasks,
        )
        self.estate = Estate(self.directory / "estate", plan=plan, python=self.python)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End every process by its pid, and remove the directory; an interrupt does not stop this."""
        ending = asyncio.ensure_future(self._end())
        try:
            await asyncio.shield(ending)
        except asyncio.CancelledError:
            await ending
            raise

    @property
    def service_url(self) -> str:
        """The service, which is also the audience of its tokens."""
        return f"https://localhost:{self.service_port}"

    def install(self, name: str) -> Path:
        """Make a program of its own; give the file that the kernel will show."""
        self.programs[name] = install_program(self.directory / "programs", name)
        return self.programs[name]

    async def play(self, name: str, program: str, module: str, *arguments: str) -> Process:
        """Start a process: ``program`` is the file, ``module`` what it runs."""
        log = self.directory / f"{name.replace(' ', '-')}.log"
        with log.open("wb") as errors:
            process = await asyncio.create_subprocess_exec(
                self.programs[program],
                "-m",
                module,
                *arguments,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=errors,
                env={**program_environment(os.environ), **self.estate.environment()},
                cwd=self.directory,
                limit=MAX_LINE,
                start_new_session=True,
            )
        started = Process(name, process, log)
        self.processes.append(started)
        return started

    async def _end(self) -> None:
        await asyncio.gather(*(process.end() for process in self.processes))
        await asyncio.to_thread(self.estate.down)
        await asyncio.to_thread(shutil.rmtree, self.directory, ignore_errors=True)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])


def _temporary_directory() -> Path:
    return Path(tempfile.mkdtemp(prefix="broker-demo-")).resolve()
