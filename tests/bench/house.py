"""What is measured: a whole estate of real processes, and the programs that load it. Started once, for all items of a run."""

import asyncio
import os
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from broker._proto.broker.server.v1 import entries_pb2
from broker._proto.service import ServiceBinding
from broker._proto.spire.api.types import entry_pb2, selector_pb2
from broker.agent.trust import read_trust_bundle
from broker.client import Entries, Nodes, dial_socket
from broker.client.calls import Caller, spiffe_id_message
from broker.dev.configuration import NODE_ALIAS, TRUST_DOMAIN, Plan
from broker.dev.estate import Estate
from broker.dev.lines import MAX_LINE
from broker.dev.programs import program_environment
from broker.dev.stage import Process
from broker.spiffe import Bundle, SpiffeId, TrustDomain

AUDIENCE = "https://tickets.dev.test"
ME = ("unix", f"uid:{os.geteuid()}")
"""The selector of every program of the bench."""
STRANGER = 500_000
"""First of the user ids of entries that nobody here earns."""
ENTRY_BATCH = 500
TOKEN_SECONDS = 600
_ENTRIES = ServiceBinding.of(entries_pb2.DESCRIPTOR, "Entries")

Tell = Callable[[str], None]


class House:
    """One estate, its operator, and the programs of the bench. Use it with ``async with``."""

    def __init__(self, tell: Tell) -> None:
        self.tell = tell
        self._programs: list[Process] = []

    async def __aenter__(self) -> Self:
        """Start the estate, with one entry that every program of the bench earns."""
        self.directory = Path(tempfile.mkdtemp(prefix="broker-bench-", dir="/tmp")).resolve()
        self.estate = Estate(self.directory / "estate", plan=Plan(audiences=(AUDIENCE,)))
        try:
            await self.estate.up(self.tell)
            self.admin = dial_socket(self.estate.layout.server_socket)
            await Entries(self.admin).create(self.entry("/bench/me", NODE_ALIAS, ME, may_start_tasks=True))
        except BaseException:
            await self.__aexit__(None, None, None)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End every process that was started here, and remove the directory."""
        await asyncio.gather(*(program.end() for program in self._programs))
        if hasattr(self, "admin"):
            await self.admin.close()
        await asyncio.to_thread(self.estate.down)
        await asyncio.to_thread(shutil.rmtree, self.directory, ignore_errors=True)

    @property
    def agent_socket(self) -> str:
        return str(self.estate.layout.agent_socket)

    @property
    def address(self) -> str:
        """The server's TLS port."""
        return f"127.0.0.1:{self.estate.require_record().ports.server}"

    @property
    def issuer(self) -> str:
        return self.estate.require_record().ports.server_url

    def pid(self, part: str) -> int:
        return self.estate.require_record().parts[part].pid

    def bundle(self) -> Bundle:
        """The authorities that the estate's own agent was given."""
        return read_trust_bundle(self.estate.layout.bundle, TrustDomain(TRUST_DOMAIN))

    async def user_token(self, name: str = "alice") -> str:
        return await asyncio.to_thread(self.estate.user_token, name)

    async def join_token(self) -> str:
        return (await Nodes(self.admin).create_join_token(ttl=TOKEN_SECONDS)).value

    # ---- entries

    def entry(self, path: str, parent: str, *selectors: tuple[str, str], **more: object) -> entries_pb2.RegisteredEntry:
        return entries_pb2.RegisteredEntry(
            entry=entry_pb2.Entry(
                spiffe_id=spiffe_id_message(SpiffeId(f"spiffe://{TRUST_DOMAIN}{path}")),
                parent_id=spiffe_id_message(SpiffeId(parent)),
                selectors=[selector_pb2.Selector(type=kind, value=value) for kind, value in selectors],
            ),
            **more,
        )

    async def register(self, parent: str, paths: list[str]) -> list[str]:
        """Register an entry for each path below a node, for workloads that are not here; give the entries' ids."""
        entries = [self.entry(path, parent, ("unix", f"uid:{STRANGER + number}")) for number, path in enumerate(paths)]
        caller = Caller(self.admin, _ENTRIES, timeout=60)
        ids: list[str] = []
        for start in range(0, len(entries), ENTRY_BATCH):
            request = entries_pb2.BatchCreateEntryRequest(entries=entries[start : start + ENTRY_BATCH])
            answer = await caller.call("BatchCreateEntry", request)
            if any(one.status.code for one in answer.results):
                raise RuntimeError("an entry was not created")
            ids += [one.entry.entry.id for one in answer.results]
        return ids

    # ---- programs

    @asynccontextmanager
    async def program(self, module: str, *arguments: str) -> AsyncIterator[Process]:
        """Run a program of the bench, talked with line by line, for as long as the block lasts."""
        log = self.directory / f"{module}-{len(self._programs)}.log"
        root = str(Path(__file__).parents[2])
        with log.open("wb") as errors:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", f"tests.bench.{module}", *arguments,
                stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=errors,
                env={**program_environment(os.environ), **self.estate.environment()},
                cwd=root, limit=MAX_LINE, start_new_session=True,
            )  # fmt: skip
        started = Process(module, process, log)
        self._programs.append(started)
        try:
            yield started
        finally:
            self._programs.remove(started)
            await started.end()

    @asynccontextmanager
    async def bare(self, *arguments: str) -> AsyncIterator[Process]:
        """Run a bare server; it listens when the block begins."""
        async with self.program("bare", *arguments) as server:
            await server.hear()
            yield server

    def socket(self, name: str) -> str:
        return str(self.directory / f"{name}.sock")
