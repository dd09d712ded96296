"""``broker task run`` against a real estate: what the command finds, what ends it, and what is left."""

import asyncio
import hashlib
import http.client
import json
import os
import re
import shutil
import signal
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key
from cryptography.x509 import load_pem_x509_certificates

from broker.dev.configuration import NODE_ALIAS, Plan
from broker.dev.estate import Estate as Programs
from broker.dev.programs import install_program, program_environment
from broker.dev.stage import _free_port
from broker.spiffe.jose import b64url_encode, parse_compact
from tests.integration.test_cli import Estate

pytestmark = pytest.mark.timeout(240)
SECONDS = 60.0
ME = "spiffe://dev.test/runner"
SERVICE = "spiffe://dev.test/service"

CALL = """
import http.client, json, os, ssl, sys
names = ["BROKER_TASK_TOKEN_FILE", "BROKER_SVID_FILE", "BROKER_SVID_KEY_FILE", "BROKER_BUNDLE_FILE"]
files = {name: os.environ[name] for name in names}
context = ssl.create_default_context(cafile=files["BROKER_BUNDLE_FILE"])
context.load_cert_chain(files["BROKER_SVID_FILE"], files["BROKER_SVID_KEY_FILE"])
token = open(files["BROKER_TASK_TOKEN_FILE"]).read()
line = http.client.HTTPSConnection("localhost", int(sys.argv[1]), context=context, timeout=30)
line.request("GET", "/tickets/4711", headers={"Authorization": "Bearer " + token})
answer = line.getresponse()
print(json.dumps({
    "status": answer.status, "body": json.loads(answer.read()), "files": files, "task": os.environ["BROKER_TASK_ID"],
    "modes": {name: os.stat(name).st_mode & 0o7777 for name in [*files.values(), os.path.dirname(files[names[0]])]},
    "home": os.stat(os.path.dirname(os.path.dirname(files[names[0]]))).st_mode & 0o7777,
    "leaks": [one for one in [*sys.argv, *os.environ.values()] if token in one],
}))
sys.exit(7)
"""
WAIT = """
import os, signal, sys, time
def told(number, frame):
    os.write(1, f"told {int(number)}\\n".encode())  # print is not to be entered from a signal
    if sys.argv[1] == "heed":
        os._exit(9)
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, told)
print(os.environ["BROKER_TASK_ID"], os.path.dirname(os.environ["BROKER_TASK_TOKEN_FILE"]), os.getpid(), flush=True)
while True:
    time.sleep(60)
"""


class Runner:
    """The estate, and command lines of ``broker task run`` in it."""

    def __init__(self, estate: Estate, port: int, directory: Path) -> None:
        self.estate, self.port, self.directory = estate, port, directory
        self.resource = f"https://localhost:{port}"
        token = directory / "user-token"
        token.write_text(estate.dev("user-token", "alice", "-q").stdout)
        self.details = json.dumps([{"type": "api", "locations": [self.resource], "actions": ["ticket.read"]}])
        self.word = ("--user-token-file", str(token))
        self.files = directory / "runtime"
        self.files.mkdir(mode=0o700)
        self.environment = {**estate.environment, "XDG_RUNTIME_DIR": str(self.files)}

    def start(self, code: str, *arguments: str, options: tuple[str, ...] = ()) -> subprocess.Popen[str]:
        script = self.directory / "command.py"
        script.write_text(code)
        return self.start_command(sys.executable, "-I", str(script), *arguments, options=options)

    def start_command(self, *command: str, options: tuple[str, ...] = ()) -> subprocess.Popen[str]:
        own = [] if "--resource" in options else ["--resource", self.resource]
        own += [] if {"--user-token-file", "--delegation"} & {*options} else self.word
        own += ["--purpose", "p", "--authorization-details", self.details]
        return subprocess.Popen(
            [sys.executable, "-m", "broker.cli.main", "task", "run", *own, *options, "--", *command],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=self.environment,
        )  # fmt: skip

    def ended(self, process: subprocess.Popen[str], code: int) -> tuple[str, str]:
        out, err = process.communicate(timeout=SECONDS)
        assert process.returncode == code, (out, err)
        assert list(self.files.iterdir()) == []  # nothing is left, whatever the end
        return out, err

    def task(self, task: str) -> dict[str, Any]:
        return self.estate.json("task", "show", task)

    def waiting(self, how: str, *options: str) -> "Waiting":
        process = self.start(WAIT, how, options=options)
        assert process.stdout is not None
        line = process.stdout.readline().split()
        assert len(line) == 3, process.communicate(timeout=SECONDS)
        return Waiting(process, line[0], Path(line[1]), int(line[2]))


@dataclass
class Waiting:
    """A command that waits: its task, its files, its number."""

    process: subprocess.Popen[str]
    task: str
    files: Path
    pid: int


def whole_set(directory: Path) -> str:
    """Check one set of files; give the thumbprint of its certificate."""
    leaf, *_ = load_pem_x509_certificates((directory / "svid.pem").read_bytes())
    key = load_pem_private_key((directory / "svid.key").read_bytes(), None)
    assert key.public_key() == leaf.public_key()
    claims = parse_compact((directory / "token").read_text()).payload
    thumbprint = b64url_encode(hashlib.sha256(leaf.public_bytes(Encoding.DER)).digest())
    assert claims["cnf"]["x5t#S256"] == thumbprint
    return thumbprint


@pytest.fixture(scope="module")
def runner() -> Iterator[Runner]:
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        directory, port = Path(name), _free_port()
        audiences = (f"https://localhost:{port}", "https://other.test")
        programs = Programs(
            directory / "e", plan=Plan(audiences=audiences, first_identity_wait="300ms", delegation_clients=["broker"])
        )
        service: subprocess.Popen[bytes] | None = None
        try:
            asyncio.run(programs.up(lambda _: None))
            plain = {n: v for n, v in os.environ.items() if not n.startswith(("BROKER_", "SPIFFE_"))}
            estate = Estate(directory / "e", {**plain, **programs.environment()})
            program = install_program(directory / "programs", "tickets")
            mine = Path(sys.executable).resolve()
            for spiffe_id, path, more in (
                (ME, mine, ["--may-start-tasks", "--x509-svid-ttl", "12s"]),
                (SERVICE, program, ["--dns-name", "localhost"]),
            ):
                estate.run(
                    "entry", "create", "--spiffe-id", spiffe_id, "--parent-id", NODE_ALIAS,
                    "--selector", f"unix:uid:{os.geteuid()}", "--selector", f"unix:path:{path}", *more,
                )  # fmt: skip
            issuer = f"https://{estate.environment['BROKER_ADDR']}"
            service = subprocess.Popen(
                [program, "-m", "broker.dev.service", "--issuer", issuer, "--audience", f"https://localhost:{port}",
                 "--port", str(port)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                env={**program_environment(os.environ), **programs.environment()}, cwd="/",
            )  # fmt: skip
            assert service.stdout is not None and "error" not in json.loads(service.stdout.readline())
            yield Runner(estate, port, directory)
        finally:
            if service is not None:
                service.communicate(timeout=SECONDS)
            programs.down()


def test_a_command_calls_the_service(runner: Runner) -> None:
    out, err = runner.ended(runner.start(CALL, str(runner.port)), 7)
    told = json.loads(out)
    assert (told["status"], told["body"]["user"], told["body"]["agent"]) == (200, "alice", ME)
    assert told["body"]["task"] == told["task"]
    *files, home = told["modes"].values()
    assert set(files) == {0o600} and (home, told["home"]) == (0o700, 0o700)
    assert told["leaks"] == []
    assert "error" not in err
    assert runner.task(told["task"])["state"] == "completed"


@pytest.mark.skipif(shutil.which("curl") is None, reason="needs curl: apt-get install curl")
def test_the_how_to_is_true(runner: Runner) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs/how-to/plain-programs.md").read_text()
    (text,) = re.findall(r"```sh\n(.*?)```", page, re.DOTALL)
    program = runner.directory / "report.sh"
    program.write_text(
        text.replace("https://tickets.example.org", runner.resource).replace("curl ", "curl --silent --show-error ")
    )
    out, err = runner.ended(runner.start_command("/bin/sh", str(program)), 0)
    assert json.loads(out)["agent"] == ME, err


def test_a_signal_is_passed_on(runner: Runner) -> None:
    waiting = runner.waiting("heed")
    waiting.process.send_signal(signal.SIGUSR1)
    out, _ = runner.ended(waiting.process, 9)
    assert out == f"told {signal.SIGUSR1.value}\n"
    assert runner.task(waiting.task)["state"] == "completed"


def test_a_signal_that_ends_the_command_is_in_the_exit_code(runner: Runner) -> None:
    waiting = runner.waiting("heed")
    os.kill(waiting.pid, signal.SIGKILL)
    runner.ended(waiting.process, 128 + signal.SIGKILL)


def test_the_end_of_the_task_ends_the_command(runner: Runner) -> None:
    waiting = runner.waiting("heed")
    runner.estate.run("task", "revoke", waiting.task)
    out, err = runner.ended(waiting.process, 4)
    assert out == f"told {signal.SIGTERM.value}\n"
    # The feed, or the server, which is asked for another token: whichever says so first.
    assert re.search(r"the task (has ended|is revoked \(operator\))", err)


def test_a_command_that_does_not_heed_is_killed(runner: Runner) -> None:
    waiting = runner.waiting("ignore", "--grace", "1s")
    runner.estate.run("task", "revoke", waiting.task)
    out, _ = runner.ended(waiting.process, 4)
    assert out == f"told {signal.SIGTERM.value}\n"
    assert not Path(f"/proc/{waiting.pid}").exists()


@pytest.mark.bears("RV23")
def test_the_files_are_gone_with_the_task_and_not_with_the_command(runner: Runner) -> None:
    waiting = runner.waiting("ignore", "--grace", "20s")
    runner.estate.run("task", "revoke", waiting.task)
    deadline = time.monotonic() + SECONDS
    while list(waiting.files.parent.iterdir()):
        assert time.monotonic() < deadline, "the token is still there"
        time.sleep(0.02)
    assert waiting.process.poll() is None, "the command does not heed, and has its time"
    os.kill(waiting.pid, signal.SIGKILL)
    runner.ended(waiting.process, 4)
    assert runner.task(waiting.task)["cause"] == "operator"


@pytest.mark.bears("RV23")
def test_a_revoked_token_is_replaced_in_its_file(runner: Runner) -> None:
    waiting = runner.waiting("heed")
    before = current(waiting)
    after = before
    while after.leaf != before.leaf or after.token == before.token:
        # A new certificate brings a new token, too: then it is tried again with that one.
        before = after
        assert revoked(runner, waiting.files, before.token) == 200
        deadline = time.monotonic() + SECONDS
        while (after := current(waiting)).token == before.token:
            assert time.monotonic() < deadline, "the dead token is still there"
            time.sleep(0.02)
    waiting.process.send_signal(signal.SIGTERM)
    runner.ended(waiting.process, 9)


@dataclass(frozen=True)
class Current:
    """What a command finds: a token, and whose it is."""

    token: str
    leaf: str


def current(waiting: "Waiting") -> Current:
    deadline = time.monotonic() + SECONDS
    while True:
        try:
            token, leaf = (waiting.files / "token").read_text(), whole_set(waiting.files)
            if (waiting.files / "token").read_text() == token:
                return Current(token, leaf)
        except (FileNotFoundError, AssertionError):
            assert time.monotonic() < deadline, "no set of files stays"


def revoked(runner: Runner, files: Path, token: str) -> int:
    """Give the token back at the server's port, as its holder."""
    context = ssl.create_default_context(cafile=str(files / "bundle.pem"))
    context.load_cert_chain(files / "svid.pem", files / "svid.key")
    line = http.client.HTTPSConnection(runner.estate.environment["BROKER_ADDR"], context=context, timeout=30)
    try:
        form = {"content-type": "application/x-www-form-urlencoded"}
        line.request("POST", "/revoke", body=urlencode({"token": token}), headers=form)
        return line.getresponse().status
    finally:
        line.close()


def test_the_end_of_its_time_ends_the_command(runner: Runner) -> None:
    waiting = runner.waiting("heed", "--ttl", "5s")
    _, err = runner.ended(waiting.process, 4)
    # Its own clock, the server's answer or the feed: whichever says so first.
    assert re.search("the task (is expired|has expired|has ended)", err)


def test_a_new_certificate_comes_with_a_new_token(runner: Runner) -> None:
    """Its life is 12 s here, so it rotates after some 6; whatever set is looked at belongs together."""
    waiting = runner.waiting("heed")
    seen = set()
    deadline = time.monotonic() + SECONDS
    while len(seen) < 2:
        seen.add(whole_set((waiting.files).resolve()))
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert len([one for one in waiting.files.parent.iterdir() if one.name.isdigit()]) <= 2
    os.kill(waiting.pid, signal.SIGTERM)
    runner.ended(waiting.process, 9)


def test_what_a_killed_one_left_is_removed_by_the_next(runner: Runner) -> None:
    waiting = runner.waiting("heed")
    waiting.process.kill()
    waiting.process.wait(SECONDS)
    assert waiting.files.parent.is_dir()
    deadline = time.monotonic() + SECONDS
    while runner.task(waiting.task)["state"] == "active":  # attached: it ended with the process
        assert time.monotonic() < deadline
    os.kill(waiting.pid, signal.SIGKILL)
    waiting.process.communicate(timeout=SECONDS)
    runner.ended(runner.start_command("/bin/true"), 0)


@pytest.mark.parametrize("options", [("--resource", "https://other.test"), ("--spiffe-id", f"{ME}/else")])
def test_what_is_refused_runs_nothing(runner: Runner, options: tuple[str, ...]) -> None:
    out, err = runner.ended(runner.start("print('it ran')", options=options), 4)
    assert out == "" and "error:" in err


def test_the_chosen_identity_is_used(runner: Runner) -> None:
    out, _ = runner.ended(runner.start(CALL, str(runner.port), options=("--spiffe-id", ME)), 7)
    assert json.loads(out)["body"]["agent"] == ME


def test_a_delegation_that_stands_takes_the_place_of_the_token(runner: Runner) -> None:
    """What a user left standing: the command runs on it over the socket, and ends when they withdraw it."""
    token = runner.directory / "carols"
    token.write_text(runner.estate.dev("user-token", "carol", "-q").stdout)
    made = runner.estate.json(
        "delegation", "create", "--user-token-file", str(token), "--agent", ME, "--purpose", "nightly", "--ttl", "1h",
        "--authorization-details", runner.details,
    )  # fmt: skip
    word = ("--delegation", made["id"])
    told = json.loads(runner.ended(runner.start(CALL, str(runner.port), options=word), 7)[0])
    assert (told["status"], told["body"]["user"], told["body"]["agent"]) == (200, "carol", ME)
    waiting = runner.waiting("heed", *word)
    runner.estate.run("delegation", "revoke", made["id"], "--yes")
    _, err = runner.ended(waiting.process, 4)
    assert "error:" in err
    assert runner.task(waiting.task)["cause"] == "delegation_withdrawn"
    _, err = runner.ended(runner.start("print('it ran')", options=word), 4)
    assert "delegation" in err
    for neither_or_both in ((), (*word, *runner.word)):
        options = [*neither_or_both, "--purpose", "p", "--authorization-details", runner.details]
        runner.estate.run("task", "run", *options, "--resource", runner.resource, "--", "/bin/true", code=2)


def test_a_command_that_is_none(runner: Runner) -> None:
    _, err = runner.ended(runner.start_command("/nonexistent"), 2)
    assert "/nonexistent cannot be run" in err


def test_dry_run(runner: Runner) -> None:
    out, err = runner.ended(runner.start_command("/bin/false", options=("--dry-run",)), 0)
    assert "nothing was sent" in err and "p" in out
