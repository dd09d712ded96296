"""``POST /revoke``: one's own tokens end, and the answer tells nothing."""

import pytest

from tests.unit.server.api.http.door import HttpDoorway, assert_error
from tests.unit.server.tasks.estate import AGENT, NEIGHBOUR


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


async def test_who_may_ask_and_how(door: HttpDoorway) -> None:
    assert_error(await door.post("/revoke", []), 400, "invalid_request")
    door.come_as(None)
    assert_error(await door.post("/revoke", [("token", "x")]), 401, "invalid_client")
