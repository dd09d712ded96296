"""The programs as an operator starts them: one server and its node agents, each a process, and the command beside them."""

import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from unittest import mock

from broker.cli.main import main
from tests.fakes.node_fleet import NODE
from tests.fakes.node_pki import Certified, root

DEADLINE = 60.0
"""Seconds for anything to happen on a busy machine."""
_COMMAND = (sys.executable, "-m", "broker.cli.main")


def wait_for(condition: Callable[[], Any], what: str = "it", seconds: float = DEADLINE) -> Any:
    """Give the first true answer of ``condition``."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"{what} does not happen"
        time.sleep(0.05)
    return found


class Programs:
    """A server that takes join tokens and certificates, and the agents that were started."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self.authority: Certified = root()
        self.port = _free_port()
        plain = {n: v for n, v in os.environ.items() if not n.startswith(("BROKER_", "SPIFFE_"))}
        self.environment: dict[str, str] = {**plain, "BROKER_SERVER_SOCKET": f"{directory}/server/private/api.sock"}

    # ---- programs

    def start_server(self, **settings: str) -> None:
        """Start the server and wait until it serves."""
        (self.directory / "data").mkdir()
        (self.directory / "ca.pem").write_bytes(self.authority.pem)
        lines = "".join(f"{name} = '{value}'\n" for name, value in settings.items())
        self.start(
            "server",
            f"[server]\ntrust_domain = 'example.org'\nbind_address = '127.0.0.1'\nbind_port = {self.port}\n"
            f"data_dir = '{self.directory}/data'\nruntime_dir = '{self.directory}/server'\n{lines}"
            "operations.enabled = false\nratelimit.attestation = false\n[server.attestors.node.join_token]\n"
            f"[server.attestors.node.x509pop]\nca_bundle_path = '{self.directory}/ca.pem'\n",
        )
        wait_for(lambda: self.broker("server", "health").returncode == 0, "the server's start")

    def start_agent(self, name: str, *, certified: bool = False, **settings: str) -> None:
        """Start an agent, by a join token or by a certificate of its own, and wait until it serves."""
        values = {"trust_domain": "example.org", "runtime_dir": f"{self.directory}/{name}", "first_identity_wait": "5s"}
        node = ""
        if certified:
            (self.directory / f"{name}.pki").mkdir()
            written = self.authority.node(name).write(self.directory / f"{name}.pki")
            node = NODE.format(key=written["private_key_path"], chain=written["certificate_path"])
        else:
            values["join_token"] = self.broker("join-token", "create", "-q").stdout.strip()
        lines = "".join(f"{key} = '{value}'\n" for key, value in (values | settings).items())
        self.start(name, f"[agent]\nserver_port = {self.port}\ninsecure_bootstrap = true\n{lines}{node}", noun="agent")
        wait_for(lambda: self.agent_answers(name), f"the start of {name}")

    def start(self, name: str, text: str, *, noun: str = "server") -> None:
        """Start a program with these settings."""
        file = self.directory / f"{name}.toml"
        file.write_text(text)
        with (self.directory / f"{name}.log").open("wb") as log:
            self.running[name] = subprocess.Popen(
                [*_COMMAND, noun, "run", "--config", str(file)], stdout=log, stderr=log, env=self.environment
            )

    def stop(self, name: str, number: signal.Signals = signal.SIGTERM) -> None:
        """End a program and wait for its end."""
        process = self.running.pop(name)
        if process.poll() is None:
            process.send_signal(number)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def agent_socket(self, name: str) -> str:
        """Where an agent serves workloads."""
        return f"{self.directory}/{name}/public/api.sock"

    def agent_answers(self, name: str) -> bool:
        """Whether an agent says that it serves."""
        assert self.running[name].poll() is None, (self.directory / f"{name}.log").read_text()
        return self.broker("agent", "health", "--socket", self.agent_socket(name)).returncode == 0

    # ---- the command

    def broker(self, *arguments: str, stdin: str = "", **more: str) -> subprocess.CompletedProcess[str]:
        """Run one command line, in this process: starting Python takes longer than what it does. ``more`` is environment."""
        out, err = io.StringIO(), io.StringIO()
        with (
            mock.patch.dict(os.environ, {**self.environment, **more}, clear=True),
            mock.patch.object(sys, "stdin", io.StringIO(stdin)),
            redirect_stdout(out),
            redirect_stderr(err),
        ):
            code = main(list(arguments))
        return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())

    def run(self, *arguments: str, code: int = 0, **more: str) -> subprocess.CompletedProcess[str]:
        """Run one command line; it must end with this exit code."""
        ended = self.broker(*arguments, **more)
        assert ended.returncode == code, (arguments, ended.returncode, ended.stdout, ended.stderr)
        return ended

    def json(self, *arguments: str, code: int = 0) -> dict[str, Any]:
        """Run one command line and read its answer."""
        answer: dict[str, Any] = json.loads(self.run(*arguments, "-o", "json", code=code).stdout)
        return answer

    def error(self, *arguments: str, code: int) -> Mapping[str, Any]:
        """Run one command line that must fail, with a hint."""
        ended = self.run(*arguments, "-o", "json", "-q", code=code)
        assert ended.stdout == ""
        error: dict[str, Any] = json.loads(ended.stderr)["error"]
        assert error["hint"]
        return error


@contextmanager
def programs() -> Iterator[Programs]:
    """A place for programs; whatever still runs is ended with the block."""
    directory = Path(tempfile.mkdtemp(dir="/tmp"))
    directory.chmod(0o755)
    made = Programs(directory)
    try:
        yield made
    finally:
        for name in reversed(list(made.running)):
            made.stop(name)
        shutil.rmtree(directory)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
