"""``requested_token_type``: transaction tokens and grants, each its own format, none wider than what it stands on."""

import json
from typing import Any

import httpx2
import pytest

from broker.errors import InvalidToken
from broker.sdk.dpop import ProofKey
from broker.server.api.http.token_formats import ACCESS_TOKEN, ID_JAG, JWT, TXN_TOKEN
from broker.server.tasks.config import Audience, Audiences
from broker.spiffe import SpiffeId, jose
from broker.tasks.transactions import TransactionClaims, verify_transaction
from tests.unit.server.api.http.door import URN, HttpDoorway, assert_error, payload_of
from tests.unit.server.tasks.estate import (
    AGENT,
    INSPECTOR,
    ISSUER,
    NEIGHBOUR,
    NODE,
    REMOTE,
    REPLACER,
    TICKETS,
    WIKI,
    detail,
    entry,
)

TRUST_DOMAIN = "example.org"


async def held(door: HttpDoorway, **changes: Any) -> str:
    """A task token, and the door left to its holder."""
    door.come_as(door.svid())
    response = await door.token(**changes)
    assert response.status_code == 200, response.text
    return str(response.json()["access_token"])


async def transaction(door: HttpDoorway, token: str, **changes: Any) -> httpx2.Response:
    headers = changes.pop("headers", None)
    good: dict[str, Any] = {
        "requested_token_type": TXN_TOKEN,
        "subject_token": token,
        "audience": TRUST_DOMAIN,
        "resource": None,
        "authorization_details": None,
        "scope": "ticket.read",
    }
    return await door.token(headers=headers, **good | changes)


async def grant(door: HttpDoorway, token: str, **changes: Any) -> httpx2.Response:
    headers = changes.pop("headers", None)
    good: dict[str, Any] = {
        "requested_token_type": ID_JAG,
        "subject_token": token,
        "audience": REMOTE,
        "resource": None,
        "authorization_details": None,
    }
    return await door.token(headers=headers, **good | changes)


def wiki(**members: Any) -> dict[str, str]:
    return {"resource": WIKI.text, "authorization_details": json.dumps([detail(locations=[WIKI.text], **members)])}


def read(door: HttpDoorway, token: str) -> TransactionClaims:
    keys, now = door.estate.keys.task_keys(), door.estate.clock.now()
    return verify_transaction(token, keys, issuer=ISSUER, trust_domain=AGENT.trust_domain, now=now).claims


async def test_a_holder_begins_a_transaction(door: HttpDoorway) -> None:
    token = await held(door, authorization_details=json.dumps([detail(identifier="4711")]))
    contexts = {"request_context": '{"req_ip":"69.151.72.123","step":2}', "request_details": '{"ticket":"4711"}'}
    response = await transaction(door, token, **contexts)
    assert response.status_code == 200, response.text
    assert response.headers["cache-control"] == "no-store"
    body = response.json()
    assert (body["token_type"], body["issued_token_type"], body["scope"]) == ("N_A", TXN_TOKEN, "ticket.read")
    assert 15 <= body["expires_in"] <= 60
    assert "refresh_token" not in body
    of_task, claims = payload_of(token), payload_of(body["access_token"])
    assert jose.parse_compact(body["access_token"]).typ == "txntoken+jwt"
    assert claims["aud"] == TRUST_DOMAIN
    assert (claims["sub"], claims["txn"], claims["act"]) == ("alice", of_task["txn"], of_task["act"])
    assert claims["req_wl"] == str(AGENT)
    assert claims["chain_metadata"] == {"hop_count": 1, "txn_path": [str(AGENT)]}
    assert claims["rctx"] == {"req_ip": "69.151.72.123", "step": 2}
    assert claims["tctx"] == {"ticket": "4711"}
    # What narrows the task narrows the transaction: a scope alone would have lost the ticket.
    assert claims["authorization_details"] == [detail(identifier="4711", actions=["ticket.read"])]
    assert not {"cnf", "client_id"} & claims.keys()
    assert read(door, body["access_token"]).task == of_task["task"]["id"]
    record = (await door.estate.records("token_issued"))[-1]
    assert (record.fields["kind"], record.fields["audience"], record.actor) == ("txn_token", TRUST_DOMAIN, str(AGENT))


async def test_a_service_begins_one_with_the_token_it_was_called_with(door: HttpDoorway) -> None:
    token = await held(door)
    door.come_as(INSPECTOR)
    claims = payload_of((await transaction(door, token)).json()["access_token"])
    assert (claims["req_wl"], claims["act"]) == (str(INSPECTOR), {"sub": str(AGENT)})


async def test_who_neither_holds_it_nor_is_named_learns_nothing_of_it(door: HttpDoorway) -> None:
    live = await held(door)
    dead = await held(door)
    await door.estate.lifecycle.revoke(payload_of(dead)["task"]["id"], by="operator:uid:0")
    # A second replica has the same SPIFFE ID, and not the key that the token is bound to.
    for who in (NEIGHBOUR, REPLACER, AGENT):
        door.come_as(who)
        answers = [await transaction(door, token) for token in (live, dead)]
        for answer in answers:
            assert_error(answer, 400, "unauthorized_client")
        assert answers[0].json() == answers[1].json()
        assert_error(await grant(door, live), 400, "unauthorized_client")
    # The service may begin a transaction; what leaves the house is the holder's alone.
    door.come_as(INSPECTOR)
    assert_error(await grant(door, live), 400, "unauthorized_client")


async def test_what_is_bound_to_a_key_is_brought_by_who_has_the_key(door: HttpDoorway) -> None:
    key, other = ProofKey(door.estate.clock), ProofKey(door.estate.clock)
    asked = await door.token(headers={"DPoP": key.proof("POST", f"{ISSUER}/token")})
    nonce = asked.headers["dpop-nonce"]

    def proven(by: ProofKey) -> dict[str, str]:
        return {"DPoP": by.proof("POST", f"{ISSUER}/token", nonce=nonce)}

    # The session that stands beside the key says when the token ends, and not who holds it.
    svid = door.svid()
    door.come_as(svid)
    await door.estate.report("ws_1", svid.x5t)
    response = await door.token(headers=proven(key))
    token = str(response.json()["access_token"])
    assert payload_of(token)["cnf"] == {"jkt": key.jkt, "spiffe_session": "ws_1"}
    assert_error(await transaction(door, token), 400, "unauthorized_client")
    assert_error(await transaction(door, token, headers=proven(other)), 400, "unauthorized_client")
    held_by_its_key = await transaction(door, token, headers=proven(key))
    assert held_by_its_key.status_code == 200, held_by_its_key.text
    door.come_as(REPLACER)
    handed_on = await transaction(door, held_by_its_key.json()["access_token"], subject_token_type=TXN_TOKEN)
    assert handed_on.status_code == 200, handed_on.text


async def test_a_transaction_is_never_wider_than_the_token(door: HttpDoorway) -> None:
    token = await held(door, authorization_details=json.dumps([detail(actions=["ticket.read"], identifier="4711")]))
    assert_error(await transaction(door, token, scope="ticket.write"), 400, "invalid_scope")
    wider = json.dumps([detail(actions=["ticket.read"])])
    assert_error(await transaction(door, token, authorization_details=wider), 400, "invalid_authorization_details")
    elsewhere = json.dumps([detail(locations=[WIKI.text], actions=["ticket.read"], identifier="4711")])
    assert_error(await transaction(door, token, authorization_details=elsewhere), 400, "invalid_authorization_details")
    assert_error(await transaction(door, token, resource=WIKI.text), 400, "invalid_target")


FAULTS: list[tuple[str, dict[str, Any], str]] = [
    ("TX10 no scope", {"scope": None}, "invalid_scope"),
    ("another trust domain", {"audience": "example.com"}, "invalid_target"),
    ("a service as audience", {"audience": TICKETS.text}, "invalid_target"),
    ("TX11 two audiences", {"audience": [TRUST_DOMAIN, "example.com"]}, "invalid_target"),
    ("no audience", {"audience": None}, "invalid_target"),
    ("TX08 a refresh token", {"subject_token_type": URN + "refresh_token"}, "invalid_request"),
    ("an ID token", {"subject_token_type": URN + "id_token"}, "invalid_request"),
    ("not a token", {"subject_token": "x"}, "invalid_request"),
    ("a purpose", {"purpose": "x"}, "invalid_request"),
    ("an actor token", {"actor_token": "x", "actor_token_type": JWT}, "invalid_request"),
    ("context is no JSON", {"request_context": "{"}, "invalid_request"),
    ("context is no object", {"request_context": "[]"}, "invalid_request"),
    ("context is deep", {"request_details": '{"a":{"b":1}}'}, "invalid_request"),
    ("context with a name twice", {"request_details": '{"a":1,"a":2}'}, "invalid_request"),
    ("context with a fraction", {"request_details": '{"a":1.5}'}, "invalid_request"),
    ("context is long", {"request_details": json.dumps({"a": "x" * 1024})}, "invalid_request"),
]


@pytest.mark.bears("TX08", "TX10", "TX11", "X01")
@pytest.mark.parametrize(("changes", "error"), [pytest.param(c, e, id=n) for n, c, e in FAULTS])
async def test_a_fault_of_a_transaction_request(door: HttpDoorway, changes: dict[str, Any], error: str) -> None:
    token = await held(door)
    assert_error(await transaction(door, token, **changes), 400, error)
    (record,) = await door.estate.records("token_refused")
    assert record.actor == str(AGENT)
    assert len(await door.estate.records("token_issued")) == 1


async def test_an_audience_that_does_not_take_part_begins_none(door: HttpDoorway) -> None:
    token = await held(door, **wiki())
    assert_error(await transaction(door, token), 400, "invalid_target")


async def test_a_transaction_ends_with_what_it_stands_on(door: HttpDoorway) -> None:
    token = await held(door)
    door.estate.clock.advance(170)
    assert (await transaction(door, token)).json()["expires_in"] <= 10
    door.estate.clock.advance(11)
    assert_error(await transaction(door, token), 400, "invalid_request")
    token = await held(door)
    await door.estate.lifecycle.revoke(payload_of(token)["task"]["id"], by="operator:uid:0")
    assert_error(await transaction(door, token), 400, "invalid_request")


async def test_a_transaction_is_handed_on(door: HttpDoorway) -> None:
    first = (await transaction(door, await held(door), request_details='{"ticket":"4711"}')).json()["access_token"]
    door.estate.clock.advance(5)
    door.come_as(REPLACER)
    again = {"subject_token_type": TXN_TOKEN, "request_details": '{"step":"bill"}'}
    response = await transaction(door, first, **again)
    assert response.status_code == 200, response.text
    before, after = payload_of(first), payload_of(response.json()["access_token"])
    assert [before[name] for name in ("txn", "sub", "aud", "act", "exp")] == [
        after[name] for name in ("txn", "sub", "aud", "act", "exp")
    ]
    assert after["req_wl"] == str(REPLACER)
    assert after["chain_metadata"] == {"hop_count": 2, "txn_path": [str(AGENT), str(REPLACER)]}
    assert after["tctx"] == {"step": "bill", "ticket": "4711"}
    assert after["jti"] != before["jti"]
    # Its own place in the chain is taken: a loop ends here.
    second = response.json()["access_token"]
    assert_error(await transaction(door, second, **again), 400, "invalid_request")
    # Neither what it says of the ticket nor its scope grows.
    door.come_as(NEIGHBOUR)
    for change, error in (
        ({"request_details": '{"ticket":"1"}'}, "invalid_request"),
        ({"scope": "ticket.write"}, "invalid_scope"),
        ({"scope": "ticket.read", "authorization_details": json.dumps([detail(locations=[WIKI.text])])}, "invalid_authorization_details"),
    ):  # fmt: skip
        assert_error(await transaction(door, second, **again | change), 400, error)
    door.come_as(INSPECTOR)
    assert_error(await transaction(door, second, **again), 400, "unauthorized_client")
    door.come_as(NEIGHBOUR)
    door.estate.clock.advance(26)
    assert_error(await transaction(door, second, **again), 400, "invalid_request")


async def test_a_transaction_of_a_dead_task_is_not_handed_on(door: HttpDoorway) -> None:
    first = (await transaction(door, await held(door))).json()
    await door.estate.lifecycle.revoke(first["task"], by="operator:uid:0")
    door.come_as(REPLACER)
    answer = await transaction(door, first["access_token"], subject_token_type=TXN_TOKEN)
    assert_error(answer, 400, "invalid_request")


async def test_an_audience_that_leaves_takes_its_transactions_with_it(
    door: HttpDoorway, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = (await transaction(door, await held(door))).json()["access_token"]
    monkeypatch.setattr(door.estate.assertions._bases, "_audiences", Audiences([Audience(TICKETS)]))
    door.come_as(REPLACER)
    assert_error(await transaction(door, first, subject_token_type=TXN_TOKEN), 400, "invalid_target")


@pytest.mark.parametrize("path", ["/introspect", "/revoke"])
async def test_a_client_id_is_the_certificates_or_refused(door: HttpDoorway, path: str) -> None:
    token = await held(door)
    assert (await door.post(path, [("token", token), ("client_id", str(AGENT))])).status_code == 200
    answer = await door.post(path, [("token", token), ("client_id", str(NEIGHBOUR))])
    assert_error(answer, 401, "invalid_client")


@pytest.mark.parametrize(("wanted", "typ"), [(ID_JAG, "oauth-id-jag+jwt"), (JWT, "JWT")])
async def test_a_grant_for_another_authorization_server(door: HttpDoorway, wanted: str, typ: str) -> None:
    token = await held(door, **wiki())
    response = await grant(door, token, requested_token_type=wanted, scope="ticket.read")
    assert response.status_code == 200, response.text
    body = response.json()
    assert (body["token_type"], body["issued_token_type"], body["expires_in"]) == ("N_A", wanted, 60)
    jws, claims = jose.parse_compact(body["access_token"]), payload_of(body["access_token"])
    assert jws.typ == typ
    assert (claims["iss"], claims["sub"], claims["aud"]) == (ISSUER, "alice", REMOTE)
    assert (claims["client_id"], claims["resource"], claims["scope"]) == ("triage", WIKI.text, "ticket.read")
    assert claims["act"] == {"sub": str(AGENT)}
    assert claims["jti"] != payload_of((await grant(door, token)).json()["access_token"])["jti"]
    record = (await door.estate.records("token_issued"))[-1]
    assert (record.fields["kind"], record.fields["audience"]) == (ID_JAG.removeprefix(URN), REMOTE)


async def test_a_grant_by_a_users_token_and_a_running_task(door: HttpDoorway) -> None:
    task = (await door.token(**wiki())).json()["task"]
    user = {"subject_token_type": URN + "id_token", "task": task}
    assert (await grant(door, door.estate.user_token(), **user)).status_code == 200
    assert_error(await grant(door, door.estate.user_token("mallory"), **user), 400, "invalid_request")
    door.come_as(NEIGHBOUR)
    assert_error(await grant(door, door.estate.user_token(), **user), 400, "invalid_grant")


GRANT_FAULTS: list[tuple[str, dict[str, Any], str]] = [
    ("an unknown server", {"audience": "https://as.unknown.example"}, "invalid_target"),
    ("a slash more", {"audience": REMOTE + "/"}, "invalid_target"),
    ("two servers", {"audience": [REMOTE, "https://as.unknown.example"]}, "invalid_target"),
    ("a JWT for an unknown server", {"audience": "https://as.unknown.example", "requested_token_type": JWT, "scope": "a"}, "invalid_target"),
    ("an access token for the server", {"requested_token_type": ACCESS_TOKEN, "scope": "a"}, "invalid_target"),
    ("another resource", {"resource": TICKETS.text}, "invalid_target"),
    ("a wider scope", {"scope": "ticket.delete"}, "invalid_scope"),
    ("context", {"request_context": "{}"}, "invalid_request"),
    ("TX08 a refresh token", {"subject_token_type": URN + "refresh_token"}, "invalid_request"),
]  # fmt: skip


@pytest.mark.bears("TX08", "TX12", "X01")
@pytest.mark.parametrize(("changes", "error"), [pytest.param(c, e, id=n) for n, c, e in GRANT_FAULTS])
async def test_a_fault_of_a_grant_request(door: HttpDoorway, changes: dict[str, Any], error: str) -> None:
    token = await held(door, **wiki())
    assert_error(await grant(door, token, **changes), 400, error)
    assert len(await door.estate.records("token_refused")) == 1
    assert len(await door.estate.records("token_issued")) == 1


async def test_a_token_for_another_service_gives_no_grant(door: HttpDoorway) -> None:
    assert_error(await grant(door, await held(door)), 400, "invalid_target")


@pytest.mark.bears("TX27", "TX28")
async def test_the_same_request_under_a_key_is_the_same_token(door: HttpDoorway) -> None:
    token = await held(door)
    key = {"headers": {"idempotency-key": "k1"}}
    first, again = [(await transaction(door, token, **key)).json()["access_token"] for _ in range(2)]
    assert payload_of(first) == payload_of(again)
    assert len(await door.estate.records("token_issued")) == 2
    assert_error(await transaction(door, token, scope="ticket.write", **key), 409, "invalid_request")
    assert_error(await transaction(door, token, request_context='{"a":1}', **key), 409, "invalid_request")
    await door.estate.lifecycle.revoke(payload_of(token)["task"]["id"], by="operator:uid:0")
    assert_error(await transaction(door, token, **key), 400, "invalid_request")


async def test_the_end_of_the_agents_process_or_entry_ends_the_road(door: HttpDoorway) -> None:
    svid = door.come_as(AGENT)
    assert svid is not None
    await door.estate.report("ws_1", svid.x5t)
    token = (await door.token()).json()["access_token"]
    door.come_as(INSPECTOR)
    assert (await transaction(door, token)).status_code == 200
    await door.estate.sessions.report(NODE, [], ["ws_1"])
    assert_error(await transaction(door, token), 400, "invalid_request")


@pytest.mark.bears("JW07", "X07")
async def test_no_kind_passes_for_another(door: HttpDoorway) -> None:
    task = await held(door, **wiki())
    jag = (await grant(door, task)).json()["access_token"]
    plain = (await grant(door, task, requested_token_type=JWT)).json()["access_token"]
    tickets = await held(door)
    txn = (await transaction(door, tickets)).json()["access_token"]
    for other in (jag, plain, txn):
        for audience in (WIKI, TICKETS):
            with pytest.raises(InvalidToken):
                door.estate.verify(other, audience)
        assert (await door.post("/introspect", [("token", other)])).json() == {"active": False}
        for kind in (ACCESS_TOKEN, JWT, URN + "id_token"):
            assert_error(await door.token(subject_token=other, subject_token_type=kind), 400, "invalid_request")
        if other is not txn:
            assert_error(await transaction(door, other), 400, "invalid_request")
            door.come_as(REPLACER)
            assert_error(await transaction(door, other, subject_token_type=TXN_TOKEN), 400, "invalid_request")
            door.come_as(door.svid())
    with pytest.raises(InvalidToken):
        read(door, tickets)
    assert_error(await transaction(door, tickets, subject_token_type=TXN_TOKEN), 400, "invalid_request")
    assert_error(await transaction(door, txn), 400, "invalid_request")


async def test_whose_session_or_certificate_is_over_may_bring_nothing(door: HttpDoorway) -> None:
    token = await held(door)
    svid = door.come_as(SpiffeId(str(INSPECTOR)))
    assert svid is not None
    await door.estate.put_entry(entry("entry-9", INSPECTOR, may_start_tasks=False))
    await door.estate.report("ws_9", svid.x5t, spiffe_id=INSPECTOR, entry_id="entry-9")
    assert (await transaction(door, token)).status_code == 200
    await door.estate.sessions.report(NODE, [], ["ws_9"])
    assert_error(await transaction(door, token), 400, "invalid_grant")
