"""Attacks on the life of tasks, through the real TLS port, the node agent's channel and the admin socket, with the audit record."""

import asyncio
import os
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx2
import pytest

from broker._proto.broker.server.v1 import tasks_pb2
from broker.server.failpoints import EXIT_STATUS
from tests.attacks.tasks.life_rig import (
    NEIGHBOUR,
    Life,
    environment_of,
    hop,
    inhabited,
    living,
    refused,
    settings_of,
)
from tests.fakes.oidc import OidcIssuer
from tests.fakes.replicas import Replica, replica
from tests.integration.identity_rig import Estate, running
from tests.integration.test_token_endpoint import TRIAGE, Process

pytestmark = pytest.mark.timeout(180)

DEADLINE = 30.0


@pytest.fixture
async def life(ground_of: Estate, oidc: OidcIssuer) -> AsyncIterator[Life]:
    async with living(ground_of, oidc) as one:
        yield one


async def until(condition: Any, what: str) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline, what
        await asyncio.sleep(0.02)


async def state_of(life: Life, *task_ids: str) -> list[str]:
    return [(await life.operator.get(each)).state for each in task_ids]


def refusals(life: Life) -> list[str]:
    return [str(one.fields["reason"]) for one in life.records("task_refused", "token_refused")]


async def post(agent: Process, task: tasks_pb2.Task | str, verb: str, key: str = "", **form: str) -> httpx2.Response:
    task_id = task if isinstance(task, str) else task.id
    headers = {"idempotency-key": key} if key else {}
    return await agent.http.post(f"/tasks/{task_id}/{verb}", data=form, headers=headers)


def code(response: httpx2.Response, status: int) -> str:
    assert response.status_code == status, response.text
    found: str = response.json()["error_code"]
    return found


# ---- repetitions, versions, restarts


@pytest.mark.bears("RV12")
async def test_what_comes_late_is_told_the_first_answer_and_revives_nothing(life: Life) -> None:
    agent = await life.agent(TRIAGE, "ws_1")
    task = await life.start(agent)
    tokens = [await life.issue(agent, task.id)]
    suspended = await post(agent, task, "suspend", "s")
    resumed = await post(agent, task, "resume", "r")
    assert (suspended.json()["version"], resumed.json()["version"]) == (2, 3)
    tokens.append(await life.issue(agent, task.id))
    # A retry of the suspension that was under way for long: the answer of then, and nothing happens.
    late = await post(agent, task, "suspend", "s")
    assert (late.status_code, late.json()["state"], late.json()["version"]) == (200, "suspended", 2)
    assert [await life.is_active(each) for each in tokens] == [False, True]
    assert await state_of(life, task.id) == ["active"]
    # The same key for something else.
    assert code(await post(agent, task, "resume", "s"), 409) == "idempotency_mismatch"
    assert code(await post(agent, task, "suspend", "s", expected_version="3"), 409) == "idempotency_mismatch"
    await life.operator.change(task.id, "revoke", reason="stop")
    late = await post(agent, task, "resume", "r")
    assert (late.status_code, late.json()["state"], late.json()["version"]) == (200, "active", 3), "as it was told then"
    for verb in ("resume", "suspend", "complete"):
        assert code(await post(agent, task, verb), 409) == "conflict"
    assert await refused(life.operator.change(task.id, "resume")) == "conflict"
    assert await refused(life.issue(agent, task.id)) == "task_ended"
    assert await state_of(life, task.id) == ["revoked"]
    assert [await life.is_active(each) for each in tokens] == [False, False]
    assert [await life.verifier(each) for each in tokens] == ["task_ended", "task_ended"]
    counts = {event: len(life.about(task.id, event)) for event in ("task_suspended", "task_resumed", "task_ended")}
    assert counts == {"task_suspended": 1, "task_resumed": 1, "task_ended": 1}
    assert refusals(life) == ["idempotency_mismatch", "idempotency_mismatch", *["conflict"] * 4, "task_ended"]


@pytest.mark.bears("RV12")
async def test_an_agent_that_pauses_first_does_not_undo_an_operators_suspension(life: Life) -> None:
    agent = await life.agent(TRIAGE, "ws_1")
    task = await life.start(agent)
    token = await life.issue(agent, task.id)
    assert (await post(agent, task, "suspend")).json()["cause"] == "paused"
    held = (await life.operator.change(task.id, "suspend", reason="what is it doing?")).task
    assert (held.state, held.cause, held.version) == ("suspended", "operator", 3)
    assert code(await post(agent, task, "resume"), 403) == "resume_not_allowed"
    # Its own pause takes nothing back, and the operator's again is the same.
    assert (await post(agent, task, "suspend")).json()["cause"] == "operator"
    assert (await life.operator.change(task.id, "suspend")).task.version == 3
    assert code(await post(agent, task, "resume"), 403) == "resume_not_allowed"
    assert await refused(life.issue(agent, task.id)) == "task_suspended"
    assert [record.actor for record in life.about(task.id, "task_suspended")] == [
        str(TRIAGE),
        f"operator:uid:{os.getuid()}",
    ]
    assert (await life.operator.change(task.id, "resume")).task.state == "active"
    assert not await life.is_active(token)


@pytest.mark.bears("RV13")
async def test_of_two_operators_one_has_read_too_early(life: Life) -> None:
    agent = await life.agent(TRIAGE, "ws_1")
    task = await life.start(agent)
    assert (await life.operator.change(task.id, "suspend", expected_version=1)).task.version == 2
    assert await refused(life.operator.change(task.id, "revoke", expected_version=1)) == "stale_version"
    assert await refused(life.operator.revoke(task.id, expected_version=1)) == "stale_version"
    assert await state_of(life, task.id) == ["suspended"]
    # Both at once with the same reading: one is first.
    both = [_outcome(life.operator.change(task.id, "resume", expected_version=2)) for _ in range(2)]
    assert sorted(await asyncio.gather(*both)) == ["done", "stale_version"]
    # At the other door it is 409.
    for verb, form in (("suspend", {}), ("revoke", {}), ("complete", {}), ("handoff", {"to": str(hop(0))})):
        await life.agent(hop(0), "ws_hop0")
        assert code(await post(agent, task, verb, expected_version="2", **form), 409) == "stale_version", verb
    assert await state_of(life, task.id) == ["active"]
    assert refusals(life) == ["stale_version"] * 7
    assert life.records("task_ended") == []
    assert (await post(agent, task, "complete", expected_version="3")).status_code == 200


async def _outcome(asked: Any) -> str:
    try:
        await asked
    except Exception as error:  # noqa: BLE001 - its code is looked at
        return getattr(error, "reason", repr(error))
    return "done"


@pytest.mark.bears("RV14")
async def test_a_restarted_agent_has_nothing_by_what_it_saved(life: Life) -> None:
    first = await life.agent(TRIAGE, "ws_1")
    task = await life.start(first)
    saved = await life.issue(first, task.id)
    assert (await post(first, task, "suspend")).status_code == 200
    second = await life.agent(TRIAGE, "ws_2")
    # While the first process lives the task is its own, and so is the token, at every door.
    assert await refused(life.change(second, task.id, "resume")) == "session_mismatch"
    assert await refused(life.issue(second, task.id)) == "session_mismatch"
    await life.exits(first)
    assert await refused(life.change(first, task.id, "resume")) == "session_ended"
    resumed = (await life.change(second, task.id, "resume", expected_version=2)).task
    assert (resumed.id, resumed.state, resumed.version) == (task.id, "active", 3)
    (record,) = life.about(task.id, "task_resumed")
    assert (record.fields["resumed_from"], record.fields["session"]) == ("ws_1", "ws_2")
    # What it finds in its workspace is dead; what it asks for anew lives.
    assert not await life.is_active(saved)
    assert await life.verifier(saved) != "alive"
    again = {name: value for name, value in life.form(subject_token=saved).items() if name != "purpose"}
    del again["authorization_details"]
    answer = await second.http.post("/token", data=again)
    assert (answer.status_code, answer.json()["error_code"]) == (400, "subject_ended")
    fresh = await life.issue(second, task.id)
    assert await life.is_active(fresh)
    assert await life.verifier(fresh) == "alive"
    assert refusals(life) == ["session_mismatch", "session_mismatch", "session_ended", "subject_ended"]


# ---- time


@pytest.mark.bears("RV04", "V06")
async def test_what_hangs_below_an_expired_task_ends_with_the_one_above(life: Life) -> None:
    """The deadline of the one between passes with nobody calling; then its parent is revoked."""
    top_agent, middle_agent, leaf_agent = [await life.agent(hop(each), f"ws_hop{each}") for each in range(3)]
    top = await life.start(top_agent)
    beside = await life.child(top_agent, top.id, NEIGHBOUR)
    middle = await life.child(top_agent, top.id, hop(1), ttl=3)
    leaf = await life.child(middle_agent, middle.id, hop(2), ttl=600)
    assert leaf.expires_at <= middle.expires_at, "nothing outlives what is above it"
    token = await life.issue(leaf_agent, leaf.id)
    assert await life.is_active(token)
    await until(lambda: time.time() > middle.expires_at, "the deadline never came")
    # By the clock alone, whether anybody has written it down or not.
    assert not await life.is_active(token)
    assert await refused(life.issue(leaf_agent, leaf.id)) == "task_ended"
    assert set(await state_of(life, middle.id, leaf.id)) <= {"expired", "cascaded"}
    over = await life.operator.revoke(top.id)
    assert over.state == "revoked"
    assert await state_of(life, beside.id) == ["cascaded"]
    assert await life.verifier(token) == "task_ended"
    for each in (top, beside, middle, leaf):
        await until(lambda task=each: life.about(task.id, "task_ended"), "an end was not written down")
        assert len(life.about(each.id, "task_ended")) == 1, "and once"
        assert (await life.operator.get(each.id)).ended_at > 0
    assert life.about(middle.id, "task_ended")[0].fields["cause"] == "expired"


@pytest.mark.bears("V06", "RV09")
@pytest.mark.parametrize("ground_of", ["sqlite", "postgres"], indirect=True)
async def test_a_deadline_that_passes_while_the_server_is_down(ground_of: Estate, oidc: OidcIssuer) -> None:
    settings = settings_of(oidc)
    async with running(ground_of, **settings) as one, inhabited(ground_of, one, oidc) as life:
        agent = await life.agent(TRIAGE, "ws_1")
        task = await life.start(agent, ttl=2)
        long = await life.start(agent)
        token, living_token = [await life.issue(agent, each.id) for each in (task, long)]
        tls = agent.tls
    await until(lambda: time.time() > task.expires_at, "the deadline never came")
    async with running(ground_of, **settings) as again, inhabited(ground_of, again, oidc) as life:
        base = f"https://127.0.0.1:{again.port}"
        async with httpx2.AsyncClient(verify=tls, base_url=base, trust_env=False) as http:
            answers = [(await http.post("/introspect", data={"token": each})).json() for each in (token, living_token)]
        assert [each["active"] for each in answers] == [False, True]
        seen = await life.operator.get(task.id)
        assert (seen.state, (await life.operator.get(long.id)).state) == ("expired", "active")
        async with asyncio.timeout(DEADLINE):
            while not (seen := await life.operator.get(task.id)).ended_seq:
                await asyncio.sleep(0.05)
        assert (seen.state, seen.cause, seen.ended_at) == ("expired", "expired", task.expires_at)
        assert await life.verifier(token) == "task_ended"
        if not ground_of.store_url:
            (record,) = life.about(task.id, "task_ended")
            assert (record.actor, record.fields["cause"]) == ("server", "expired")


# ---- ends at once, and ends cut short


@pytest.mark.bears("V04", "RV10")
@pytest.mark.parametrize("order", ["twice", "child first", "parent first", "at once"])
async def test_a_tree_that_is_ended_from_several_places_ends_once(life: Life, order: str) -> None:
    line = await life.chain(3)
    (top, root), (middle_agent, middle), (leaf_agent, leaf) = line
    tokens = [await life.issue(agent, task.id) for agent, task in line]
    steps = {
        "twice": [(top, root), (top, root)],
        "child first": [(leaf_agent, leaf), (middle_agent, middle), (top, root)],
        "parent first": [(top, root), (middle_agent, middle), (leaf_agent, leaf)],
        "at once": [(leaf_agent, leaf), (top, root), (middle_agent, middle), (top, root), (leaf_agent, leaf)],
    }[order]
    if order == "at once":
        answers = await asyncio.gather(*(post(agent, task, "complete") for agent, task in steps))
    else:
        answers = [await post(agent, task, "complete") for agent, task in steps]
    assert [each.status_code for each in answers] == [200] * len(steps), [each.text for each in answers]
    assert {each.json()["state"] for each in answers} <= {"completed", "cascaded"}
    for task in (root, middle, leaf):
        assert len(life.about(task.id, "task_ended")) == 1, "one end of each"
    assert [await life.is_active(each) for each in tokens] == [False] * 3
    assert [await life.verifier(each) for each in tokens] == ["task_ended"] * 3
    assert refusals(life) == []
    # An operator's end of what ended with the one above it is no conflict either.
    if order == "parent first":
        assert (await life.operator.revoke(leaf.id)).state == "cascaded"


@pytest.mark.bears("V05", "RV09")
async def test_a_server_that_dies_in_the_middle_of_an_end(ground_of: Estate, oidc: OidcIssuer) -> None:
    """Real processes, killed before the commit and after it: the tree is open or over as a whole, as it was committed."""
    directory, url = ground_of.directory, f"sqlite://{ground_of.directory}/data/broker.db"
    (directory / "data").mkdir()
    environment = environment_of(oidc)

    def armed(point: str) -> dict[str, str]:
        return environment | {"BROKER_SERVER__ALLOW_FAILPOINTS": "true", "BROKER_FAILPOINTS": f"{point}=exit"}

    async def dies(one: Replica, life: Life, root: str) -> None:
        assert await _outcome(life.operator.revoke(root)) == "unavailable"
        async with asyncio.timeout(DEADLINE):
            assert await one.process.wait() == EXIT_STATUS

    async def check(life: Life, *, is_over: bool) -> None:
        assert await state_of(life, *ids) == (["revoked", "cascaded", "cascaded"] if is_over else ["active"] * 3)
        assert [await life.verifier(each) for each in tokens] == (["task_ended"] if is_over else ["alive"]) * 3
        assert [await life.is_active(each) for each in tokens] == [not is_over] * 3
        assert [len(life.about(each, "task_ended")) for each in ids] == [int(is_over)] * 3

    point = armed("lifecycle.before_commit")
    async with replica(directory, "one", url, **point) as one, inhabited(ground_of, one.server, oidc) as life:
        line = await life.chain(3)
        tokens = [await life.issue(agent, task.id) for agent, task in line]
        ids = [task.id for _, task in line]
        await dies(one, life, ids[0])
    point = armed("lifecycle.after_commit")
    async with replica(directory, "one", url, **point) as one, inhabited(ground_of, one.server, oidc) as life:
        await check(life, is_over=False)
        await dies(one, life, ids[0])
    async with replica(directory, "one", url, **environment) as one, inhabited(ground_of, one.server, oidc) as life:
        await check(life, is_over=True)
        # Whoever was not answered asks again: it is the same end.
        assert (await life.operator.revoke(ids[0])).state == "revoked"
        await check(life, is_over=True)
