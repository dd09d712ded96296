"""``/actions``: what a service sends and is told. Whether the answers are those that the OpenAPI document declares, the door looks at."""

from typing import Any

import pytest

from broker.tasks.action import SETTLE_WITHIN
from tests.unit.server.api.http.door import HttpDoorway, assert_error
from tests.unit.server.tasks.estate import AGENT, INSPECTOR, NEIGHBOUR

DIGEST = "sha-256:" + "a" * 42 + "A"


async def asked(door: HttpDoorway, **changes: Any) -> dict[str, Any]:
    """A claim of the service, for a new token; None leaves a member out."""
    issued = (await door.token()).json()
    door.come_as(INSPECTOR)
    good = {"token": issued["access_token"], "action": "ticket.write", "step": "s1"}
    return {name: value for name, value in (good | changes).items() if value is not None}


async def test_a_service_claims_settles_and_is_told(door: HttpDoorway) -> None:
    wanted = await asked(door, identifier="4711", parameter_digest=DIGEST, enforced=["max_amount"])
    claimed = await door.client.post("/actions", json=wanted)
    assert claimed.status_code == 201, claimed.text
    body = claimed.json()
    assert (body["result"], body["state"], body["settled_at"], "outcome" in body) == ("claimed", "claimed", None, False)
    assert claimed.headers["location"].endswith(f"/actions/{body['id']}")
    assert claimed.headers["cache-control"] == "no-store"
    assert_error(await door.client.post("/actions", json=wanted), 409, "action_in_progress")

    settled = await door.client.post(
        f"/actions/{body['id']}", json={"state": "completed", "outcome": {"b": 1, "a": None}}
    )
    assert (settled.status_code, settled.json()["outcome"]) == (200, {"a": None, "b": 1})
    again = await door.client.post("/actions", json=wanted)
    assert (again.status_code, again.json()["result"]) == (200, "duplicate_suppressed")
    assert again.json()["outcome"] == {"a": None, "b": 1}
    assert_error(await door.client.post(f"/actions/{body['id']}", json={"state": "released"}), 409, "action_settled")


async def test_an_outcome_may_be_null_and_may_be_none(door: HttpDoorway) -> None:
    wanted = await asked(door)
    for step, settlement, kept in (("s1", {}, {}), ("s2", {"outcome": None}, {"outcome": None})):
        claimed = (await door.client.post("/actions", json=wanted | {"step": step})).json()
        settled = await door.client.post(f"/actions/{claimed['id']}", json={"state": "completed"} | settlement)
        assert {name: value for name, value in settled.json().items() if name == "outcome"} == kept


async def test_what_is_in_doubt_says_so(door: HttpDoorway) -> None:
    claimed = (await door.client.post("/actions", json=await asked(door))).json()
    door.estate.clock.advance(SETTLE_WITHIN.total_seconds())
    door.come_as(AGENT)
    issued = (await door.token(task=claimed["task"], purpose=None)).json()
    refused = await door.client.post("/actions", json=await asked(door, token=issued["access_token"]))
    body = assert_error(refused, 403, "action_indeterminate")
    assert claimed["id"] in body["hint"]
    settled = await door.client.post(f"/actions/{claimed['id']}", json={"state": "released"})
    assert (settled.status_code, settled.json()["state"]) == (200, "released")


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"token": None}, "token_missing"),
        ({"token": 1}, "parameter_kind"),
        ({"step": None}, "invalid_step"),
        ({"step": ""}, "parameter_kind"),
        ({"step": "a\nb"}, "invalid_step"),
        ({"action": "ticket.*"}, "invalid_action"),
        ({"action": ["ticket.write"]}, "parameter_kind"),
        ({"parameter_digest": "x"}, "invalid_parameter_digest"),
        ({"enforced": "max_amount"}, "parameter_kind"),
        ({"enforced": [1]}, "parameter_kind"),
        ({"enforced": ["x"] * 1 + [str(n) for n in range(64)]}, "invalid_enforced"),
        ({"outcome": 1}, "parameter_unknown"),
    ],
)
async def test_what_is_malformed(door: HttpDoorway, changes: dict[str, Any], code: str) -> None:
    assert_error(await door.client.post("/actions", json=await asked(door, **changes)), 400, code)
    (record,) = await door.estate.records("action_refused")
    assert (record.actor, record.fields["reason"]) == (str(INSPECTOR), code)


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"state": "claimed"}, 400, "invalid_settlement"),
        ({"state": "done"}, 400, "invalid_settlement"),
        ({}, 400, "invalid_settlement"),
        ({"state": "released", "outcome": 1}, 400, "invalid_settlement"),
        ({"state": "completed", "outcome": "x" * 1024}, 400, "invalid_outcome"),
        ({"state": "completed", "outcome": 1.5}, 400, "json_bad_type"),
        ({"state": "completed", "id": "act_1"}, 400, "parameter_unknown"),
    ],
)
async def test_what_settles_nothing(door: HttpDoorway, body: dict[str, Any], status: int, code: str) -> None:
    claimed = (await door.client.post("/actions", json=await asked(door))).json()
    assert_error(await door.client.post(f"/actions/{claimed['id']}", json=body), status, code)


async def test_bodies_that_are_no_json_object(door: HttpDoorway) -> None:
    wanted = await asked(door)
    assert_error(await door.client.post("/actions", data=wanted), 400, "content_type")
    assert_error(await door.client.post("/actions", json=[wanted]), 400, "invalid_json")
    assert_error(await door.client.post("/actions?x=1", json=wanted), 400, "parameter_in_query")
    twice = b'{"step":"a","step":"b"}'
    sent = await door.client.post("/actions", content=twice, headers={"content-type": "application/json"})
    assert_error(sent, 400, "json_duplicate_name")


async def test_who_is_nobody_and_who_is_another(door: HttpDoorway) -> None:
    wanted = await asked(door)
    claimed = (await door.client.post("/actions", json=wanted)).json()
    door.come_as(NEIGHBOUR)
    assert_error(await door.client.post("/actions", json=wanted | {"step": "s2"}), 403, "audience_not_own")
    assert_error(
        await door.client.post(f"/actions/{claimed['id']}", json={"state": "completed"}), 403, "action_not_own"
    )
    for unknown in ("act_unknown", "a%20b", "x" * 300):
        assert_error(await door.client.post(f"/actions/{unknown}", json={"state": "completed"}), 404, "action_unknown")
    door.come_as(None)
    assert_error(await door.client.post("/actions", json=wanted), 401, "invalid_client")
    *_, last = await door.estate.records("action_refused")
    assert (last.actor, last.fields["reason"]) == ("anonymous", "invalid_client")


async def test_a_request_that_is_repeated(door: HttpDoorway) -> None:
    wanted, key = await asked(door), {"idempotency-key": "k"}
    first = await door.client.post("/actions", json=wanted, headers=key)
    assert (await door.client.post("/actions", json=wanted, headers=key)).json() == first.json()
    other = await door.client.post("/actions", json=wanted | {"step": "s2"}, headers=key)
    assert_error(other, 409, "idempotency_mismatch")
