"""The whole of an approval between programs: an agent with the SDK on a node, the server, a real OpenID issuer, a person at the command and by HTTPS."""

import asyncio
import json
import os
import ssl
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest

from broker.dev.configuration import NODE_ALIAS, Plan
from broker.dev.estate import Estate as Programs
from broker.dev.issuer import AUDIENCE
from broker.spiffe.jose import parse_compact
from tests.attacks.tasks.approval_rig import POLICY, TRANSFER
from tests.integration.test_cli import Estate

pytestmark = pytest.mark.timeout(240)
BANK = "https://bank.dev.test"
ME = "spiffe://dev.test/payer"
SECONDS = 60.0
AGENT = """
import asyncio, json, sys
from broker.errors import BrokerError
from broker.sdk import Workload

async def main():
    loop, details = asyncio.get_running_loop(), json.loads(sys.argv[2])
    async with Workload.connect() as me:
        with open(sys.argv[1]) as word:
            token = word.read().strip()
        async with me.task(user_token=token, purpose="pay the invoice", authorization_details=details) as task:
            while await loop.run_in_executor(None, sys.stdin.readline):
                try:
                    told = {"token": await task.token(sys.argv[3])}
                except BrokerError as error:
                    told = {"code": error.reason}
                print(json.dumps(told | {"task": task.id}), flush=True)

asyncio.run(main())
"""


@dataclass
class Office:
    """The estate, an agent that asks when it is told to, and people."""

    estate: Estate
    agent: subprocess.Popen[str]

    def ask(self) -> dict[str, Any]:
        """Have the agent ask for its token; give what it was told."""
        assert self.agent.stdin is not None and self.agent.stdout is not None
        self.agent.stdin.write("\n")
        self.agent.stdin.flush()
        line = self.agent.stdout.readline()
        assert line, self.agent.communicate(timeout=SECONDS)
        told: dict[str, Any] = json.loads(line)
        return told

    def person(self, name: str) -> str:
        return self.estate.dev("user-token", name, "-q").stdout.strip()

    def waiting(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.estate.json("approval", "list")["items"]
        return found

    def http(self) -> httpx2.Client:
        """A person's own application: it trusts the server's bundle, and has no certificate."""
        context = ssl.create_default_context(cadata=self.estate.run("bundle", "show", "--format", "pem").stdout)
        return httpx2.Client(
            verify=context, base_url=f"https://{self.estate.environment['BROKER_ADDR']}", trust_env=False
        )


@pytest.fixture
def office() -> Iterator[Office]:
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        directory = Path(name)
        programs = Programs(directory / "e", plan=Plan(audiences=(BANK,), approval_clients=[AUDIENCE]))
        agent: subprocess.Popen[str] | None = None
        try:
            asyncio.run(programs.up(lambda _: None))
            plain = {n: v for n, v in os.environ.items() if not n.startswith(("BROKER_", "SPIFFE_"))}
            estate = Estate(directory / "e", {**plain, **programs.environment()})
            estate.run(
                "entry", "create", "--spiffe-id", ME, "--parent-id", NODE_ALIAS, "--may-start-tasks",
                "--selector", f"unix:uid:{os.geteuid()}",
            )  # fmt: skip
            (directory / "policy.cedar").write_text(POLICY)
            estate.run("policy", "push", str(directory / "policy.cedar"), "--yes")
            word = directory / "alice"
            word.write_text(estate.dev("user-token", "alice", "-q").stdout)
            (directory / "agent.py").write_text(AGENT)
            details = [{"type": "api", "locations": [BANK], "actions": [TRANSFER], "identifier": "inv-4711"}]
            agent = subprocess.Popen(
                [sys.executable, str(directory / "agent.py"), str(word), json.dumps(details), BANK],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=estate.environment,
            )  # fmt: skip
            yield Office(estate, agent)
        finally:
            if agent is not None:
                agent.communicate(timeout=SECONDS)
            programs.down()


@pytest.mark.bears("RV17", "RV18")
def test_an_agent_asks_and_people_decide(office: Office) -> None:
    assert office.ask()["code"] == "approval_pending"
    [waits] = office.waiting()
    assert (waits["user"], waits["agent"], waits["audience"], waits["purpose"]) == (
        "alice",
        ME,
        BANK,
        "pay the invoice",
    )
    own = office.estate.error(
        "approval", "approve", waits["id"], "--user-token-file", "-", stdin=office.person("alice"), code=4
    )
    assert own["code"] == "approver_is_requester"
    stranger = office.estate.error(
        "approval", "approve", waits["id"], "--user-token-file", "-", stdin=office.person("mallory"), code=3
    )
    assert stranger["code"] == "approval_unknown"
    given = office.estate.json(
        "approval", "approve", waits["id"], "--user-token-file", "-", stdin=office.person("carol")
    )
    assert (given["state"], given["decided_by"]) == ("approved", "carol")
    told = office.ask()
    claims = parse_compact(told["token"]).payload
    assert (claims["sub"], claims["act"], claims["task"]["use"]) == ("alice", {"sub": ME}, "once")
    shown = office.estate.json("approval", "show", waits["id"])
    assert (shown["state"], shown["task"]) == ("used", told["task"])

    # Taken back by the person's own application; what it had permitted is dead.
    with office.http() as application:
        carol = {"authorization": f"Bearer {office.person('carol')}"}
        assert application.get("/approvals", headers=carol).json() == {"approvals": []}
        taken = application.post(f"/approvals/{waits['id']}/withdraw", headers=carol, json={"reason": "wrong shop"})
        assert (taken.status_code, taken.json()["state"]) == (200, "withdrawn")
        # What served once was not kept: the agent asks anew.
        told = office.ask()
        assert told["code"] == "approval_denied"
        nobody = application.post(f"/approvals/{waits['id']}/approve")
        assert (nobody.status_code, nobody.json()["error"]) == (401, "invalid_client")
    assert office.waiting() == []
