"""``POST /revoke``: one's own tokens end, and the answer tells nothing."""

import asyncio

import pytest

from broker.server.api.http.token_formats import TXN_TOKEN
from tests.unit.server.api.http.door import HttpDoorway, assert_error
from tests.unit.server.api.http.test_token_formats import grant, held, transaction, wiki
from tests.unit.server.tasks.estate import AGENT, NEIGHBOUR, REPLACER


async def alive(door: HttpDoorway, token: str) -> bool:
    return await door.estate.tokens.introspect(token, AGENT) is not None


@pytest.mark.bears("RV11")
async def test_ones_own_token_ends_and_the_task_goes_on(door: HttpDoorway) -> None:
    svid = door.come_as(AGENT)
    first = (await door.token()).json()
    second = (await door.token(task=first["task"], authorization_details=None)).json()
    for _ in range(2):
        response = await door.post("/revoke", [("token", first["access_token"]), ("token_type_hint", "access_token")])
        assert (response.status_code, response.content) == (200, b"")
    assert not await alive(door, first["access_token"])
    assert await alive(door, second["access_token"])
    door.come_as(svid)
    assert len(await door.estate.records("token_revoked")) == 1


async def test_anothers_token_and_no_token_get_the_same_answer(door: HttpDoorway) -> None:
    token = (await door.token()).json()["access_token"]
    door.come_as(NEIGHBOUR)
    for what in (token, "x", "a.b.c", door.estate.user_token()):
        response = await door.post("/revoke", [("token", what), ("token_type_hint", "refresh_token")])
        assert (response.status_code, response.content) == (200, b"")
    assert await alive(door, token)
    async with asyncio.timeout(30):
        while not (records := await door.estate.records("token_refused")):
            await asyncio.sleep(0.005)
    (record,) = records
    assert (record.actor, record.fields["reason"]) == (str(NEIGHBOUR), "token_not_own")


async def test_who_may_ask_and_how(door: HttpDoorway) -> None:
    assert_error(await door.post("/revoke", []), 400, "invalid_request")
    door.come_as(None)
    assert_error(await door.post("/revoke", [("token", "x")]), 401, "invalid_client")


@pytest.mark.bears("RV11")
async def test_a_task_ends_with_its_token_where_it_is_ones_own(door: HttpDoorway) -> None:
    svid = door.come_as(AGENT)
    assert svid is not None
    await door.estate.report("ws_1", svid.x5t)
    first = (await door.token()).json()
    second = (await door.token(task=first["task"], authorization_details=None)).json()
    # Another process of the same workload may give the token back, and not the task.
    door.come_as(AGENT)
    response = await door.post("/revoke", [("token", second["access_token"]), ("end", "task")])
    assert (response.status_code, response.content) == (200, b"")
    assert not await alive(door, second["access_token"])
    assert await alive(door, first["access_token"])
    door.come_as(NEIGHBOUR)
    await door.post("/revoke", [("token", first["access_token"]), ("end", "task")])
    assert await alive(door, first["access_token"])
    door.come_as(svid)
    for _ in range(2):
        response = await door.post("/revoke", [("token", first["access_token"]), ("end", "task")])
        assert (response.status_code, response.content) == (200, b"")
    shown = (await door.client.get(f"/tasks/{first['task']}")).json()
    assert (shown["state"], shown["cause"]) == ("revoked", "cancelled")
    (record,) = await door.estate.records("task_ended")
    assert (record.actor, record.fields["cause"]) == (str(AGENT), "cancelled")
    assert_error(await door.post("/revoke", [("token", "x"), ("end", "all")]), 400, "invalid_request")


@pytest.mark.bears("RV11")
async def test_a_task_ends_by_a_token_that_has_expired(door: HttpDoorway) -> None:
    svid = door.come_as(AGENT)
    assert svid is not None
    await door.estate.report("ws_1", svid.x5t)
    first = (await door.token()).json()
    other = (await door.token()).json()
    txn = (await transaction(door, other["access_token"])).json()["access_token"]
    door.estate.clock.advance(240)
    door.come_as(door.svid())  # another process of the same workload
    await door.post("/revoke", [("token", first["access_token"]), ("end", "task")])
    door.come_as(NEIGHBOUR)
    await door.post("/revoke", [("token", first["access_token"]), ("end", "task")])
    door.come_as(svid)
    await door.post("/revoke", [("token", first["access_token"])])
    assert (await door.client.get(f"/tasks/{first['task']}")).json()["state"] == "active"
    for token, task in ((first["access_token"], first["task"]), (txn, other["task"])):
        response = await door.post("/revoke", [("token", token), ("end", "task")])
        assert (response.status_code, response.content) == (200, b"")
        shown = (await door.client.get(f"/tasks/{task}")).json()
        assert (shown["state"], shown["cause"]) == ("revoked", "cancelled")
    assert len(await door.estate.records("task_ended")) == 2


async def test_other_formats_are_taken_back_or_refused(door: HttpDoorway) -> None:
    token = await held(door)
    txn = (await transaction(door, token)).json()["access_token"]
    assert (await door.post("/revoke", [("token", txn)])).status_code == 200
    (record,) = await door.estate.records("token_revoked")
    assert record.fields["jti_hash"]
    door.come_as(REPLACER)
    assert_error(await transaction(door, txn, subject_token_type=TXN_TOKEN), 400, "invalid_request")
    jag = (await grant(door, await held(door, **wiki()))).json()["access_token"]
    assert_error(await door.post("/revoke", [("token", jag)]), 400, "unsupported_token_type")
    # One that only looks like a grant of ours is like every other text.
    assert (await door.post("/revoke", [("token", jag[:-4] + "AAAA")])).status_code == 200
