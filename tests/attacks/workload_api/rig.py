"""The real agent as a process of its own before a fake server, and what is measured of it from outside."""

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from broker._proto.grpc.health.v1 import health_pb2
from broker._proto.spiffe import workload_pb2
from tests.attacks.workload_api.frames import Connection
from tests.fakes.fake_server import FakeServer, entry_message

SOURCES = Path(__file__).resolve().parents[3]
SERVICE = "/SpiffeWorkloadAPI/"
JWT = workload_pb2.JWTSVIDRequest(audience=["bystander"]).SerializeToString()
MINE = workload_pb2.JWTSVIDRequest(audience=["bystander"], spiffe_id="spiffe://example.org/wl/me").SerializeToString()
MIB = 1024 * 1024
FDS_SLACK = 10  # the bystander's own connections come and go: five each
SCALE = float(
    os.environ.get("BROKER_ATTACK_SCALE", "0.3")
)  # 1: the full numbers of crowds and floods; CI has less time

AGENT = """
import importlib, json, resource, sys
changed = json.loads(sys.argv[2])
if changed["nofile"]:
    resource.setrlimit(resource.RLIMIT_NOFILE, (changed["nofile"], changed["nofile"]))
for name, value in changed["constants"].items():
    module, _, constant = name.rpartition(".")
    setattr(importlib.import_module(module), constant, value)
from broker.cli.main import main
sys.exit(main(["agent", "run", "--config", sys.argv[1]]))
"""


def wait_for(condition: Callable[[], Any], seconds: float = 30.0, pause: float = 0.02) -> Any:
    """Wait until it holds; give what it gave."""
    deadline = time.monotonic() + seconds
    while not (held := condition()):
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(pause)
    return held


class Server:
    """The fake server, on a loop and a thread of its own, so that a test may block."""

    def __init__(self, directory: Path) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self.fake = FakeServer(directory)
        self.run(self.fake.__aenter__())

    def run(self, coroutine) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(30)

    def do(self, action: Callable[[FakeServer], object]) -> Any:
        """Call it with the server, on its loop."""

        async def call() -> object:
            return action(self.fake)

        return self.run(call())

    def close(self) -> None:
        self.run(self.fake.__aexit__(None, None, None))
        self.run(self._loop.shutdown_asyncgens())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


@dataclass(frozen=True)
class Facts:
    """Of the agent's process, now."""

    rss: int  # bytes
    fds: int
    threads: int
    cpu: float  # seconds, user and system


@dataclass(frozen=True)
class Lap:
    """What a bystander saw: seconds of each call, on its old connection and on new ones."""

    warm: list[float]
    new: list[float]
    failures: list[str]

    @property
    def p99(self) -> float:
        return percentile(self.warm, 0.99)

    @property
    def new_p99(self) -> float:
        return percentile(self.new, 0.99)


def percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))] if ordered else 0.0


class Bystander:
    """An honest caller beside the attack."""

    def __init__(self, socket: Path, *uid: int) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.attacks.workload_api.bystander", str(socket), MINE.hex(), *map(str, uid)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=SOURCES,
        )  # fmt: skip
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"

    def lap(self) -> Lap:
        """What it saw since the last time."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        told = json.loads(self._process.stdout.readline())
        return Lap(told["took"]["warm"], told["took"]["new"], told["failures"])

    def close(self) -> None:
        with self._process:
            assert self._process.stdin is not None
            self._process.stdin.close()
            self._process.wait(20)


class Rig:
    """Server and agent; ``start`` and ``stop`` are the agent's."""

    def __init__(
        self, *, nofile: int = 0, constants: dict[str, object] | None = None, entries=None, **settings: object
    ) -> None:
        """``nofile``: limit of open files. ``constants``: changed in the agent's process, by their full names."""
        self.directory = Path(tempfile.mkdtemp(dir="/tmp"))
        self.directory.chmod(0o755)
        self.server = Server(self.directory)
        for entry in entries if entries is not None else (entry_message("e1", "/wl/me", [f"unix:uid:{os.geteuid()}"]),):
            self.server.do(lambda fake, one=entry: fake.put(one))
        self.socket = self.directory / "agent" / "public" / "api.sock"
        self.admin = self.directory / "agent" / "private" / "admin.sock"
        self.log = self.directory / "agent.log"
        self._changed = json.dumps({"nofile": nofile, "constants": constants or {}})
        values = {
            "trust_domain": "example.org",
            "server_port": self.server.fake.port,
            "runtime_dir": str(self.directory / "agent"),
            "trust_bundle_path": str(self.server.fake.trust_file()),
            "join_token": "token-1",
            "first_identity_wait": "200ms",
            "log_format": "json",
        } | settings
        text = "".join(f"{name} = {value!r}\n" for name, value in values.items())
        (self.directory / "agent.toml").write_text(f"[agent]\n{text}")
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, *, ready: bool = True) -> None:
        process = self.spawn()
        wait_for(lambda: self.is_up(ready=ready) or process.poll() is not None, 40)
        assert process.poll() is None, self.said()

    def spawn(self) -> "subprocess.Popen[bytes]":
        with self.log.open("ab") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-c", AGENT, str(self.directory / "agent.toml"), self._changed],
                stderr=out, stdout=out, stdin=subprocess.DEVNULL, cwd=SOURCES,
            )  # fmt: skip
        return self.process

    def is_up(self, *, ready: bool = True) -> bool:
        """Whether it answers; ``ready``: and serves workloads."""
        try:
            with Connection(self.socket) as one:
                heard = one.call("/grpc.health.v1.Health/Check", metadata=(), seconds=2)
        except OSError:
            return False
        if heard.status != 0:
            return False
        return not ready or health_pb2.HealthCheckResponse.FromString(heard.messages[0]).status == 1

    def stop(self) -> int:
        """End the agent; give its exit code."""
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.terminate()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        return self.process.returncode

    def close(self) -> None:
        if self.process is not None:
            self.stop()
        self.server.close()
        shutil.rmtree(self.directory)

    def facts(self) -> Facts:
        assert self.process is not None
        home = Path(f"/proc/{self.process.pid}")
        status = dict(line.split(":", 1) for line in (home / "status").read_text().splitlines())
        fields = (home / "stat").read_text().rpartition(")")[2].split()
        try:
            fds = len(os.listdir(home / "fd"))
        except PermissionError:
            fds = -1  # an agent is not dumpable: only root may look
        ticks = os.sysconf("SC_CLK_TCK")
        return Facts(
            int(status["VmRSS"].split()[0]) * 1024,
            fds,
            int(status["Threads"]),
            (int(fields[11]) + int(fields[12])) / ticks,
        )

    def said(self) -> str:
        return self.log.read_text(errors="replace")


P99_FLOOR = 1.0  # seconds: below it, the machine's own noise decides
P99_FACTOR = 10
SETTLE = 10.0  # seconds for what an attack left behind to go


@contextmanager
def unharmed(agent: Rig, bystander: Bystander, *, rss: int, quiet: float = 0.4) -> Iterator[None]:
    """Around an attack: no honest call failed or became slow, memory grew by ``rss`` bytes at most, descriptors are back."""
    bystander.lap()
    time.sleep(quiet)
    before, baseline = agent.facts(), bystander.lap()
    yield
    after, seen = agent.facts(), bystander.lap()
    assert seen.failures == [], seen.failures
    limit = max(P99_FLOOR, P99_FACTOR * max(baseline.p99, baseline.new_p99))
    assert seen.p99 <= limit, (seen.p99, limit)
    assert seen.new_p99 <= limit, (seen.new_p99, limit)
    assert after.rss - before.rss <= rss, (after.rss - before.rss) / MIB
    if before.fds >= 0:
        wait_for(lambda: agent.facts().fds - before.fds <= FDS_SLACK, SETTLE)


@contextmanager
def rig(*, ready: bool = True, **options: Any) -> Iterator[Rig]:
    one = Rig(**options)
    try:
        one.start(ready=ready)
        yield one
    finally:
        one.close()
