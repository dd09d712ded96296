"""``broker policy`` and ``broker explain task|token`` against a running server, as an operator uses them."""

import asyncio
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from broker.audit.records import Record
from broker.cli.main import main
from broker.server.task_settings import PolicySettings
from broker.server.tasks.policy import bundle as bundles
from tests.attacks.tasks.policy_rig import NO_TASKS, NO_TOKENS, Rig, audit_records, rig
from tests.fakes.oidc import OidcIssuer
from tests.integration.identity_rig import Estate, running
from tests.integration.test_token_endpoint import TICKETS, TRIAGE

APPROVED = (
    '@id("all") permit(principal, action, resource);\n'
    '@id("ask") @requires("approval") forbid(principal, action, resource)'
    ' when { context.actions.contains("ticket.delete") };\n'
    '@id("bob") permit(principal == User::"bob", action == Action::"approve", resource)'
    ' when { principal in Issuer::"ISSUER" && context has auth_age && context.auth_age <= 300 };\n'
)


@pytest.fixture
def estate() -> Iterator[Estate]:
    directory = Path(tempfile.mkdtemp(prefix="broker", dir="/tmp"))
    yield Estate(directory)
    shutil.rmtree(directory)


@pytest.fixture
def oidc(tmp_path: Path) -> Iterator[OidcIssuer]:
    with OidcIssuer.start(tmp_path) as issuer:
        yield issuer


def ended(estate: Estate) -> list[Record]:
    return [one for one in audit_records(estate) if one.event == "task_ended"]


class Shell:
    """Runs commands beside the server, which lives on this thread's loop."""

    def __init__(self, ground: Rig, capsys: pytest.CaptureFixture[str]) -> None:
        self._socket = str(ground.server.socket_path)
        self._capsys = capsys

    async def __call__(self, *command: str, code: int = 0) -> Any:
        self._capsys.readouterr()
        given = await asyncio.to_thread(main, [*command, "--socket", self._socket, "-o", "json", "--yes"])
        shown = self._capsys.readouterr()
        assert given == code, shown.err
        # The server logs to this process's output as well.
        text = shown.out if not code else shown.err
        return json.loads(text[text.index("{\n") if not code else text.index('{"error"') :])


async def test_an_operator_and_the_policy(
    estate: Estate, oidc: OidcIssuer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with rig(estate, oidc) as ground, ground.agent(TRIAGE, "ws_1") as agent:
        shell = Shell(ground, capsys)
        before = await shell("policy", "show")
        assert (before["source"], before["in_force"], before["text"]) == ("built_in", True, bundles.built_in_text())
        task = await ground.start(agent)
        token = await ground.issue(agent, task.id)
        file = tmp_path / "policy.cedar"
        file.write_text(NO_TOKENS)
        dry = await shell("policy", "push", str(file), "--dry-run")
        assert (dry["hash"], dry["in_force"]) == (bundles.hash_of(NO_TOKENS), False)
        assert (await shell("policy", "show"))["hash"] == before["hash"], "a dry run changes nothing"

        await shell("policy", "push", str(file), "--expect", before["hash"])
        after = await shell("policy", "show")
        assert (after["source"], after["hash"]) == ("pushed", bundles.hash_of(NO_TOKENS))
        assert [one["id"] for one in after["rules"]] == ["all", "no-tokens"]
        lost = await shell("policy", "push", str(file), "--expect", "sha-256:other", code=1)
        assert lost["error"]["code"] == "stale_version"
        assert (await shell("policy", "show", "--hash", before["hash"]))["in_force"] is False

        question = ("--agent", str(TRIAGE), "--user", "alice", "--audience", TICKETS, "--do", "ticket.read")
        told = await shell("policy", "explain", *question, "--action", "issueToken")
        assert (told["effect"], told["rules"], told["policy"]) == ("deny", ["no-tokens"], after["hash"])
        assert (await shell("policy", "explain", *question, "--action", "startTask"))["effect"] == "allow"
        assert (await shell("explain", "task", task.id))["effect"] == "allow"
        (tmp_path / "token").write_text(token.access_token)
        told = await shell("explain", "token", f"@{tmp_path / 'token'}")
        assert (told["effect"], told["task"], len(told["parts"])) == ("deny", task.id, 2)

        file.write_text('@id("a") permit(principal, action, resource) when { context.act == 1 };')
        refused = await shell("policy", "push", str(file), code=2)
        assert refused["error"]["code"] == "policy_reads_act"
        assert (await shell("policy", "push", "--built-in"))["hash"] == before["hash"]
        assert [one.fields["source"] for one in ground.records("policy_changed")] == ["built_in", "pushed", "pushed"]


async def test_who_approves_is_explained(
    estate: Estate, oidc: OidcIssuer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with rig(estate, oidc) as ground:
        shell = Shell(ground, capsys)
        question = ("--agent", str(TRIAGE), "--user", "alice", "--audience", TICKETS, "--do", "ticket.delete")
        approve = ("policy", "explain", *question, "--action", "approve")
        assert (await shell(*approve, "--approver", "bob"))["effect"] == "deny", "the built-in policy names nobody"
        file = tmp_path / "policy.cedar"
        file.write_text(APPROVED.replace("ISSUER", oidc.issuer))
        await shell("policy", "push", str(file))
        waits = await shell("policy", "explain", *question, "--action", "startTask")
        assert (waits["effect"], waits["rules"]) == ("approval", ["ask"])
        assert waits["hint"] == "a person has to approve it: broker approval list shows what waits"

        told = await shell(*approve, "--approver", "bob", "--auth-age", "60")
        assert (told["effect"], told["rules"]) == ("allow", ["bob"])
        (part,) = told["parts"]
        assert {one["id"]: one["standing"] for one in part["trace"]} == {
            "all": "does not apply",
            "ask": "does not apply",
            "bob": "applies",
        }
        asked = part["question"]
        assert (asked["approver"], asked["approver_issuer"], asked["auth_age"]) == ("bob", asked["issuer"], 60)
        for other in (("carol",), ("bob", "--approver-issuer", "https://other.example.org")):
            told = await shell(*approve, "--approver", *other, "--auth-age", "60")
            assert (told["effect"], told["code"], told["rules"]) == ("deny", "policy_denied", [])

        for wrong in (approve, ("policy", "explain", *question, "--action", "startTask", "--approver", "bob")):
            refused = await shell(*wrong, code=2)
            assert refused["error"]["code"] == "invalid_question"


async def test_a_policy_file_of_the_settings(estate: Estate, oidc: OidcIssuer, tmp_path: Path) -> None:
    """The file rules from the start, and what an earlier policy let run ends with the first look."""
    async with rig(estate, oidc) as ground, ground.agent(TRIAGE, "ws_1") as agent:
        await ground.start(agent)
    file = tmp_path / "policy.cedar"
    file.write_text(NO_TASKS)
    async with running(estate, policy=PolicySettings(path=file)) as again:
        assert again.is_ready
        async with asyncio.timeout(30):
            while not ended(estate):
                await asyncio.sleep(0.01)
