"""The how-to of approvals: its settings are taken, its policy is put in force by its commands, and each of its lines does what it says."""

import json
import re
import shlex
import shutil
import tempfile
import tomllib
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from broker.server.task_settings import SubjectSettings
from tests.attacks.tasks.approval_rig import APP, BANK, Bank, bank, payment
from tests.fakes.oidc import OidcIssuer
from tests.integration.identity_rig import Estate
from tests.integration.test_approval_commands import shell
from tests.integration.test_token_endpoint import TRIAGE, Process

pytestmark = pytest.mark.timeout(180)  # a dozen commands, each a process
TEXT = (Path(__file__).resolve().parents[2] / "docs/how-to/approve-actions.md").read_text(encoding="utf-8")
BLOCKS = dict(re.findall(r"<!-- (\S+) -->\n```\w+\n(.*?)```", TEXT, re.DOTALL))
LINES = re.findall(r"^\$ broker (.*)$", TEXT, re.MULTILINE)


@pytest.fixture
def estate() -> Iterator[Estate]:
    directory = Path(tempfile.mkdtemp(prefix="broker", dir="/tmp"))
    yield Estate(directory)
    shutil.rmtree(directory)


@pytest.fixture
def oidc(tmp_path: Path) -> Iterator[OidcIssuer]:
    with OidcIssuer.start(tmp_path) as issuer:
        yield issuer


class Reader:
    """Somebody who follows the guide: each line on an approval that it makes sense for."""

    def __init__(self, ground: Bank, agent: Process, task: str) -> None:
        self._ground, self._agent, self._task = ground, agent, task
        self._amount = 100
        self._current = ""

    async def asks(self) -> str:
        """Have the agent ask for one more payment, of another amount."""
        self._amount += 1
        answer = await self._ground.ask_https(self._agent, self._task, payment(str(self._amount)))
        assert answer.json()["error"] == "authorization_pending", answer.text
        found: str = answer.json()["approval"]
        return found

    async def which(self, line: str) -> str:
        """Give the approval that a line is about: what waits, or for a withdrawal what was approved."""
        state = (await self._ground.seen(self._current))["state"] if self._current else ""
        if "withdraw" in line:
            if state != "approved":
                self._current = await self.asks()
                assert (await self._ground.say(self._current)).status_code == 200
        elif state != "pending":
            self._current = await self.asks()
        return self._current


@pytest.fixture
async def ground(estate: Estate, oidc: OidcIssuer) -> AsyncIterator[Bank]:
    async with bank(estate, oidc) as one:
        yield one


def test_the_settings_are_taken() -> None:
    [table] = tomllib.loads(BLOCKS["server.toml"])["server"]["subjects"]
    read = SubjectSettings(**table)
    assert (read.clients, read.approval_clients, read.approval_max_age.total_seconds()) == ((APP,), (APP,), 300)


async def test_each_line_does_what_it_says(ground: Bank, oidc: OidcIssuer, tmp_path: Path) -> None:
    (tmp_path / "policy.cedar").write_text(BLOCKS["policy.cedar"])
    (tmp_path / "carol.jwt").write_text(ground.person())
    server = ground.rig.server
    first = [line for line in LINES if line.startswith("policy ")]
    explained = ""
    for line in first:
        words = shlex.split(line.replace("https://idp.example.org", oidc.issuer))
        explained, _ = await shell(server, *words, cwd=tmp_path)
    assert len(first) == 3
    assert "finance-decides" in explained
    assert "allow" in explained

    async with ground.rig.agent(TRIAGE, "ws_triage") as agent:
        task = (await ground.start(agent)).id
        waits = await ground.ask_https(agent, task, json.loads(BLOCKS["details.json"]))
        assert (waits.status_code, waits.headers["retry-after"]) == (400, "5")
        assert waits.json()["error"] == "authorization_pending"
        reader, states = Reader(ground, agent, task), []
        for line in BLOCKS["requests"].splitlines():
            states.append(await requested(ground, reader, line))
        assert states == ["listed", "pending", "approved", "denied", "withdrawn"]
        metadata = (await ground.people.get("/.well-known/oauth-authorization-server")).json()
        assert metadata["approvals_endpoint"].endswith("/approvals")

        states = []
        for line in LINES[len(first) :]:
            words = [await reader.which(line) if word == "ID" else word for word in shlex.split(line)]
            out, _ = await shell(server, *words, "-o", "json", cwd=tmp_path)
            shown: dict[str, Any] = json.loads(out)
            states.append(shown.get("state", "listed"))
        assert states == ["listed", "pending", "approved", "withdrawn", "listed", "denied", "withdrawn"]


async def requested(ground: Bank, reader: Reader, line: str) -> str:
    """Send a request as the guide writes it; give the state that is answered."""
    method, address, *body = line.split(" ", 2)
    if "ID" in address:
        address = address.replace("ID", await reader.which(line))
    headers = {"authorization": f"Bearer {ground.person()}"}
    sent = {"json": json.loads(body[0])} if body else {}
    answer = await ground.people.request(method, address, headers=headers, **sent)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    if "approvals" in found:
        assert {one["audience"] for one in found["approvals"]} == {BANK}
    return str(found.get("state", "listed"))


def test_what_the_guide_names_is_there() -> None:
    from broker.audit.events import Event  # noqa: PLC0415 - for their names alone

    named = set(
        re.findall(r"`(approval_(?:requested|given|denied|withdrawn|expired|refused))`", TEXT.rpartition("## ")[2])
    )
    assert named == {one.value for one in Event if one.value.startswith("approval_")}
