"""Two agents of one user under one interpreter, told apart by how they were launched: in a whole estate of real processes."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import grpc
import grpc.aio
import pytest

from broker._proto.service import Stub
from broker._proto.spiffe import workload_pb2
from broker.agent.listener import WORKLOAD
from broker.dev.configuration import NODE_ALIAS, Plan
from broker.dev.estate import Estate as Programs
from tests.fakes.fake_server import entry_message
from tests.fakes.launching import command as launcher
from tests.fakes.launching import script
from tests.fakes.processes import SCRIPT
from tests.fakes.running_agent import HEADER, estate
from tests.integration.test_cli import Estate

pytestmark = pytest.mark.timeout(240)
SECONDS = 60.0

AGENT = """
import asyncio, json, os, subprocess, sys
from broker.errors import BrokerError
from broker.sdk import Workload

async def who():
    async with Workload.connect() as me:
        try:
            return str((await me.identity()).id)
        except BrokerError as error:
            return error.reason

print(json.dumps({"pid": os.getpid(), "who": asyncio.run(who())}), flush=True)
for line in sys.stdin:
    if line == "again\\n":
        print(json.dumps({"pid": os.getpid(), "who": asyncio.run(who())}), flush=True)
    elif line == "child\\n":  # a tool: the same user, the same interpreter, the same script even
        print(subprocess.run([sys.executable, "-I", sys.argv[1]], stdin=subprocess.DEVNULL, capture_output=True).stdout.decode(), end="", flush=True)
    elif line == "fork\\n":
        if os.fork() == 0:
            os.execv("/bin/sh", ["sh", "-c", f"exec {sys.executable} -I {sys.argv[1]} </dev/null"])
        os.wait()
    elif line == "become\\n":
        os.execv(sys.executable, [sys.executable, "-I", sys.argv[1], sys.argv[1]])
"""


class Agent:
    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def hear(self) -> Mapping[str, object]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, self.process.communicate(timeout=SECONDS)
        return json.loads(line)

    def do(self, what: str) -> Mapping[str, object]:
        assert self.process.stdin is not None
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        return self.hear()


@contextmanager
def running(estate: Estate, *command: str) -> Iterator[Agent]:
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=estate.environment,
    )
    try:
        yield Agent(process)
        process.communicate(timeout=SECONDS)
    finally:
        process.kill()
        process.communicate(timeout=SECONDS)


@pytest.fixture(scope="module")
def node() -> Iterator[Estate]:
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        directory = Path(name) / "e"
        programs = Programs(directory, plan=Plan(first_identity_wait="300ms"))
        try:
            asyncio.run(programs.up(lambda _: None))
            plain = {n: v for n, v in os.environ.items() if not n.startswith(("BROKER_", "SPIFFE_"))}
            made = Estate(directory, {**plain, **programs.environment()})
            for agent in ("research", "triage"):
                made.run(
                    "entry", "create", "--spiffe-id", f"spiffe://dev.test/{agent}", "--parent-id", NODE_ALIAS,
                    "--selector", f"launch:name:{agent}", "--selector", f"unix:uid:{os.geteuid()}",
                )  # fmt: skip
            yield made
        finally:
            programs.down()


def test_two_scripts_of_one_user(node: Estate) -> None:
    path = node.directory.parent / "agent.py"
    path.write_text(AGENT)
    path.chmod(0o644)
    program = (sys.executable, "-I", str(path), str(path))
    with (
        running(node, *launcher("--as", "research", "--", *program)) as one,
        running(node, *launcher("--as", "triage", "--", *program)) as two,
        running(node, *program) as three,
    ):
        first = one.hear()
        assert first["who"] == "spiffe://dev.test/research"
        assert two.hear()["who"] == "spiffe://dev.test/triage"
        assert three.hear()["who"] == "no_identity_issued"
        # The operator sees why.
        told = node.json("explain", "identity", "--pid", str(first["pid"]))
        assert {"selector": "launch:name:research", "strength": "runtime"} in [
            selector for attestor in told["attestors"] for selector in attestor["selectors"]
        ]
        # What it starts is not it, whatever it runs.
        for what in ("child", "fork"):
            child = one.do(what)
            assert child["pid"] != first["pid"] and child["who"] == "no_identity_issued"
        assert one.do("again") == first
        # What it becomes is not it either: the same process, the same interpreter.
        assert one.do("become") == {"pid": first["pid"], "who": "no_identity_issued"}
        assert two.do("again")["who"] == "spiffe://dev.test/triage"


@pytest.mark.root("launches as another user")
@pytest.mark.parametrize("by_launcher", [True, False])
async def test_as_another_user(by_launcher: bool) -> None:
    """As it is meant: root launches, and the program's user has no part in its own name."""
    python = "/usr/bin/python3"
    if not Path(python).exists():
        pytest.skip(f"needs {python}: apt-get install python3")
    entry = entry_message("e1", "/wl/one", ["launch:name:one", "unix:uid:65534"])
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        place = Path(name)
        place.chmod(0o755)
        relay = place / "relays" / "relay"
        relay.parent.mkdir()
        relay.parent.chmod(0o777)
        launches = place / "agent" / "private" / "launches"
        attestors = {"workload": {"unix": {"discover_workload_path": True}, "launch": {"directory": str(launches)}}}
        async with estate(entries=(entry,), runtime_dir=place / "agent", attestors=attestors) as agent:
            code = script(place, SCRIPT.read_text(), "workload.py")
            program = [python, code, "-1", str(agent.socket), str(relay), "stay"]
            if by_launcher:
                program = launcher(
                    "-q", "--as", "one", "--user", "nobody", "--directory", str(launches), "--", *program
                )
            else:
                program[2] = "65534"
            assert await issued(program, relay) == (["spiffe://example.org/wl/one"] if by_launcher else [])


async def issued(program: Sequence[str], relay: Path) -> Sequence[str]:
    """The identities that a program of workload_process.py is given; none where it is refused."""
    process = await asyncio.create_subprocess_exec(
        *program, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    holder = None
    try:
        word, holder = (await process.stdout.readline()).split()
        assert word == b"ready"
        options = (("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0))
        async with grpc.aio.insecure_channel(f"unix:{relay}", options=options) as channel:
            call = Stub(channel, WORKLOAD).FetchX509SVID(workload_pb2.X509SVIDRequest(), metadata=HEADER, timeout=30)
            return [one.spiffe_id for one in (await call.read()).svids]
    except grpc.aio.AioRpcError as error:
        if error.code() is not grpc.StatusCode.PERMISSION_DENIED:
            raise
        return []
    finally:
        if holder is not None:
            with suppress(ProcessLookupError):
                os.kill(int(holder), signal.SIGKILL)
        with suppress(ProcessLookupError):
            process.kill()
        process.stdin.close()
        await process.wait()
        await process.stdout.read()
