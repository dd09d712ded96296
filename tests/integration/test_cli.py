"""The command against a real estate: started by ``broker dev up``, used as an operator and as a workload would."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from broker.dev.processes import identify

pytestmark = pytest.mark.timeout(240)
NODE = "spiffe://dev.test/node/dev"
ME = "spiffe://dev.test/cli"
AUDIENCE = "https://tickets.dev.test"
DETAILS = json.dumps([{"type": "api", "locations": [AUDIENCE], "actions": ["ticket.read"]}])


@dataclass
class Estate:
    directory: Path
    environment: dict[str, str]

    def run(self, *arguments: str, stdin: str = "", code: int = 0) -> subprocess.CompletedProcess[str]:
        """Run one command line; it must end with this exit code."""
        ended = subprocess.run(
            [sys.executable, "-m", "broker.cli.main", *arguments],
            capture_output=True,
            text=True,
            input=stdin,
            check=False,
            timeout=90,
            env=self.environment,
        )
        assert ended.returncode == code, (arguments, ended.stdout, ended.stderr)
        return ended

    def json(self, *arguments: str, stdin: str = "") -> dict[str, Any]:
        answer: dict[str, Any] = json.loads(self.run(*arguments, "-o", "json", stdin=stdin).stdout)
        return answer

    def error(self, *arguments: str, code: int, stdin: str = "") -> dict[str, Any]:
        ended = self.run(*arguments, "-o", "json", "-q", code=code, stdin=stdin)
        assert ended.stdout == ""
        error: dict[str, Any] = json.loads(ended.stderr)["error"]
        assert error["hint"]
        return error

    def dev(self, verb: str, *more: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        return self.run("dev", verb, *more, "--directory", str(self.directory), code=code)


@pytest.fixture(scope="module")
def estate() -> Iterator[Estate]:
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        directory = Path(name) / "e"
        plain = {n: v for n, v in os.environ.items() if not n.startswith(("BROKER_", "SPIFFE_"))}
        made = Estate(directory, plain)
        try:
            made.dev("up")
            made.environment = {**plain, **variables(made)}
            yield made
        finally:
            made.dev("down", "--purge", "--yes")
        assert not directory.exists()


def variables(estate: Estate) -> Mapping[str, str]:
    """What ``broker dev shell`` sets, told by a shell that it opens."""
    shell = estate.directory.parent / "shell"
    shell.write_text("#!/bin/sh\nenv\n")
    shell.chmod(0o700)
    estate.environment = {**estate.environment, "SHELL": str(shell)}
    pairs = (line.split("=", 1) for line in estate.dev("shell").stdout.splitlines() if "=" in line)
    return {name: value for name, value in pairs if name.startswith(("BROKER_", "SPIFFE_"))}


@pytest.fixture(scope="module")
def identity(estate: Estate) -> str:
    """An entry that gives this very user's Python processes an identity which may start tasks."""
    made = estate.json(
        "entry", "create", "-spiffeID", ME, "-parentID", NODE, "-selector", f"unix:uid:{os.geteuid()}",
        "--may-start-tasks", "--admin",
    )  # fmt: skip
    return str(made["id"])


@pytest.fixture(scope="module")
def user_token(estate: Estate) -> str:
    token = estate.dev("user-token", "alice", "-q").stdout
    path = estate.directory.parent / "user-token"
    path.write_text(token)
    return str(path)


def parts(estate: Estate) -> dict[str, dict[str, Any]]:
    ended = estate.run("dev", "status", "-o", "json", "--directory", str(estate.directory))
    return {part["name"]: part for part in json.loads(ended.stdout)["items"]}


def test_up_is_idempotent(estate: Estate) -> None:
    before = parts(estate)
    assert {part["state"] for part in before.values()} == {"running"}
    estate.dev("up")
    assert {n: p["pid"] for n, p in parts(estate).items()} == {n: p["pid"] for n, p in before.items()}


def test_nothing_listens_beyond_loopback(estate: Estate) -> None:
    """The programs forbid a look at their descriptors, so their ports are found by number."""
    ports = {int(parts(estate)[part]["address"].rpartition(":")[2]) for part in ("issuer", "server")}
    seen = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/self/net/{table}").read_text().splitlines()[1:]:
            address, _, port = line.split()[1].partition(":")
            if line.split()[3] == "0A" and int(port, 16) in ports:  # listening
                assert address == "0100007F"
                seen.add(int(port, 16))
    assert seen == ports


def test_health(estate: Estate) -> None:
    assert estate.json("server", "health")["status"] == "serving"
    assert estate.json("agent", "health")["status"] == "serving"


def test_entries(estate: Estate, identity: str) -> None:
    assert estate.json("entry", "show", identity)["spiffe_id"] == ME
    listed = estate.json("entry", "list", "--spiffe-id", ME)
    assert listed["kind"] == "entries"
    assert [one["id"] for one in listed["items"]] == [identity]
    assert estate.run("entry", "list", "-spiffeID", ME, "-o", "name").stdout == f"entry/{identity}\n"
    same = ("entry", "create", "-spiffeID", ME, "-parentID", NODE, "-selector", f"unix:uid:{os.geteuid()}")
    assert "exists" in estate.error(*same, code=1)["message"]
    assert "not_found" in estate.error("entry", "show", "nothing", code=3)["code"]


def test_an_entry_comes_and_goes(estate: Estate) -> None:
    made = estate.json("entry", "create", "--spiffe-id", f"{ME}/2", "--parent-id", NODE, "--selector", "unix:uid:4242")
    ended = estate.run("entry", "delete", made["id"])
    assert "deleted" in ended.stderr
    assert "next: " in ended.stderr
    estate.error("entry", "delete", made["id"], code=3)


def test_a_join_token(estate: Estate) -> None:
    made = estate.json("join-token", "create", "--spiffe-id", "spiffe://dev.test/node/other", "--ttl", "5m")
    assert made["kind"] == "join_token"
    assert len(made["token"]) >= 16
    assert estate.run("join-token", "create", "-q").stdout.strip() != made["token"]


def test_svid_x509(estate: Estate, identity: str) -> None:
    (svid,) = estate.json("svid", "x509")["items"]
    assert svid["spiffe_id"] == ME
    assert "PRIVATE KEY" not in json.dumps(svid)
    directory = estate.directory.parent / "written"
    (svid,) = estate.json("svid", "x509", "-write", str(directory))["items"]
    files = {Path(name).name: Path(name) for name in svid["files"]}
    assert set(files) == {"svid.0.key", "svid.0.pem", "bundle.0.pem"}
    assert {path.stat().st_mode & 0o777 for path in files.values()} == {0o600}
    assert files["svid.0.pem"].read_text() == svid["certificates"]
    assert files["svid.0.key"].read_text().startswith("-----BEGIN PRIVATE KEY-----")


def test_svid_jwt(estate: Estate, identity: str) -> None:
    raw = estate.run("svid", "jwt", "-audience", "a", "-q").stdout
    assert raw.count(".") == 2
    assert raw.endswith("\n")
    answer = json.loads(estate.run("svid", "jwt", "--audience", "a", "--format", "json").stdout)
    assert answer["items"][0]["spiffe_id"] == ME
    valid = estate.json("svid", "validate", "--audience", "a", stdin=raw)
    assert (valid["spiffe_id"], valid["claims"]["aud"]) == (ME, ["a"])
    assert estate.error("svid", "validate", "--audience", "b", code=5, stdin=raw)


def test_a_process_in_no_entry_is_refused(estate: Estate) -> None:
    estate.error("svid", "jwt", "--audience", "a", "--spiffe-id", "spiffe://dev.test/else", code=4)


def test_the_admin_api_over_tls(estate: Estate, identity: str) -> None:
    """As an admin workload: the server is known by its SPIFFE ID, we by the SVID that the agent gives us."""
    found = estate.json("entry", "list", "--addr", estate.environment["BROKER_ADDR"])
    assert identity in [one["id"] for one in found["items"]]


def test_token_verify_fetches_the_keys_from_the_server(estate: Estate) -> None:
    """Under the root that BROKER_CACERT names; the token is none, and that is what is said."""
    server = f"https://{estate.environment['BROKER_ADDR']}"
    given = ("token", "verify", "--audience", AUDIENCE, "--issuer", server, "--keys", f"{server}/keys")
    assert estate.error(*given, stdin="a.b.c", code=5)["code"].startswith("token_")
    assert estate.error(*given, "--cacert", "/nonexistent", stdin="a.b.c", code=75)["code"] == "keys_unavailable"


def start(estate: Estate, user_token: str, *more: str) -> list[str]:
    return [
        "task",
        "start",
        "--user-token-file",
        user_token,
        "--purpose",
        "p",
        "--authorization-details",
        DETAILS,
        *more,
    ]


def test_a_task_that_nobody_holds(estate: Estate, identity: str, user_token: str) -> None:
    task = estate.json(*start(estate, user_token, "--supervision", "none", "--ttl", "10m"))
    assert (task["user"], task["agent"], task["state"]) == ("alice", ME, "active")
    assert task["id"] in [one["id"] for one in estate.json("task", "list", "--state", "active")["items"]]
    assert estate.json("task", "show", task["id"])["purpose"] == "p"
    ended = estate.json("task", "revoke", task["id"], "--reason", "a test")
    assert ended["state"] == "revoked"
    other = estate.json(*start(estate, user_token, "--supervision", "none"))
    assert estate.json("task", "complete", other["id"])["state"] == "completed"
    assert estate.error("task", "show", "tsk_none", code=3)


def test_a_user_token_that_is_none_is_refused(estate: Estate, identity: str) -> None:
    wrong = start(estate, "-", "--supervision", "none")
    assert estate.error(*wrong, code=2, stdin="a.b.c")["code"].startswith("token_")


def held(estate: Estate, user_token: str) -> tuple[subprocess.Popen[str], str]:
    """A command that holds a task, and the task's id."""
    process = subprocess.Popen(
        [sys.executable, "-m", "broker.cli.main", *start(estate, user_token)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=estate.environment,
    )
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


def test_a_held_task_ends_with_ctrl_c(estate: Estate, identity: str, user_token: str) -> None:
    process, task = held(estate, user_token)
    assert estate.json("task", "show", task)["state"] == "active"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert f"{task} is completed" in err
    assert estate.json("task", "show", task)["state"] == "completed"


def test_a_held_task_ends_with_its_process(estate: Estate, identity: str, user_token: str) -> None:
    process, task = held(estate, user_token)
    process.kill()
    process.communicate(timeout=30)
    deadline = time.monotonic() + 20
    while (shown := estate.json("task", "show", task))["state"] == "active":
        assert time.monotonic() < deadline
    assert shown["state"] == "revoked"
    assert shown["cause"]


def test_the_end_of_a_held_task_is_told(estate: Estate, identity: str, user_token: str) -> None:
    process, task = held(estate, user_token)
    estate.run("task", "revoke", task)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 4
    assert "the task has ended" in err


def test_a_part_that_died_is_started_again(estate: Estate, identity: str) -> None:
    agent = parts(estate)["agent"]["pid"]
    os.kill(agent, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while identify(agent) is not None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert "broker dev up" in estate.dev("status", code=75).stderr
    estate.dev("up")
    assert parts(estate)["agent"]["pid"] != agent
    assert estate.json("svid", "x509")["items"][0]["spiffe_id"] == ME


def test_down_and_up_keeps_what_was_registered(estate: Estate, identity: str, user_token: str) -> None:
    server = parts(estate)["server"]["pid"]
    ended = estate.dev("down")
    assert "ended: agent, server, issuer" in ended.stderr
    assert identify(server) is None
    estate.dev("up")
    assert estate.json("entry", "show", identity)["spiffe_id"] == ME
    assert estate.json("svid", "x509")["items"][0]["spiffe_id"] == ME
