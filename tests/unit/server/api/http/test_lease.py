"""The heartbeat at the HTTPS door: its own task's, by whoever holds the certificate, and every refusal on record."""

from typing import Any

import pytest

from broker.tasks import State, Supervision
from tests.unit.server.api.http.door import HttpDoorway, assert_error
from tests.unit.server.tasks.estate import AGENT, NEIGHBOUR
from tests.unit.server.tasks.watching import pass_time, refusal, task_of


@pytest.fixture
def svid(door: HttpDoorway) -> Any:
    return door.come_as(door.svid())


async def start(door: HttpDoorway, svid: Any, supervision: str = "lease") -> Any:
    """A task of the caller's own session, as its node agent started it for the same process."""
    await door.estate.report("ws_1", svid.x5t)
    return await door.estate.start(door.estate.actor(x5t=svid.x5t), supervision=Supervision(supervision))


async def beat(door: HttpDoorway, task_id: str, **more: Any) -> Any:
    return await door.client.put(f"/tasks/{task_id}/lease", **more)


@pytest.mark.bears("RV21")
async def test_a_heartbeat_says_how_long_the_task_lives_without_another(door: HttpDoorway, svid: Any) -> None:
    task = await start(door, svid)
    for _ in range(3):
        await pass_time(door.estate, 29)
        response = await beat(door, task.id)
        assert response.status_code == 200
        assert response.json() == {"id": task.id, "ttl": 30.0, "expires_in": 30.0}
        assert response.headers["cache-control"] == "no-store"
    assert (await task_of(door.estate, task.id)).state is State.ACTIVE


@pytest.mark.bears("RV21")
async def test_a_missed_heartbeat_is_an_end_of_its_tokens_and_a_later_one_is_refused_and_recorded(
    door: HttpDoorway, svid: Any
) -> None:
    task = await start(door, svid)
    token = door.estate.verify(await door.estate.issue(task, door.estate.actor(x5t=svid.x5t)))
    await pass_time(door.estate, 31)
    assert await refusal(door.estate, token) == "task_suspended"
    assert_error(await beat(door, task.id), 403, "task_suspended")
    (record,) = await door.estate.records("task_refused")
    assert (record.subject, record.fields["reason"], record.fields["door"]) == (task.id, "task_suspended", "https")
    shown = (await door.client.get(f"/tasks/{task.id}")).json()
    assert (shown["state"], shown["cause"], shown["supervision"]) == ("suspended", "lease_lapsed", "lease")
    assert shown["revocation"]["seq"] > 0


async def test_nobody_else_keeps_a_task_alive(door: HttpDoorway, svid: Any) -> None:
    task = await start(door, svid)
    door.come_as(NEIGHBOUR)
    assert_error(await beat(door, task.id), 404, "task_unknown")
    other = door.svid()
    door.come_as(other)
    await door.estate.report("ws_2", other.x5t)
    assert_error(await beat(door, task.id), 403, "session_mismatch")
    door.come_as(None)
    assert_error(await beat(door, task.id), 401, "invalid_client")
    refusals = [(record.actor, record.fields["reason"]) for record in await door.estate.records("task_refused")]
    strangers = ("anonymous", "invalid_client")
    assert refusals == [(str(NEIGHBOUR), "task_unknown"), (str(AGENT), "session_mismatch"), strangers]


async def test_what_is_not_a_leased_task_has_no_heartbeat(door: HttpDoorway, svid: Any) -> None:
    attached = await start(door, svid, "attached")
    assert_error(await beat(door, attached.id), 403, "supervision_mismatch")
    assert_error(await beat(door, "tsk_none"), 404, "task_unknown")
    assert_error(await beat(door, "%20"), 404, "task_unknown")
    assert_error(await beat(door, attached.id, params={"a": "b"}), 400, "parameter_in_query")


async def test_a_rotated_certificate_is_still_its_process(door: HttpDoorway, svid: Any) -> None:
    task = await start(door, svid)
    new = door.svid()
    await door.estate.report("ws_1", new.x5t)
    for one in (svid, new):
        door.come_as(one)
        assert (await beat(door, task.id)).status_code == 200
