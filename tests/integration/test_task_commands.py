"""``broker task`` as an operator uses it, against a running server: trees of tasks, seen, stopped, let go on, handed over, ended."""

import asyncio
import json
import shutil
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from broker.cli.main import main
from tests.attacks.tasks.life_rig import NEIGHBOUR, Life, hop, living, refused
from tests.fakes.oidc import OidcIssuer
from tests.integration.identity_rig import Estate

pytestmark = pytest.mark.timeout(180)


@pytest.fixture
async def life(tmp_path: Path) -> AsyncIterator[Life]:
    directory = Path(tempfile.mkdtemp(prefix="broker", dir="/tmp"))
    with OidcIssuer.start(tmp_path) as oidc:
        async with living(Estate(directory), oidc) as one:
            yield one
    shutil.rmtree(directory)


class Shell:
    """Runs commands beside the server, which lives on this thread's loop."""

    def __init__(self, life: Life, captured: pytest.CaptureFixture[str]) -> None:
        self._socket, self._capture = str(life.server.socket_path), captured

    async def text(self, *command: str, code: int = 0) -> tuple[str, str]:
        self._capture.readouterr()
        given = await asyncio.to_thread(main, ["task", *command, "--socket", self._socket, "--yes"])
        shown = self._capture.readouterr()
        assert given == code, shown.err
        return shown.out, shown.err

    async def __call__(self, *command: str) -> Any:
        out, _ = await self.text(*command, "-o", "json")
        # The server logs to this process's output as well.
        return json.loads(out[out.index("{\n") :])

    async def refused(self, *command: str, code: int) -> dict[str, Any]:
        _, err = await self.text(*command, "-o", "json", "-q", code=code)
        error: dict[str, Any] = json.loads(err[err.index('{"error"') :].splitlines()[0])["error"]
        assert error["hint"], "a refusal says what to do next"
        return error


@pytest.fixture
def shell(life: Life, capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(life, capsys)


async def test_a_tree_is_seen_as_it_counts(life: Life, shell: Shell) -> None:
    line = await life.chain(3)
    (top, root), (middle_agent, middle), (leaf_agent, leaf) = line
    beside = await life.child(top, root.id, NEIGHBOUR)

    seen = await shell("tree", leaf.id)
    assert (seen["kind"], [one["id"] for one in seen["items"]]) == ("tasks", [root.id, middle.id, leaf.id, beside.id])
    assert [(one["depth"], one["parent"]) for one in seen["items"]] == [
        (0, ""),
        (1, root.id),
        (2, middle.id),
        (1, root.id),
    ]
    assert {one["state"] for one in seen["items"]} == {"active"}
    out, err = await shell.text("tree", leaf.id)
    table = [line for line in out.splitlines() if "tsk_" in line]
    assert [line.split("tsk_")[0] for line in table] == ["", "├─ ", "│  └─ ", "└─ "]
    assert f"next: broker task revoke {root.id} ends the whole tree" in err

    shown = await shell("show", middle.id)
    assert (shown["children"], shown["resumes"], shown["revocation"]) == (1, 0, None)
    assert shown["act"] == [str(hop(1)), str(hop(0))]
    assert [one["id"] for one in (await shell("list", "--parent", root.id))["items"]] == [middle.id, beside.id]
    assert len((await shell("list", "--root", root.id, "--state", "live"))["items"]) == 4

    await life.change(middle_agent, middle.id, "suspend")
    # The leaf's own state is active; it can do nothing while the one above stands still, and that is what is shown.
    states = {one["id"]: one["state"] for one in (await shell("tree", root.id))["items"]}
    assert states == {root.id: "active", middle.id: "suspended", leaf.id: "suspended", beside.id: "active"}
    assert (await shell("show", leaf.id))["state"] == "suspended"
    await life.change(top, middle.id, "revoke")
    assert [one["id"] for one in (await shell("tree", root.id, "--live"))["items"]] == [root.id, beside.id]
    assert [one["state"] for one in (await shell("tree", middle.id, "--below"))["items"]] == ["revoked", "cascaded"]
    assert (await shell("tree", middle.id, "--below", "--live"))["items"] == []
    out, _ = await shell.text("tree", root.id, "-o", "name")
    assert out.split() == [f"task/{one}" for one in (root.id, middle.id, leaf.id, beside.id)]
    assert (await shell.refused("tree", "tsk_unknown", code=3))["code"] == "task_unknown"
    assert leaf_agent.session.id == "ws_hop2"


async def test_an_operator_suspends_and_resumes(life: Life, shell: Shell) -> None:
    agent = await life.agent(hop(0), "ws_1")
    task = await life.start(agent)
    token = await life.issue(agent, task.id)
    assert await life.is_active(token)

    dry = await shell("suspend", task.id, "--reason", "looks odd", "--dry-run")
    assert dry == {"kind": "task", "id": task.id, "operation": "suspend", "reason": "looks odd"}
    assert await life.is_active(token)
    stale = await shell.refused("suspend", task.id, "--expected-version", "7", code=1)
    assert stale["code"] == "stale_version"

    held = await shell(
        "suspend", task.id, "--reason", "looks odd", "--expected-version", "1", "--idempotency-key", "s-1"
    )
    assert (held["state"], held["cause"], held["version"]) == ("suspended", "operator", 2)
    assert held["revocation"]["state"] in {"closed", "partial", "unknown"}
    assert not await life.is_active(token)
    assert await life.verifier(token) == "task_suspended"
    assert await refused(life.change(agent, task.id, "resume")) == "resume_not_allowed"
    assert (await shell("show", task.id))["revocation"] is not None

    resumed = await shell("resume", task.id, "--reason", "it was right")
    assert (resumed["state"], resumed["version"], resumed["revocation"]) == ("active", 3, None)
    assert not await life.is_active(token), "no token comes back"
    assert await life.is_active(await life.issue(agent, task.id))
    again = await shell(
        "suspend", task.id, "--reason", "looks odd", "--expected-version", "1", "--idempotency-key", "s-1"
    )
    assert (again["state"], again["version"]) == ("suspended", 2), "the repetition is told what the first was told"
    assert (await shell("show", task.id))["state"] == "active", "and does nothing"
    assert (await shell.refused("resume", task.id, code=1))["code"] == "conflict"
    assert (await shell.refused("resume", "tsk_unknown", code=3))["code"] == "task_unknown"
    assert (await shell.refused("suspend", "no such id", code=3))["code"] == "task_unknown"

    (suspended,) = life.records("task_suspended")
    assert suspended.actor.startswith("operator:")
    assert (suspended.subject, suspended.fields["reasons"]) == (task.id, ("looks odd",))
    (went_on,) = life.records("task_resumed")
    assert (went_on.actor, went_on.fields["reasons"]) == (suspended.actor, ("it was right",))
    refusals = [(one.actor == suspended.actor, one.fields["reason"]) for one in life.records("task_refused")]
    assert refusals[:3] == [(True, "stale_version"), (False, "resume_not_allowed"), (True, "conflict")]


async def test_an_operator_hands_a_task_over_and_ends_it(life: Life, shell: Shell) -> None:
    line = await life.chain(2)
    (agent, root), (below_agent, below) = line
    tokens = [await life.issue(one, task.id) for one, task in line]
    unknown = await shell.refused("handoff", root.id, "--to", "spiffe://example.org/nobody", code=4)
    assert unknown["code"] == "agent_unknown"
    heir_agent = await life.agent(NEIGHBOUR, "ws_heir")
    given = await shell("handoff", root.id, "--to", str(NEIGHBOUR), "--reason", "the first one is stuck")
    heir = given["successor"]
    assert (given["state"], given["cause"]) == ("superseded", "handed_off")
    assert (heir["supersedes"], heir["agent"], heir["state"]) == (root.id, str(NEIGHBOUR), "active")
    assert [await life.verifier(token) for token in tokens] == ["task_ended", "task_ended"]
    assert [await life.is_active(token) for token in tokens] == [False, False]
    assert (await shell("show", below.id))["state"] == "cascaded", "what hung below does not move along"
    assert await refused(life.issue(agent, heir["id"])) == "task_unknown"
    token = await life.issue(heir_agent, heir["id"])
    shown = await shell("show", heir["id"])
    assert (shown["act"], shown["supersedes"]) == ([str(NEIGHBOUR), str(hop(0))], root.id)
    (ended,) = life.about(root.id, "task_ended")
    assert (ended.fields["cause"], ended.fields["reasons"]) == ("handed_off", ("the first one is stuck",))
    (begun,) = life.about(heir["id"], "task_started")
    assert (begun.actor, begun.fields["supersedes"]) == (ended.actor, root.id)

    over = await shell("revoke", heir["id"], "--expected-version", str(shown["version"]))
    assert (over["state"], over["cause"]) == ("revoked", "operator")
    assert not await life.is_active(token)
    assert (await shell.refused("handoff", heir["id"], "--to", str(hop(0)), code=4))["code"] == "task_ended"
    assert (await shell.refused("suspend", heir["id"], code=1))["code"] == "conflict"
    assert below_agent.session.id == "ws_hop1"


async def test_nobody_is_asked_without_a_person(life: Life, shell: Shell, capsys: pytest.CaptureFixture[str]) -> None:
    agent = await life.agent(hop(0), "ws_1")
    task = await life.start(agent)
    for verb in (["revoke", task.id], ["handoff", task.id, "--to", str(NEIGHBOUR)]):
        given = await asyncio.to_thread(main, ["task", *verb, "--socket", str(life.server.socket_path), "--no-input"])
        assert given == 2
        assert "add --yes" in capsys.readouterr().err
    assert life.records("task_ended") == []
