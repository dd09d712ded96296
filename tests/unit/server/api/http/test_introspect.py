"""``POST /introspect``: the whole truth for who may know, one answer for everybody else."""

import asyncio

import pytest

from broker.errors import InvalidToken
from broker.server.tasks.config import Audiences
from broker.spiffe import jose
from tests.unit.server.api.http.door import HttpDoorway, assert_error, payload_of
from tests.unit.server.tasks.estate import AGENT, INSPECTOR, ISSUER, NEIGHBOUR, NODE

INACTIVE = {"active": False}


async def ask(door: HttpDoorway, token: str) -> dict[str, object]:
    response = await door.post("/introspect", [("token", token)])
    assert response.status_code == 200, response.text
    assert response.headers["cache-control"] == "no-store"
    body: dict[str, object] = response.json()
    return body


@pytest.mark.bears("AC06", "SV01")
async def test_who_may_know_gets_what_the_token_says(door: HttpDoorway) -> None:
    token = (await door.token()).json()["access_token"]
    for who in (AGENT, INSPECTOR):
        door.come_as(who)
        body = await ask(door, token)
        assert body == {"active": True, "token_type": "Bearer", **payload_of(token)}
        assert body["act"] == {"sub": str(AGENT)}


@pytest.mark.bears("SV01", "SV02")
async def test_everybody_else_gets_one_answer(door: HttpDoorway) -> None:
    token = (await door.token()).json()["access_token"]
    door.come_as(NEIGHBOUR)
    assert await ask(door, token) == INACTIVE
    async with asyncio.timeout(30):
        while not (records := await door.estate.records("token_introspected")):
            await asyncio.sleep(0.005)
    (record,) = records
    assert (record.actor, record.subject) == (str(NEIGHBOUR), payload_of(token)["task"]["id"])
    assert (record.fields["reason"], record.fields["active"]) == ("token_not_own", False)
    door.come_as(INSPECTOR)
    head, body, signature = token.split(".")
    for other in (
        "x",
        "a.b.c",
        token + "x",
        f"{head}.{body}.{signature[::-1]}",
        door.estate.user_token(),
        door.jwt_svid(),
    ):
        assert await ask(door, other) == INACTIVE


async def test_a_caller_without_certificate_may_not_ask(door: HttpDoorway) -> None:
    door.come_as(None)
    assert_error(await door.post("/introspect", [("token", "x")]), 401, "invalid_client")
    assert_error(await door.post("/revoke", [("token", "x")]), 401, "invalid_client")
    assert [record.actor for record in await door.estate.records("token_refused")] == ["anonymous", "anonymous"]


@pytest.mark.parametrize(
    "pairs", [[], [("token", "")], [("token", "x"), ("token", "x")], [("token", "x"), ("foo", "x")]]
)
@pytest.mark.parametrize("path", ["/introspect", "/revoke"])
async def test_a_malformed_question(door: HttpDoorway, path: str, pairs: list[tuple[str, str]]) -> None:
    assert_error(await door.post(path, pairs), 400, "invalid_request")
    (record,) = await door.estate.records("token_refused")
    assert record.actor == str(AGENT)


@pytest.mark.bears("V01", "V06", "X05")
@pytest.mark.parametrize("what", ["task revoked", "token revoked", "time", "entry gone", "session ended"])
async def test_whatever_ends_a_token_ends_it_here(door: HttpDoorway, what: str) -> None:
    svid = door.come_as(AGENT)
    assert svid is not None
    await door.estate.report("ws_1", svid.x5t)
    issued = (await door.token()).json()
    assert (await ask(door, issued["access_token"]))["active"] is True
    match what:
        case "task revoked":
            await door.estate.lifecycle.revoke(issued["task"], by="operator:uid:0")
        case "token revoked":
            await door.post("/revoke", [("token", issued["access_token"])])
        case "time":
            door.estate.clock.advance(issued["expires_in"])
        case "entry gone":
            await door.estate.remove_entry("entry-1")
        case "session ended":
            await door.estate.sessions.report(NODE, [], ["ws_1"])
    assert await ask(door, issued["access_token"]) == INACTIVE
    door.come_as(INSPECTOR)
    assert await ask(door, issued["access_token"]) == INACTIVE


@pytest.mark.bears("X05")
async def test_an_audience_that_is_gone_has_no_living_tokens(
    door: HttpDoorway, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = (await door.token()).json()["access_token"]
    monkeypatch.setattr(door.estate.tokens, "_audiences", Audiences())
    assert await ask(door, token) == INACTIVE


async def test_a_token_of_a_rotated_key_is_still_known(door: HttpDoorway) -> None:
    token = (await door.token()).json()["access_token"]
    door.estate.keys.rotate()
    assert (await ask(door, token))["active"] is True


SIGNED = "application/token-introspection+jwt"


@pytest.mark.bears("SV01", "SV02", "X07")
async def test_an_answer_is_signed_for_who_wants_it(door: HttpDoorway) -> None:
    token = (await door.token()).json()["access_token"]
    for who, expected in ((INSPECTOR, True), (NEIGHBOUR, False)):
        door.come_as(who)
        response = await door.post("/introspect", [("token", token)], {"accept": f"text/html, {SIGNED};q=0.9"})
        assert response.headers["content-type"] == SIGNED
        jws = jose.parse_compact(response.text)
        jose.verify_signature(jws, door.estate.keys.task_keys()[str(jws.kid)], "ES256")
        assert jws.typ == "token-introspection+jwt"
        assert jws.payload.keys() == {"iss", "aud", "iat", "token_introspection"}
        assert (jws.payload["iss"], jws.payload["aud"]) == (ISSUER, str(who))
        said = jws.payload["token_introspection"]
        assert said == ({"active": True, "token_type": "Bearer", **payload_of(token)} if expected else INACTIVE)
        with pytest.raises(InvalidToken):
            door.estate.verify(response.text)
        assert await ask(door, response.text) == INACTIVE
    for accept in ("*/*", "application/*", f"{SIGNED};q=0", "application/json"):
        response = await door.post("/introspect", [("token", token)], {"accept": accept})
        assert response.headers["content-type"] == "application/json"


@pytest.mark.bears("SV02")
async def test_unknown_foreign_and_dead_are_the_same_bytes(door: HttpDoorway) -> None:
    issued = (await door.token()).json()
    dead = (await door.token()).json()
    await door.estate.lifecycle.revoke(dead["task"], by="operator:uid:0")
    door.come_as(NEIGHBOUR)
    answers = [
        await door.post("/introspect", [("token", each)])
        for each in (issued["access_token"], dead["access_token"], "x")
    ]
    door.come_as(INSPECTOR)
    answers.append(await door.post("/introspect", [("token", dead["access_token"])]))
    door.estate.clock.advance(1000)
    answers.append(await door.post("/introspect", [("token", issued["access_token"])]))
    assert len({(answer.status_code, answer.content, tuple(answer.headers.items())) for answer in answers}) == 1
