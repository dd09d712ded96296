"""``POST /token``: RFC 8693 exactly, and every fault of a request has its answer."""

import json
from typing import Any

import httpx2
import pytest

from broker.server.api.http.clients import JWT_SPIFFE
from broker.server.api.http.form import MAX_BODY
from broker.server.api.http.token_formats import ACCESS_TOKEN, GRANT_TYPE, JWT
from broker.spiffe import SpiffeId
from tests.unit.server.api.http.door import FORM, URN, HttpDoorway, assert_error, payload_of
from tests.unit.server.tasks.estate import AGENT, ISSUER, NEIGHBOUR, NODE, TICKETS, WIKI, detail


async def test_one_exchange_makes_a_task_and_its_first_token(door: HttpDoorway) -> None:
    svid = door.come_as(AGENT)
    assert svid is not None
    response = await door.token(scope="ticket.read", purpose="triage ticket 4711", client_id=str(AGENT))
    assert response.status_code == 200, response.text
    assert response.headers["cache-control"] == "no-store"
    body = response.json()
    assert body.keys() == {
        "access_token", "issued_token_type", "token_type", "expires_in", "scope", "authorization_details", "task",
    }  # fmt: skip
    assert (body["issued_token_type"], body["token_type"], body["scope"]) == (ACCESS_TOKEN, "Bearer", "ticket.read")
    assert 178 <= body["expires_in"] <= 180
    claims = payload_of(body["access_token"])
    assert (claims["sub"], claims["client_id"], claims["act"]) == ("alice", str(AGENT), {"sub": str(AGENT)})
    assert claims["aud"] == TICKETS.text
    assert claims["cnf"] == {"x5t#S256": svid.x5t}
    assert claims["task"]["id"] == body["task"]
    door.estate.verify(body["access_token"])
    assert "refresh_token" not in body


async def test_a_plain_client_needs_no_rich_authorization(door: HttpDoorway) -> None:
    response = await door.token(
        authorization_details=None, scope="ticket.read ticket.write", resource=None, audience=TICKETS.text
    )
    assert response.status_code == 200, response.text
    assert response.json()["scope"] == "ticket.read ticket.write"


async def test_another_token_of_the_same_task(door: HttpDoorway) -> None:
    first = (await door.token()).json()
    second = (await door.token(task=first["task"], authorization_details=None, scope="ticket.read")).json()
    assert second["task"] == first["task"]
    assert second["scope"] == "ticket.read"
    assert second["access_token"] != first["access_token"]
    assert_error(await door.token(task=first["task"], purpose="more"), 400, "invalid_request")
    assert_error(await door.token(task="tsk_unknown"), 400, "invalid_grant")
    assert_error(await door.token(task="a b"), 400, "invalid_request")
    stolen = door.estate.user_token("mallory")
    assert_error(await door.token(task=first["task"], subject_token=stolen), 400, "invalid_request")
    door.come_as(NEIGHBOUR)
    assert_error(await door.token(task=first["task"]), 400, "invalid_grant")


@pytest.mark.bears("I10")
async def test_a_task_that_is_named_twice_is_named_alike(door: HttpDoorway) -> None:
    """In the form, and by the token of ours that is the subject: where they differ, neither is meant."""
    first, other = [(await door.token()).json() for _ in range(2)]
    assert first["task"] != other["task"]
    mine = {"subject_token": first["access_token"], "subject_token_type": URN + "access_token"}
    mine["authorization_details"] = None
    alike = await door.token(**mine, task=first["task"])
    assert (alike.status_code, alike.json().get("task")) == (200, first["task"]), alike.text
    before = len(await door.estate.records("token_issued"))
    differing = await door.token(**mine, task=other["task"])
    assert differing.status_code == 400, differing.text
    assert len(await door.estate.records("token_issued")) == before


@pytest.mark.parametrize("kind", ["access_token", "id_token", "jwt"])
async def test_kinds_of_subject_tokens(door: HttpDoorway, kind: str) -> None:
    assert (await door.token(subject_token_type=URN + kind)).status_code == 200


async def test_the_requested_type_is_answered(door: HttpDoorway) -> None:
    assert (await door.token(requested_token_type=JWT)).json()["issued_token_type"] == JWT


FAULTS: list[tuple[str, dict[str, Any], str]] = [
    ("TX01 no subject token", {"subject_token": None}, "invalid_request"),
    ("no subject token type", {"subject_token_type": None}, "invalid_request"),
    ("TX02 empty subject token", {"subject_token": ""}, "invalid_request"),
    ("TX02 two subject tokens", {"subject_token": ["x", "x"]}, "invalid_request"),
    ("no grant type", {"grant_type": None}, "invalid_request"),
    ("another grant type", {"grant_type": "client_credentials"}, "unsupported_grant_type"),
    ("grant type in another case", {"grant_type": GRANT_TYPE.upper()}, "unsupported_grant_type"),
    ("two grant types", {"grant_type": [GRANT_TYPE, GRANT_TYPE]}, "invalid_request"),
    ("TX08 a refresh token is asked for", {"requested_token_type": URN + "refresh_token"}, "invalid_request"),
    ("another type is asked for", {"requested_token_type": URN + "saml2"}, "invalid_request"),
    ("context without a transaction", {"request_context": "{}"}, "invalid_request"),
    ("TX08 a refresh token as subject", {"subject_token_type": URN + "refresh_token"}, "invalid_request"),
    ("an unknown type of subject", {"subject_token_type": URN + "saml2"}, "invalid_request"),
    ("not a token", {"subject_token": "x"}, "invalid_request"),
    ("TX01 actor token without its type", {"actor_token": "x"}, "invalid_request"),
    ("actor token type without a token", {"actor_token_type": JWT}, "invalid_request"),
    ("an actor token that is none", {"actor_token": "x", "actor_token_type": JWT}, "invalid_request"),
    ("TX10 nothing asked for", {"authorization_details": None}, "invalid_scope"),
    ("TX09 wider scope", {"scope": "ticket.delete"}, "invalid_scope"),
    ("TX24 endless scope", {"scope": "a " * 10_000 + "a"}, "invalid_scope"),
    ("two spaces", {"scope": "ticket.read  ticket.write"}, "invalid_scope"),
    ("TX11 two audiences", {"audience": [TICKETS.text, WIKI.text]}, "invalid_target"),
    ("two resources", {"resource": [TICKETS.text, WIKI.text]}, "invalid_target"),
    ("TX14 resource and audience differ", {"audience": WIKI.text}, "invalid_target"),
    ("no resource", {"resource": None}, "invalid_target"),
    ("TX12 unknown resource", {"resource": "https://unknown.example"}, "invalid_target"),
    ("TX12 dot segments", {"resource": TICKETS.text + "/a/../b"}, "invalid_target"),
    ("TX12 hidden slash", {"resource": TICKETS.text + "/%2F"}, "invalid_target"),
    ("TX12 another port", {"resource": TICKETS.text + ":8443"}, "invalid_target"),
    ("TX13 fragment", {"resource": TICKETS.text + "#x"}, "invalid_target"),
    ("TX13 user", {"resource": "https://u@tickets.example.org"}, "invalid_target"),
    ("TX13 not https", {"resource": "http://tickets.example.org"}, "invalid_target"),
    ("TX13 no address", {"audience": "tickets", "resource": None}, "invalid_target"),
    ("TX23 unknown parameter", {"foo": "1"}, "invalid_request"),
    ("client_secret", {"client_secret": "1"}, "invalid_request"),
    ("client_assertion", {"client_assertion": "1"}, "invalid_request"),
    ("details are no JSON", {"authorization_details": "{"}, "invalid_authorization_details"),
    ("details are empty", {"authorization_details": "[]"}, "invalid_authorization_details"),
    ("details of no known type", {"authorization_details": '[{"type":"x"}]'}, "invalid_authorization_details"),
    ("details with a name twice", {"authorization_details": '[{"type":"api","type":"api"}]'}, "invalid_authorization_details"),
    ("details elsewhere", {"authorization_details": json.dumps([detail(locations=["https://x.example"])])}, "invalid_target"),
    ("details for another service", {"authorization_details": json.dumps([detail(locations=[WIKI.text])])}, "invalid_target"),
    ("an unmetered limit", {"authorization_details": json.dumps([detail(constraints={"max_calls": [{"call_class": "w", "count": 1}]})])}, "invalid_request"),
    ("an empty purpose", {"purpose": ""}, "invalid_request"),
]  # fmt: skip


@pytest.mark.bears("TX01", "TX02", "TX08", "TX09", "TX10", "TX11", "TX12", "TX13", "TX14", "TX23", "TX24", "X01")
@pytest.mark.parametrize(("changes", "error"), [pytest.param(c, e, id=n) for n, c, e in FAULTS])
async def test_a_fault_has_its_answer_and_its_record(door: HttpDoorway, changes: dict[str, Any], error: str) -> None:
    assert_error(await door.token(**changes), 400, error)
    (record,) = await door.estate.records("token_refused")
    assert record.actor == str(AGENT)
    assert await door.estate.records("task_started", "token_issued") == []


async def test_another_client_id_is_no_authentication(door: HttpDoorway) -> None:
    """RFC 8705 §2: a certificate that does not match the client_id is ``invalid_client``."""
    answer = await door.token(client_id=str(NEIGHBOUR))
    assert_error(answer, 401, "invalid_client")
    assert answer.headers["www-authenticate"].startswith("ClientCertificate ")
    (record,) = await door.estate.records("token_refused")
    assert (record.actor, record.fields["reason"]) == (str(AGENT), "client_mismatch")


@pytest.mark.parametrize(
    ("scheme", "named"), [("Basic", "Basic"), ("bearer", "bearer"), ("Evil,x", "ClientCertificate")]
)
async def test_who_tries_a_header_is_told_its_scheme_is_not_enough(door: HttpDoorway, scheme: str, named: str) -> None:
    """RFC 6749 §5.2; and nothing that a stranger writes is repeated."""
    door.come_as(None)
    answer = await door.token(headers={"authorization": f"{scheme} eDp5"})
    assert_error(answer, 401, "invalid_client")
    assert answer.headers["www-authenticate"] == f'{named} realm="broker"'


async def test_a_header_beside_an_assertion_is_a_second_way(door: HttpDoorway) -> None:
    door.come_as(None)
    asserted = {"client_assertion": door.jwt_svid(), "client_assertion_type": JWT_SPIFFE}
    body = assert_error(await door.token(headers={"authorization": "Basic eDp5"}, **asserted), 400, "invalid_request")
    assert body["error_code"] == "two_authentications"


@pytest.mark.bears("TX09")
async def test_who_sends_a_scope_is_refused_in_its_words(door: HttpDoorway) -> None:
    mine = door.estate.user_token(authorization_details=[detail(actions=["ticket.read"])])
    wide = {"subject_token": mine, "authorization_details": None, "scope": "ticket.read ticket.write"}
    assert_error(await door.token(**wide), 400, "invalid_scope")
    assert (await door.token(**wide | {"scope": "ticket.read"})).status_code == 200


@pytest.mark.bears("SP06")
async def test_an_actor_token_is_for_us_alone(door: HttpDoorway) -> None:
    shared = door.jwt_svid(AGENT, ISSUER, "https://other.example")
    assert_error(await door.token(actor_token=shared, actor_token_type=JWT), 400, "invalid_request")
    assert (await door.token(actor_token=door.jwt_svid(), actor_token_type=JWT)).status_code == 200


@pytest.mark.bears("TX12")
@pytest.mark.parametrize(
    "spelling",
    ["https://TICKETS.example.org", TICKETS.text + "/", TICKETS.text + ":443", "HTTPS://tickets.example.org/"],
)
async def test_spellings_of_one_resource(door: HttpDoorway, spelling: str) -> None:
    response = await door.token(resource=[spelling, TICKETS.text], audience=spelling)
    assert response.status_code == 200, response.text
    assert payload_of(response.json()["access_token"])["aud"] == TICKETS.text


@pytest.mark.bears("TX03", "TX05")
async def test_an_actor_that_the_user_named_says_so_itself(door: HttpDoorway) -> None:
    subject = door.estate.user_token(may_act={"sub": str(AGENT)})
    body = assert_error(await door.token(subject_token=subject), 400, "invalid_request")
    assert body["error_code"] == "actor_token_required"
    actor = {"actor_token": door.jwt_svid(), "actor_token_type": JWT}
    issued = await door.token(subject_token=subject, **actor)
    assert issued.status_code == 200, issued.text
    assert payload_of(issued.json()["access_token"])["act"] == {"sub": str(AGENT)}


@pytest.mark.bears("TX03", "TX04", "TX05", "AC01", "AC04")
@pytest.mark.parametrize(
    "claims",
    [
        {"act": {"sub": str(AGENT)}},
        {"act": {"sub": str(AGENT), "aud": TICKETS.text, "exp": 9999999999, "scope": "ticket.write"}},
        {"may_act": {"sub": str(NEIGHBOUR)}},
        {"may_act": {"sub": str(AGENT)}, "act": {"sub": str(AGENT)}},
    ],
)
async def test_a_delegated_token_is_refused_with_and_without_an_actor(
    door: HttpDoorway, claims: dict[str, Any]
) -> None:
    subject = door.estate.user_token(**claims)
    assert_error(await door.token(subject_token=subject), 400, "invalid_request")
    actor = {"actor_token": door.jwt_svid(), "actor_token_type": JWT}
    assert_error(await door.token(subject_token=subject, **actor), 400, "invalid_request")


@pytest.mark.bears("TX04", "AC05", "JW07")
async def test_our_own_token_is_no_users_word(door: HttpDoorway) -> None:
    first = (await door.token()).json()
    own = first["access_token"]
    assert_error(await door.token(subject_token=own, subject_token_type=URN + "id_token"), 400, "invalid_request")
    assert_error(await door.token(subject_token=own, purpose="another one"), 400, "invalid_request")
    for kind in ("access_token", "jwt"):
        again = await door.token(subject_token=own, subject_token_type=URN + kind, authorization_details=None)
        assert again.status_code == 200, again.text
        assert again.json()["task"] == first["task"]
        assert payload_of(again.json()["access_token"])["act"] == {"sub": str(AGENT)}


@pytest.mark.bears("X01")
async def test_the_actor_token_is_the_callers_own_or_none(door: HttpDoorway) -> None:
    assert (await door.token(actor_token=door.jwt_svid(), actor_token_type=JWT)).status_code == 200
    for token, kind in (
        (door.jwt_svid(NEIGHBOUR), JWT),
        (door.jwt_svid(audience=ISSUER_TOKEN), JWT),
        (door.jwt_svid(), ACCESS_TOKEN),
        (door.jwt_svid() + "x", JWT),
        (door.estate.user_token(), JWT),
    ):
        assert_error(await door.token(actor_token=token, actor_token_type=kind), 400, "invalid_request")


ISSUER_TOKEN = "https://broker.example.org:8443/token"


# ---- who


@pytest.mark.bears("PB14", "X01")
async def test_without_a_certificate_there_is_no_client(door: HttpDoorway) -> None:
    door.come_as(None)
    assert_error(await door.token(), 401, "invalid_client")
    for name in ("x-forwarded-client-cert", "x-client-cert", "ssl-client-cert"):
        assert_error(await door.token(headers={name: f"URI={AGENT}"}), 401, "invalid_client")
    assert_error(await door.token(client_id=str(AGENT)), 401, "invalid_client")


async def test_a_second_way_to_authenticate_is_refused(door: HttpDoorway) -> None:
    assert_error(await door.token(headers={"authorization": "Basic YTpi"}), 400, "invalid_request")


async def test_who_may_not_start_tasks_is_told_so(door: HttpDoorway) -> None:
    for who in (SpiffeId("spiffe://example.org/quiet"), SpiffeId("spiffe://example.org/unknown")):
        door.come_as(who)
        body = assert_error(await door.token(), 400, "unauthorized_client")
        assert "may_start_tasks" in body["hint"]


# ---- form


@pytest.mark.bears("X01", "X08")
async def test_how_a_request_must_be_sent(door: HttpDoorway) -> None:
    pairs = door.parameters()
    assert_error(await door.post("/token?x=1", pairs), 400, "invalid_request")
    assert_error(await door.post("/token?subject_token=x", pairs), 400, "invalid_request")
    for kind in (
        "application/json",
        "multipart/form-data; boundary=x",
        "text/plain",
        FORM + "; charset=latin-1",
        FORM + "x",
        "",
    ):
        assert_error(await door.post("/token", pairs, {"content-type": kind}), 400, "invalid_request")
    assert_error(await door.post("/token", pairs, {"content-encoding": "gzip"}), 400, "invalid_request")
    twice = [("content-type", FORM), ("content-encoding", "identity"), ("content-encoding", "gzip")]
    answer = await door.client.post("/token", content=str(httpx2.QueryParams(pairs)).encode(), headers=twice)
    assert assert_error(answer, 400, "invalid_request")["error_code"] == "content_encoding"
    assert_error(await door.raw("/token", b""), 400, "invalid_request")
    assert_error(await door.raw("/token", b"subject_token=" + b"a" * MAX_BODY), 400, "invalid_request")
    assert (await door.post("/token", pairs, {"content-type": FORM + "; charset=UTF-8"})).status_code == 200


async def test_other_methods_and_paths_are_json_too(door: HttpDoorway) -> None:
    assert_error(await door.client.get("/token"), 405, "method_not_allowed")
    assert_error(await door.client.put("/token"), 405, "method_not_allowed")
    for path in ("/", "/token/", "/unknown", "/tasks/", "/tasks/x/y", "/%2e%2e/token"):
        assert_error(await door.client.get(path), 404, "not_found")


# ---- again


@pytest.mark.bears("TX27", "TX28")
async def test_an_idempotency_key_makes_a_retry_safe(door: HttpDoorway) -> None:
    door.come_as(door.svid())
    key = {"idempotency-key": "5f1c"}
    subject = door.estate.user_token()
    first = (await door.token(subject_token=subject, headers=key)).json()
    again = (await door.token(subject_token=subject, headers=key)).json()
    assert payload_of(again["access_token"]) == payload_of(first["access_token"])
    assert_error(await door.token(subject_token=subject, scope="ticket.read", headers=key), 409, "invalid_request")
    task = {"task": first["task"], "headers": {"idempotency-key": "6a"}}
    second = (await door.token(subject_token=subject, authorization_details=None, **task)).json()
    third = (await door.token(subject_token=subject, authorization_details=None, **task)).json()
    assert payload_of(second["access_token"]) == payload_of(third["access_token"])
    for bad in ("", "a b", "k" * 256):
        assert_error(await door.token(headers={"idempotency-key": bad}), 400, "invalid_request")


async def test_when_the_issuer_is_away_the_caller_may_try_again(door: HttpDoorway) -> None:
    door.estate.oidc.fault = "status"
    try:
        response = await door.token()
    finally:
        door.estate.oidc.fault = ""
    assert_error(response, 503, "temporarily_unavailable")
    assert response.headers["retry-after"] == "1"


async def test_an_ended_session_and_an_ended_task_are_an_invalid_grant(door: HttpDoorway) -> None:
    svid = door.come_as(AGENT)
    assert svid is not None
    await door.estate.report("ws_1", svid.x5t)
    issued = (await door.token()).json()
    assert payload_of(issued["access_token"])["cnf"]["spiffe_session"] == "ws_1"
    await door.estate.lifecycle.revoke(issued["task"], by="operator:uid:0")
    assert_error(await door.token(task=issued["task"]), 400, "invalid_grant")
    await door.estate.sessions.report(NODE, [], ["ws_1"])
    assert_error(await door.token(), 400, "invalid_grant")


async def test_a_defect_is_shown_as_a_number(door: HttpDoorway, monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(*_: object) -> None:
        raise RuntimeError("a secret eyJhbGciOi")

    monkeypatch.setattr(door.estate.exchange, "start_and_issue", broken)
    body = assert_error(await door.token(), 500, "server_error")
    assert body["error_description"].startswith("internal error, reference ")
