"""``/openapi.json``: every route stands in it, and what the endpoints answer is what it says."""

import json
from typing import Any

import pytest
from openapi_spec_validator import OpenAPIV31SpecValidator, validate
from starlette.routing import Route

from broker.server.api.http.app import create_app
from broker.server.api.http.description import operation_of
from broker.server.api.http.discovery import Discovery
from broker.server.api.http.token_formats import TXN_TOKEN
from broker.spiffe import Bundle, TrustDomain
from tests.unit.server.api.http.declared import Declared
from tests.unit.server.api.http.door import HttpDoorway
from tests.unit.server.tasks.estate import AGENT, INSPECTOR, ISSUER, NEIGHBOUR

DISCOVERY = Discovery(ISSUER, lambda: Bundle(TrustDomain("example.org")))


async def the_document(door: HttpDoorway) -> dict[str, Any]:
    door.come_as(None)
    response = await door.client.get("/openapi.json")
    assert response.status_code == 200
    found: dict[str, Any] = response.json()
    return found


async def test_every_route_is_described(door: HttpDoorway) -> None:
    """A new route: put ``@described(Operation(…))`` on its endpoint, directly above the function."""
    app = create_app(door.services, DISCOVERY)
    missing = [route.path for route in app.routes if isinstance(route, Route) and operation_of(route.endpoint) is None]
    assert missing == [], "say what these take and give: broker/server/api/http/description.py"
    identifiers = [operation.id for route in app.routes if isinstance(route, Route) and (operation := operation_of(route.endpoint))]  # fmt: skip
    assert len(set(identifiers)) == len(identifiers)


async def test_the_document_is_openapi(door: HttpDoorway) -> None:
    document = await the_document(door)
    validate(document, cls=OpenAPIV31SpecValidator)
    assert document["openapi"] == "3.1.0"
    assert document["servers"] == [{"url": ISSUER}]
    assert {"/token", "/introspect", "/revoke", "/keys", "/tasks/{task_id}", "/tasks/{task_id}/complete"} <= set(document["paths"])  # fmt: skip
    assert document["paths"]["/introspect"]["post"]["security"] == [{"svid": []}]
    assert document["paths"]["/keys"]["get"]["security"] == []
    form = document["paths"]["/token"]["post"]["requestBody"]["content"]["application/x-www-form-urlencoded"]["schema"]
    assert form["additionalProperties"] is False


async def test_who_calls_is_said_by_schemes(door: HttpDoorway) -> None:
    document = await the_document(door)
    paths, schemes = document["paths"], document["components"]["securitySchemes"]
    # OpenAPI 3.1 has readers pass over a header parameter of this name: what is wanted there is a scheme's.
    named = [one["name"] for path in paths.values() for each in path.values() for one in each.get("parameters", ())]
    assert "Authorization" not in named
    for method in ("get", "post"):
        assert paths["/delegations"][method]["security"] == [{"user": []}]
    for method in ("get", "delete"):
        assert paths["/delegations/{delegation_id}"][method]["security"] == [{"user": []}]
    assert paths["/approvals"]["get"]["security"] == [{"user": []}]
    for verb in ("approve", "deny", "withdraw"):
        operation = paths[f"/approvals/{{approval_id}}/{verb}"]["post"]
        assert (operation["security"], operation["requestBody"]["required"]) == ([{"user": []}], False)
    assert (schemes["user"]["type"], schemes["user"]["scheme"]) == ("http", "bearer")
    assert paths["/ssf/events"]["post"]["security"] == [{}, {"transmitter": []}]
    # A certificate, or a JWT-SVID or WIT with a proof.
    assert paths["/token"]["post"]["security"] == [{"svid": []}, {}]
    headers = {one["name"] for one in paths["/token"]["post"]["parameters"]}
    assert headers == {"Idempotency-Key", "DPoP", "Workload-Identity-Token", "Workload-Proof-Token"}
    used = {name for path in paths.values() for each in path.values() for one in each["security"] for name in one}
    assert used == set(schemes)


async def test_the_identity_half_alone_describes_itself() -> None:
    app = create_app(None, DISCOVERY)
    paths = {route.path for route in app.routes if isinstance(route, Route)}
    assert paths == {"/.well-known/openid-configuration", "/oidc/keys", "/openapi.json"}


@pytest.mark.bears("X01")
async def test_real_answers_are_as_declared(door: HttpDoorway) -> None:
    declared = Declared(await the_document(door))
    seen: set[tuple[str, int]] = set()

    def judged(response: Any) -> Any:
        assert declared.judge(response, strictly=True), response.url
        seen.add((response.url.path, response.status_code))
        return response.json() if response.headers.get("content-type") == "application/json" else response.text

    for path in ("/keys", "/.well-known/oauth-authorization-server", "/openapi.json"):
        judged(await door.client.get(path))
    judged(await door.token())
    door.come_as(door.svid())
    issued = judged(await door.token())
    text, task = issued["access_token"], issued["task"]
    judged(await door.token(requested_token_type=TXN_TOKEN, subject_token=text, audience="example.org", resource=None, authorization_details=None, scope="ticket.read"))  # fmt: skip
    for changes in (
        {"grant_type": "x"}, {"resource": "x"}, {"scope": "x"}, {"authorization_details": "x"}, {"subject_token": "x"}, {"task": "tsk_x"}, {"foo": "x"},
    ):  # fmt: skip
        judged(await door.token(**changes))
    same = {"headers": {"idempotency-key": "k"}, "subject_token": door.estate.user_token()}
    judged(await door.token(**same))
    judged(await door.token(scope="ticket.read", **same))
    door.estate.oidc.fault = "status"
    door.estate.clock.advance(100_000)
    judged(await door.token())
    door.estate.oidc.fault = ""
    door.estate.clock.advance(-100_000)
    judged(await door.post("/introspect", [("token", text)]))
    judged(await door.post("/introspect", [("token", text)], {"accept": "application/token-introspection+jwt"}))
    judged(await door.post("/introspect", [("token", "x")]))
    judged(await door.post("/introspect", []))
    judged(await door.client.get(f"/tasks/{task}"))
    judged(await door.client.get("/tasks/tsk_unknown"))
    judged(await door.post(f"/tasks/{task}/complete", [("expected_version", "7")]))
    judged(await door.post(f"/tasks/{task}/complete", [("expected_version", "x")]))
    judged(await door.client.post(f"/tasks/{task}/complete"))
    judged(await door.client.get(f"/tasks/{task}"))
    judged(await door.post("/revoke", [("token", text)]))
    judged(await door.post("/revoke", [("token", text), ("end", "x")]))
    for who in (NEIGHBOUR, INSPECTOR, None):
        door.come_as(who)
        judged(await door.token())
        judged(await door.post("/introspect", [("token", text)]))
        judged(await door.client.get(f"/tasks/{task}"))
    statuses = {(path.replace(task, "{id}"), status) for path, status in seen}
    assert statuses >= {
        ("/token", 200), ("/token", 400), ("/token", 401), ("/token", 409), ("/token", 503), ("/introspect", 200), ("/introspect", 400), ("/introspect", 401), ("/revoke", 200), ("/revoke", 400),
        ("/tasks/{id}", 200), ("/tasks/{id}", 404), ("/tasks/{id}", 401), ("/tasks/{id}/complete", 200), ("/tasks/{id}/complete", 400), ("/tasks/{id}/complete", 409),
    }  # fmt: skip


async def test_a_defect_is_declared_too(door: HttpDoorway, monkeypatch: pytest.MonkeyPatch) -> None:
    declared = Declared(await the_document(door))

    async def broken(*_: object) -> None:
        raise RuntimeError

    monkeypatch.setattr(door.estate.exchange, "start_and_issue", broken)
    door.come_as(AGENT)
    assert declared.judge(await door.token(), strictly=True)


async def test_the_judge_refuses_what_is_not_declared(door: HttpDoorway) -> None:
    document = await the_document(door)
    door.come_as(AGENT)
    response = await door.token()
    narrower = json.loads(json.dumps(document))
    narrower["components"]["schemas"]["Token"]["properties"]["token_type"]["enum"] = ["DPoP"]
    with pytest.raises(Exception, match="Bearer"):
        Declared(narrower).judge(response)
    del narrower["paths"]["/token"]["post"]["responses"]["200"]
    with pytest.raises(AssertionError):
        Declared(narrower).judge(response)
