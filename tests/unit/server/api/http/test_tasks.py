"""``/tasks/{id}``: one's own task, to look at and to end."""

import pytest

from tests.unit.server.api.http.door import HttpDoorway, assert_error
from tests.unit.server.tasks.estate import AGENT, NEIGHBOUR


async def test_a_workload_sees_its_own_task(door: HttpDoorway) -> None:
    issued = (await door.token(purpose="triage")).json()
    response = await door.client.get(f"/tasks/{issued['task']}")
    assert response.status_code == 200
    assert response.headers["cache-control"] == "no-store"
    body = response.json()
    assert (body["id"], body["user"], body["agent"], body["state"]) == (issued["task"], "alice", str(AGENT), "active")
    assert (body["purpose"], body["version"], body["supervision"]) == ("triage", 1, "none")
    assert body["expires_at"].endswith("Z")
    assert "revocation" not in body


async def test_a_workload_ends_its_own_task(door: HttpDoorway) -> None:
    issued = (await door.token()).json()
    for _ in range(2):
        response = await door.client.post(f"/tasks/{issued['task']}/complete", headers={"idempotency-key": "c"})
        assert response.status_code == 200, response.text
        body = response.json()
        assert (body["state"], body["cause"], body["version"]) == ("completed", "completed", 2)
        assert body["revocation"]["state"] == "closed"
        assert body["revocation"]["expected"] == 0
    shown = (await door.client.get(f"/tasks/{issued['task']}")).json()
    assert shown["revocation"]["seq"] == body["revocation"]["seq"]
    assert await door.estate.tokens.introspect(issued["access_token"], AGENT) is None


@pytest.mark.bears("RV13")
async def test_a_version_that_has_moved_on(door: HttpDoorway) -> None:
    task = (await door.token()).json()["task"]
    assert_error(await door.post(f"/tasks/{task}/complete", [("expected_version", "2")]), 409, "stale_version")
    for bad in ("0", "-1", "x", "01", "1" * 20):
        assert_error(await door.post(f"/tasks/{task}/complete", [("expected_version", bad)]), 400, "invalid_version")
    assert_error(await door.post(f"/tasks/{task}/complete", [("foo", "1")]), 400, "parameter_unknown")
    assert (await door.post(f"/tasks/{task}/complete", [("expected_version", "1")])).status_code == 200


@pytest.mark.bears("X10", "SV04")
async def test_anothers_task_does_not_exist(door: HttpDoorway) -> None:
    task = (await door.token()).json()["task"]
    door.come_as(NEIGHBOUR)
    answers = [await door.client.get(f"/tasks/{name}") for name in (task, "tsk_unknown", "x" * 500, "a%20b")]
    answers += [await door.client.post(f"/tasks/{name}/complete") for name in (task, "tsk_unknown")]
    bodies = [assert_error(answer, 404, "task_unknown") for answer in answers]
    assert all(body == bodies[0] for body in bodies)
    (first, *_) = await door.estate.records("task_refused")
    assert (first.actor, first.subject, first.fields["reason"]) == (str(NEIGHBOUR), task, "task_unknown")
    door.come_as(None)
    assert_error(await door.client.get(f"/tasks/{task}"), 401, "invalid_client")
    *_, last = await door.estate.records("task_refused")
    assert (last.actor, last.fields["reason"]) == ("anonymous", "invalid_client")


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("PUT", "/tasks", "GET, HEAD, POST"),
        ("OPTIONS", "/delegations", "GET, HEAD, POST"),
        ("POST", "/delegations/dlg_1", "DELETE, GET, HEAD"),
        ("POST", "/approvals", "GET, HEAD"),
        ("DELETE", "/approvals/apr_1", "GET, HEAD"),
        ("GET", "/approvals/apr_1/approve", "POST"),
        ("GET", "/tasks/tsk_1/complete", "POST"),
    ],
)
async def test_another_method_is_told_of_all_that_are_there(
    door: HttpDoorway, method: str, path: str, allowed: str
) -> None:
    answer = await door.client.request(method, path)
    assert_error(answer, 405, "method_not_allowed")
    assert answer.headers["allow"] == allowed


async def test_an_operators_end_is_not_undone(door: HttpDoorway) -> None:
    task = (await door.token()).json()["task"]
    await door.estate.lifecycle.revoke(task, by="operator:uid:0")
    assert_error(await door.client.post(f"/tasks/{task}/complete"), 409, "conflict")
    assert (await door.client.get(f"/tasks/{task}")).json()["state"] == "revoked"
