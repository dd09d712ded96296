"""A development estate: a real server, a real node agent and an OpenID issuer, as processes, in one directory.

Started by their own command lines, awaited by what they answer, ended by pid and start time. ``up`` twice is ``up`` once.
Knows the outside of the programs only.
"""

import asyncio
import contextlib
import fcntl
import os
import shutil
import socket
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import grpc.aio
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509 import load_der_x509_certificate

from broker.client import Bundles, Health, Nodes, dial_socket
from broker.clock import Clock, SystemClock
from broker.dev import issuer
from broker.dev.certificates import write_private
from broker.dev.configuration import NODE_ALIAS, Plan, Ports, agent_toml, server_toml
from broker.dev.layout import Layout, layout_of, private_directory
from broker.dev.processes import Started, end, identify, is_running, launch, tail
from broker.dev.record import Record, read_record, write_record
from broker.errors import BrokerError, Conflict, NotFound, Unavailable
from broker.spiffe import SpiffeId

PARTS = ("issuer", "server", "agent")
"""In the order in which they start, each needing the one before; they end in the other order."""

START_SECONDS = 30.0
"""For one part to answer: far more than a busy machine needs, so that a hang is told as one."""
LOOK_EVERY = 0.02
JOIN_TOKEN_SECONDS = 600

Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Part:
    """How one part is: ``state`` is running, stopped, or failing with ``detail``."""

    name: str
    state: str
    pid: int | None
    address: str
    log: str
    detail: str = ""


class Estate:
    """One estate. ``python`` is the interpreter that runs its programs; without ``plan`` it stays as it was."""

    def __init__(
        self,
        directory: Path,
        *,
        plan: Plan | None = None,
        python: str = sys.executable,
        environ: Mapping[str, str] | None = None,
        clock: Clock | None = None,
    ) -> None:
        """Look at a directory; nothing is made or started before :meth:`up`."""
        self._environ = dict(os.environ if environ is None else environ)
        self.layout: Layout = layout_of(directory, self._environ)
        self._plan = plan
        self._python = python
        self._clock = clock or SystemClock()
        self._children: dict[str, subprocess.Popen[bytes]] = {}

    @property
    def record(self) -> Record | None:
        """What was started here; None before the first :meth:`up`."""
        return read_record(self.layout.state)

    async def up(self, tell: Tell) -> Sequence[Part]:
        """Start what does not run yet and wait until each part answers.

        Raises:
            Unavailable: a part did not start; its name and the end of its log are in the message.
            Conflict: somebody else is starting or ending this estate.
        """
        with self._locked():
            private_directory(self.layout.runtime)
            record = self._prepared(self.record)
            for name in PARTS:
                if self._runs(record, name):
                    continue
                if name == "agent":
                    await self._admit_agent()
                record = self._start(record, name)
                await self._answering(record, name)
                tell(f"{name}: started, pid {record.parts[name].pid}")
            return await self.status()

    def down(self) -> Sequence[str]:
        """End what runs, the agent first; give the names of what was ended."""
        if not self.layout.directory.exists():
            return []
        with self._locked():
            record = self.record
            if record is None:
                return []
            ended = [name for name in reversed(PARTS) if self._runs(record, name)]
            for name in reversed(PARTS):
                if name in record.parts:
                    end(record.parts[name])
                child = self._children.pop(name, None)
                if child is not None:
                    child.wait()
            write_record(self.layout.state, Record(record.ports, record.audiences, {}))
            shutil.rmtree(self.layout.runtime, ignore_errors=True)
            return ended

    def purge(self) -> None:
        """End everything and remove the directory, if it is an estate's."""
        if self.record is None:
            raise NotFound(f"{self.layout.directory} holds no estate", hint="broker dev up makes one")
        self.down()
        shutil.rmtree(self.layout.directory)

    async def status(self) -> Sequence[Part]:
        """Ask each part how it is."""
        record = self.record
        return [await self._part(record, name) for name in PARTS]

    def environment(self) -> Mapping[str, str]:
        """Give the variables by which commands and workloads find this estate.

        Raises:
            NotFound: it was never started.
        """
        record = self.require_record()
        return {
            "SPIFFE_ENDPOINT_SOCKET": f"unix://{self.layout.agent_socket}",
            "BROKER_SERVER_SOCKET": f"unix://{self.layout.server_socket}",
            "BROKER_ADDR": f"localhost:{record.ports.server}",
            "BROKER_CACERT": str(self.layout.bundle),
        }

    def require_record(self) -> Record:
        """Give the record; raises NotFound when there is no estate here."""
        record = self.record
        if record is None:
            raise NotFound(f"no estate in {self.layout.directory}", code="no_estate", hint="broker dev up")
        return record

    def user_token(self, name: str) -> str:
        """Get an ID token for a user of this name from the development issuer."""
        self.require_record()
        return issuer.user_token(self.layout.token_socket, name)

    # ---- starting

    def _prepared(self, old: Record | None) -> Record:
        running = {} if old is None else {n: s for n, s in old.parts.items() if is_running(s)}
        ports = Ports(0, 0) if old is None else old.ports
        if not running:  # what runs keeps its address
            ports = Ports(_free(ports.server), _free(ports.issuer))
        plan = self._plan or (Plan() if old is None else Plan(audiences=old.audiences))
        record = Record(ports, tuple(plan.audiences), running)
        if old is not None and "server" in running and old.audiences != record.audiences:
            raise Conflict(
                "the running server has other audiences", code="estate_differs", hint="broker dev down, then up again"
            )
        self.layout.server_config.write_text(server_toml(self.layout, ports, plan), encoding="utf-8")
        self.layout.agent_config.write_text(agent_toml(self.layout, ports, plan), encoding="utf-8")
        write_record(self.layout.state, record)
        return record

    def _start(self, record: Record, name: str) -> Record:
        private_directory(self.layout.data(name))
        self.layout.log(name).unlink(missing_ok=True)
        program = (self._python, "-m", "broker.cli.main")
        arguments = {
            "issuer": (self._python, "-m", "broker.dev.issuer", "--directory", str(self.layout.issuer),
                       "--port", str(record.ports.issuer), "--token-socket", str(self.layout.token_socket)),
            "server": (*program, "server", "run", "--config", str(self.layout.server_config)),
            "agent": (*program, "agent", "run", "--config", str(self.layout.agent_config)),
        }[name]  # fmt: skip
        try:
            child = launch(arguments, log=self.layout.log(name), environment=_clean(self._environ))
        except OSError as error:
            raise Unavailable(
                f"{name}: {self._python} cannot be run: {error.strerror}",
                code=f"{name}_failed",
                hint="is the virtual environment whole? make demo builds it",
            ) from None
        self._children[name] = child
        started = identify(child.pid)
        parts = record.parts if started is None else {**record.parts, name: started}
        changed = Record(record.ports, record.audiences, parts)
        write_record(self.layout.state, changed)
        return changed

    async def _answering(self, record: Record, name: str) -> None:
        deadline = self._clock.monotonic() + START_SECONDS
        while True:
            if not self._runs(record, name):
                child = self._children.get(name)
                code = "" if child is None else f" with exit code {child.wait()}"
                raise self._failure(name, f"the {name} ended{code}")
            try:
                await self._check(record, name)
            except (BrokerError, OSError) as error:
                if self._clock.monotonic() > deadline:
                    raise self._failure(name, f"the {name} does not answer: {error}") from None
                await asyncio.sleep(LOOK_EVERY)
            else:
                return

    def _failure(self, name: str, what: str) -> Unavailable:
        log = self.layout.log(name)
        return Unavailable(
            f"{what}; its log ends with\n{tail(log)}", code=f"{name}_failed", hint=f"all of it is in {log}"
        )

    async def _admit_agent(self) -> None:
        """Give the agent what an operator would: the authorities to trust, and a one-time token."""
        async with _channel(self.layout.server_socket) as channel:
            bundle = await Bundles(channel).get()
            token = await Nodes(channel).create_join_token(ttl=JOIN_TOKEN_SECONDS, agent_id=SpiffeId(NODE_ALIAS))
        authorities = [load_der_x509_certificate(one.asn1) for one in bundle.x509_authorities]
        self.layout.bundle.write_bytes(b"".join(one.public_bytes(Encoding.PEM) for one in authorities))
        write_private(self.layout.join_token, token.value.encode())

    # ---- looking

    async def _check(self, record: Record, name: str) -> None:
        if name == "issuer":
            await self._check_issuer(record)
            return
        path = self.layout.server_socket if name == "server" else self.layout.agent_socket
        async with _channel(path) as channel:
            await Health(channel).require_serving()

    async def _check_issuer(self, record: Record) -> None:
        context = ssl.create_default_context(cafile=self.layout.issuer / "ca.pem")
        reader, writer = await asyncio.open_connection(issuer.LOOPBACK, record.ports.issuer, ssl=context)
        writer.write(
            f"GET {issuer.KEYS_PATH} HTTP/1.1\r\nHost: {issuer.LOOPBACK}\r\nConnection: close\r\n\r\n".encode()
        )
        try:
            status = await reader.readline()
        finally:
            writer.close()
        if b" 200 " not in status or not self.layout.token_socket.is_socket():
            raise Unavailable("it gives no keys", code="not_serving")

    async def _part(self, record: Record | None, name: str) -> Part:
        log = str(self.layout.log(name))
        if record is None or not self._runs(record, name):
            return Part(name, "stopped", None, "", log)
        address = {
            "issuer": record.ports.issuer_url,
            "server": record.ports.server_url,
            "agent": f"unix://{self.layout.agent_socket}",
        }[name]
        try:
            await self._check(record, name)
        except (BrokerError, OSError) as error:
            return Part(name, "failing", record.parts[name].pid, address, log, str(error))
        return Part(name, "running", record.parts[name].pid, address, log)

    def _runs(self, record: Record, name: str) -> bool:
        started: Started | None = record.parts.get(name)
        return started is not None and is_running(started)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        private_directory(self.layout.directory)
        descriptor = os.open(self.layout.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Conflict(
                "somebody is starting or ending this estate", code="estate_busy", hint="wait, then broker dev status"
            ) from None
        else:
            yield
        finally:
            os.close(descriptor)


@contextlib.asynccontextmanager
async def _channel(path: Path) -> AsyncIterator[grpc.aio.Channel]:
    channel = dial_socket(path)
    try:
        yield channel
    finally:
        await channel.close()


def _free(wanted: int) -> int:
    """Give the port that was used before if it is free, else one that is."""
    for port in (wanted, 0):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((issuer.LOOPBACK, port))
            return int(probe.getsockname()[1])
    raise Unavailable("no port is free on loopback", hint="what holds them all? ss -ltn")


def _clean(environ: Mapping[str, str]) -> dict[str, str]:
    """Leave out what would change our programs' settings behind the files that were just written."""
    return {name: value for name, value in environ.items() if not name.startswith("BROKER_")}
