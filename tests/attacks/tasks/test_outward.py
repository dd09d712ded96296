"""Attacks on OAuth's endpoints, through the real TLS port and the node agent's real socket. Every refusal leaves its record."""

import json
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from broker.clock import SystemClock
from broker.errors import InvalidToken
from broker.server.api.http.token_formats import ACCESS_TOKEN, GRANT_TYPE, ID_JAG, JWT, TXN_TOKEN
from broker.spiffe import jose
from broker.tasks import verify_task_token
from broker.tasks.transactions import verify_transaction
from tests.attacks.tasks.outward_rig import (
    DETAILS,
    NEIGHBOUR,
    REMOTE,
    SERVICE,
    TICKETS,
    TRIAGE,
    WIKI,
    Rig,
    by_socket,
    refused_by_socket,
    rig,
    started,
)
from tests.integration.test_agent_server import TD

pytestmark = pytest.mark.timeout(180)

URN = "urn:ietf:params:oauth:token-type:"
ORDER = int("FFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551", 16)


@pytest.fixture
async def house() -> AsyncIterator[Rig]:
    async with rig() as made:
        yield made


def detail(**members: Any) -> str:
    return json.dumps([DETAILS[0] | members])


TABLE: list[tuple[str, dict[str, Any], str]] = [
    ("TX01 no subject token", {"subject_token": None}, "invalid_request"),
    ("TX01 an actor token instead", {"subject_token": None, "actor_token": "x", "actor_token_type": JWT}, "invalid_request"),
    ("TX02 empty", {"subject_token": ""}, "invalid_request"),
    ("TX02 twice", {"subject_token": ["x", "x"]}, "invalid_request"),
    ("TX02 a type twice", {"subject_token_type": [ACCESS_TOKEN, ACCESS_TOKEN]}, "invalid_request"),
    ("TX08 refresh token wanted", {"requested_token_type": URN + "refresh_token"}, "invalid_request"),
    ("TX08 refresh token brought", {"subject_token_type": URN + "refresh_token"}, "invalid_request"),
    ("TX09 wider scope", {"scope": "ticket.delete"}, "invalid_scope"),
    ("TX10 nothing", {"authorization_details": None}, "invalid_scope"),
    ("TX11 two audiences", {"audience": [TICKETS, WIKI]}, "invalid_target"),
    ("TX11 one permitted, one unknown", {"resource": [TICKETS, "https://unknown.example"]}, "invalid_target"),
    ("TX12 another case of the path", {"resource": TICKETS + "/A"}, "invalid_target"),
    ("TX12 hidden slash", {"resource": TICKETS + "%2F"}, "invalid_target"),
    ("TX12 dot segments", {"resource": TICKETS + "/a/../b"}, "invalid_target"),
    ("TX12 another port", {"resource": TICKETS + ":8443"}, "invalid_target"),
    ("TX13 fragment", {"resource": TICKETS + "#x"}, "invalid_target"),
    ("TX13 user", {"resource": "https://u@tickets.example.org"}, "invalid_target"),
    ("TX13 not https", {"resource": "http://tickets.example.org"}, "invalid_target"),
    ("TX14 they disagree", {"audience": WIKI}, "invalid_target"),
    ("TX23 unknown", {"resource_owner": "alice"}, "invalid_request"),
    ("TX23 client secret", {"client_secret": "x"}, "invalid_request"),
    ("TX24 10,000 scopes", {"scope": "a " * 9_999 + "a"}, "invalid_scope"),
    ("a purpose for a running task", {"task": "tsk_x", "purpose": "x"}, "invalid_request"),
    ("an unknown type of details", {"authorization_details": '[{"type":"payment","locations":["https://tickets.example.org"],"actions":["a"]}]'}, "invalid_authorization_details"),
    ("an unknown member", {"authorization_details": detail(colour="red")}, "invalid_authorization_details"),
    ("BG05 amounts", {"authorization_details": detail(constraints={"max_amount": {"amount": "1e3", "currency": "EUR"}})}, "invalid_authorization_details"),
    ("BG05 a number", {"authorization_details": detail(constraints={"max_amount": {"amount": 1, "currency": "EUR"}})}, "invalid_authorization_details"),
    ("BG06 a prefix is no segment", {"authorization_details": detail(locations=[TICKETS + ".evil"])}, "invalid_target"),
    ("txn for a service", {"requested_token_type": TXN_TOKEN, "audience": TICKETS, "scope": "ticket.read"}, "invalid_target"),
    ("a user's word is no task", {"requested_token_type": TXN_TOKEN, "audience": "example.org", "resource": None, "authorization_details": None, "scope": "ticket.read"}, "invalid_request"),
    ("a grant for nobody", {"requested_token_type": ID_JAG, "audience": "https://as.evil.example", "resource": None}, "invalid_target"),
]  # fmt: skip


@pytest.mark.bears(
    "TX01", "TX02", "TX08", "TX09", "TX10", "TX11", "TX12", "TX13", "TX14", "TX23", "TX24", "BG05", "BG06", "X01",
)  # fmt: skip
async def test_every_fault_of_a_request(house: Rig) -> None:
    for number, (name, changes, error) in enumerate(TABLE):
        began = time.perf_counter()
        response = await house.token(**changes)
        took = time.perf_counter() - began
        body = response.json()
        assert (response.status_code, body["error"]) == (400, error), (name, response.text)
        assert response.headers["cache-control"] == "no-store", name
        assert "access_token" not in body
        assert not any(word in response.text for word in ("eyJ", "Traceback", "SELECT")), name
        assert took < 20, name
        records = house.records("token_refused")
        assert len(records) == number + 1, name
        assert records[-1].actor == str(TRIAGE)
    address = await house.clients[TRIAGE].post(
        "/token?subject_token=x", content=str(dict(house.form())), headers={"content-type": "application/json"}
    )
    assert (address.status_code, address.json()["error"]) == (400, "invalid_request")
    assert house.records("task_started", "token_issued") == []


@pytest.mark.bears("TX12")
async def test_spellings_of_a_registered_resource_are_the_same(house: Rig) -> None:
    for spelling in ("https://TICKETS.example.org/", TICKETS + ":443"):
        issued = await house.issued(resource=spelling, audience=TICKETS)
        assert jose.parse_compact(issued["access_token"]).payload["aud"] == TICKETS


@pytest.mark.bears("TX19", "TX21")
async def test_no_token_outlives_what_it_stands_on(house: Rig) -> None:
    expired = house.user_token(lifetime=-1, now=time.time() - 5, iat=int(time.time()) - 100, exp=int(time.time()) - 2)
    refused = await house.token(subject_token=expired)
    assert (refused.status_code, refused.json()["error"]) == (400, "invalid_request")
    assert house.records("token_refused")[-1].fields["reason"] == "subject_expired"
    short = house.user_token(lifetime=40)
    issued = await house.issued(subject_token=short)
    ends = int(str(jose.parse_compact(short).payload["exp"]))
    claims = jose.parse_compact(issued["access_token"]).payload
    assert int(str(claims["exp"])) <= ends
    txn = await house.issued(
        subject_token=issued["access_token"], requested_token_type=TXN_TOKEN, audience="example.org", resource=None, authorization_details=None, scope="ticket.read",
    )  # fmt: skip
    assert int(str(jose.parse_compact(txn["access_token"]).payload["exp"])) <= int(str(claims["exp"]))


@pytest.mark.bears("TX27", "TX28")
async def test_one_key_one_token(house: Rig) -> None:
    subject = house.user_token()
    one = [await house.post("/token", house.form(subject_token=subject), idempotency_key="k1") for _ in range(3)]
    assert len({jose.parse_compact(each.json()["access_token"]).payload["jti"] for each in one}) == 1
    assert len(house.records("token_issued")) == 1
    other = await house.post("/token", house.form(subject_token=subject, scope="ticket.read"), idempotency_key="k1")
    assert other.status_code == 409
    assert house.records("token_refused")[-1].fields["reason"] == "idempotency_mismatch"
    again = await house.post("/token", house.form(subject_token=subject), idempotency_key="k1")
    assert again.json()["access_token"]


# ---- the same formats at the socket


@pytest.mark.bears("TX08", "TX09", "TX10", "X02", "X07")
async def test_other_formats_at_the_socket(house: Rig) -> None:
    both = json.dumps([DETAILS[0], {"type": "api", "locations": [WIKI], "actions": ["page.read"], "identifier": "7"}])
    task = await started(house, authorization_details=both)
    mine = {"spiffe_id": str(TRIAGE), "task_id": task.id}
    txn = {"requested_token_type": TXN_TOKEN, "audience": "example.org", "resource": TICKETS, "scope": "ticket.read"}
    jag = {"requested_token_type": ID_JAG, "audience": REMOTE}
    keys, now = await house.keys(), SystemClock().now()
    issued = await by_socket(house, **mine, **txn, request_details='{"ticket":"4711"}')
    assert (issued.token_type, issued.issued_token_type) == ("N_A", TXN_TOKEN)
    claims = verify_transaction(issued.access_token, keys, issuer=house.issuer, trust_domain=TD, now=now).claims
    assert (claims.task, claims.req_wl, dict(claims.tctx)) == (task.id, TRIAGE, {"ticket": "4711"})
    granted = await by_socket(house, **mine, **jag)
    payload = jose.parse_compact(granted.access_token).payload
    assert (payload["aud"], payload["resource"], payload["scope"]) == (REMOTE, WIKI, "page.read")
    before = len(house.records("token_refused"))
    for fields, code in (
        (mine | txn | {"scope": ""}, "invalid_scope"),
        (mine | txn | {"scope": "ticket.delete"}, "invalid_scope"),
        (mine | txn | {"audience": "example.com"}, "invalid_target"),
        (mine | txn | {"resource": WIKI}, "invalid_target"),
        (mine | txn | {"requested_token_type": URN + "refresh_token"}, "requested_token_type"),
        (mine | jag | {"audience": "https://as.evil.example"}, "invalid_target"),
        (mine | jag | {"resource": TICKETS}, "invalid_target"),
        (mine | jag | {"request_context": "{}"}, "requested_token_type"),
        (mine | {"resource": TICKETS, "request_context": "{}"}, "parameter_unknown"),
        (mine | txn | {"spiffe_id": str(NEIGHBOUR)}, "task_unknown"),
        (mine | jag | {"spiffe_id": str(NEIGHBOUR)}, "task_unknown"),
    ):
        assert await refused_by_socket(house, **fields) == code, fields
        before += 1
        assert len(house.records("token_refused")) == before, fields


# ---- what is brought


@pytest.mark.bears("SV01", "SV02", "X10")
async def test_what_is_anothers_is_as_if_it_were_not(house: Rig) -> None:
    issued = await house.issued()
    task, token = issued["task"], issued["access_token"]

    def alike(one: Any, other: Any) -> None:
        assert (one.status_code, one.json()) == (other.status_code, other.json())

    for who in (NEIGHBOUR, SERVICE):
        client = house.clients[who]
        alike(await client.get(f"/tasks/{task}"), await client.get("/tasks/tsk_unknown"))
        alike(await client.post(f"/tasks/{task}/complete"), await client.post("/tasks/tsk_unknown/complete"))
        assert (await client.get(f"/tasks/{task}")).status_code == 404
    alike(await house.token(NEIGHBOUR, task=task), await house.token(NEIGHBOUR, task="tsk_unknown"))
    for wanted in (TXN_TOKEN, ID_JAG):
        form = {"requested_token_type": wanted, "audience": REMOTE if wanted == ID_JAG else "example.org", "resource": None if wanted == ID_JAG else TICKETS, "authorization_details": None, "scope": "ticket.read"}  # fmt: skip
        alike(await house.token(NEIGHBOUR, task=task, **form), await house.token(NEIGHBOUR, task="tsk_unknown", **form))
    for body in ([("token", token), ("end", "task")], [("token", "x"), ("end", "task")]):
        answer = await house.post("/revoke", body, NEIGHBOUR)
        assert (answer.status_code, answer.content) == (200, b"")
    assert not await house.active(token, NEIGHBOUR)
    assert await house.active(token)
    assert (await house.clients[TRIAGE].get(f"/tasks/{task}")).json()["state"] == "active"


@pytest.mark.bears("X07", "JW07", "RV20", "SV10")
async def test_each_kind_passes_where_it_belongs_and_nowhere_else(house: Rig) -> None:
    wiki = {"resource": WIKI, "authorization_details": detail(locations=[WIKI])}
    held, of_wiki = (await house.issued())["access_token"], (await house.issued(**wiki))["access_token"]
    none = {"resource": None, "authorization_details": None}
    txn_form = {"requested_token_type": TXN_TOKEN, "audience": "example.org", "scope": "ticket.read", **none}
    jag_form = {"requested_token_type": ID_JAG, "audience": REMOTE, **none}
    signed = await house.post("/introspect", [("token", held)], SERVICE, accept="application/token-introspection+jwt")
    kinds = {
        "task": held,
        "txn": (await house.issued(subject_token=held, **txn_form))["access_token"],
        "id-jag": (await house.issued(subject_token=of_wiki, **jag_form))["access_token"],
        "jwt-grant": (await house.issued(subject_token=of_wiki, **jag_form | {"requested_token_type": JWT}))["access_token"],
        "introspection": signed.text,
        "jwt-svid": (await house.agent.jwt(house.issuer, spiffe_id=str(TRIAGE))).svids[0].svid,
        "user": house.user_token(),
    }  # fmt: skip
    keys, now = await house.keys(), SystemClock().now()

    def as_task(token: str) -> bool:
        try:
            verify_task_token(token, keys, issuer=house.issuer, audience=TICKETS, now=now)
        except InvalidToken:
            return False
        return True

    def as_txn(token: str) -> bool:
        try:
            verify_transaction(token, keys, issuer=house.issuer, trust_domain=TD, now=now)
        except InvalidToken:
            return False
        return True

    async def exchanged(token: str, **changes: Any) -> bool:
        who = NEIGHBOUR if changes.get("subject_token_type") == TXN_TOKEN else TRIAGE
        response = await house.token(who, subject_token=token, **changes)
        assert response.status_code in (200, 400), response.text
        return response.status_code == 200

    async def actor(token: str) -> bool:
        return await exchanged(house.user_token(), actor_token=token, actor_token_type=JWT)

    accepted: dict[str, set[str]] = {}
    for kind, token in kinds.items():
        told = {
            "verifier": as_task(token),
            "transaction verifier": as_txn(token),
            "introspect": await house.active(token),
            "subject": await exchanged(token, subject_token_type=URN + "jwt"),
            "actor": await actor(token),
            "transaction of": await exchanged(token, **txn_form),
            "replacement of": await exchanged(token, subject_token_type=TXN_TOKEN, **txn_form),
        }
        accepted[kind] = {consumer for consumer, said in told.items() if said}
    assert accepted == {
        "task": {"verifier", "introspect", "subject", "transaction of"},  # its holder may narrow its own
        "txn": {"transaction verifier", "replacement of"},
        "id-jag": set(),
        "jwt-grant": set(),
        "introspection": set(),
        "jwt-svid": {"actor"},
        "user": {"subject"},
    }


@pytest.mark.bears(
    "JW04", "JW05", "JW06", "JW08", "JW09", "JW10", "JW11", "JW12", "JW13", "JW14", "JW15", "JW16", "JW17", "JW18", "V10",
)  # fmt: skip
async def test_a_changed_token_is_no_token_anywhere(house: Rig) -> None:
    issued = await house.issued()
    token = issued["access_token"]
    head, body, tail = token.split(".")
    header, payload = json.loads(jose.b64url_decode(head)), json.loads(jose.b64url_decode(body))
    r, s = (int.from_bytes(jose.b64url_decode(tail)[at : at + 32]) for at in (0, 32))

    def put(top: Any, claims: Any, signature: bytes | None = None) -> str:
        parts = [each if isinstance(each, bytes) else json.dumps(each).encode() for each in (top, claims)]
        sign = tail if signature is None else jose.b64url_encode(signature)
        return ".".join([*map(jose.b64url_encode, parts), sign])

    raw = json.dumps(payload)
    changed = {
        "JW04 jku": put(header | {"jku": "https://169.254.169.254/keys"}, payload),
        "JW04 x5u": put(header | {"x5u": "https://evil.example"}, payload),
        "JW04 jwk": put(header | {"jwk": jose.jwk_from_public_key(ec.generate_private_key(ec.SECP256R1()).public_key())}, payload),
        "JW05 path": put(header | {"kid": "../../dev/null"}, payload),
        "JW05 quote": put(header | {"kid": "x' OR 1=1"}, payload),
        "JW05 NUL": put(header | {"kid": "a\0"}, payload),
        "JW05 long": put(header | {"kid": "k" * 4000}, payload),
        "JW06 crit": put(header | {"crit": ["x"]}, payload),
        "JW06 b64": put(header | {"crit": ["b64"], "b64": False}, payload),
        "JW08 typ": put(header | {"typ": "application/x-at+jwt"}, payload),
        "JW09 twice": put(header, (raw[:-1] + ', "aud": "https://wiki.example.org"}').encode()),
        "JW10 text": put(header, payload | {"exp": str(payload["exp"])}),
        "JW10 endless": put(header, raw.replace(str(payload["exp"]), "1e400", 1).encode()),
        "JW11 list": put(header, payload | {"aud": [TICKETS, WIKI]}),
        "JW12 suffix": put(header, payload | {"iss": house.issuer + ".evil"}),
        "JW13 padding": token + "=",
        "JW13 spare bits": head + "." + body + "." + tail[:-1] + chr(ord(tail[-1]) + 1),
        "JW13 newline": head + "\n." + body + "." + tail,
        "JW14 shorter": token[:-4],
        "JW14 longer": token + "AAAA",
        "JW14 DER": put(header, payload, encode_dss_signature(r, s)),
        "JW15 zero": put(header, payload, bytes(64)),
        "JW15 P-384": put(header | {"alg": "ES384"}, payload, bytes(96)),
        "JW16 JWE": token + ".x.y",
        "JW16 long": put(header, payload | {"x": "a" * 20_000}),
        "JW16 deep": put(header, ("[" * 1000 + "]" * 1000).encode()),
        "JW17 JSON": json.dumps({"protected": head, "payload": body, "signature": tail}),
        "JW18 UTF-16": put(header, raw.encode("utf-16")),
        "JW18 surrogate": put(header, b'{"sub":"\\ud800"}'),
        "none": put(header | {"alg": "none"}, payload, b""),
        "HS256": put(header | {"alg": "HS256"}, payload),
    }  # fmt: skip
    txn = {"requested_token_type": TXN_TOKEN, "audience": "example.org", "scope": "ticket.read", "resource": None, "authorization_details": None}  # fmt: skip
    keys, now = await house.keys(), SystemClock().now()
    for name, other in changed.items():
        with pytest.raises(InvalidToken):
            verify_task_token(other, keys, issuer=house.issuer, audience=TICKETS, now=now)
        response = await house.post("/introspect", [("token", other)], SERVICE)
        if response.status_code == 400:
            assert response.json()["error"] == "invalid_request", name
        else:
            assert response.json() == {"active": False}, name
        for form in ({}, txn):
            refused = await house.token(subject_token=other, **form)
            assert (refused.status_code, refused.json()["error"]) == (400, "invalid_request"), (name, refused.text)
            assert house.records("token_refused")[-1].actor == str(TRIAGE)
        assert (await house.post("/revoke", [("token", other)])).status_code in (200, 400), name
    assert await house.active(token), "nothing of it touched the token itself"
    # V10: the twin of an ECDSA signature is the same token, and dies with it.
    twin = put(header, payload, r.to_bytes(32) + (ORDER - s).to_bytes(32))
    twin = ".".join([head, body, twin.split(".")[2]])
    assert (await house.post("/revoke", [("token", token)])).status_code == 200
    assert not await house.active(token)
    assert not await house.active(twin)


@pytest.mark.bears("JW04", "JW05", "JW06", "JW09", "JW10", "JW12", "JW14", "JW16")
async def test_a_users_token_that_is_none(house: Rig) -> None:
    oidc = house.estate.oidc
    good = house.user_token()
    fetched = dict(oidc.fetched)
    for name, token in {
        "jku": oidc.token("alice", header={"jku": oidc.issuer + "/evil"}),
        "x5u": oidc.token("alice", header={"x5u": oidc.issuer + "/evil"}),
        "kid": oidc.token("alice", header={"kid": "../../dev/null"}),
        "crit": oidc.token("alice", header={"crit": []}),
        "iss": oidc.token("alice", iss=oidc.issuer + ".evil"),
        "exp": oidc.token("alice", exp=1e400),
        "sub": oidc.token(["alice"]),
        "short": good[:-4],
        "long": good + "A" * 9000,
    }.items():
        response = await house.token(subject_token=token)
        assert (response.status_code, response.json()["error"]) == (400, "invalid_request"), (name, response.text)
    assert "/evil" not in oidc.fetched, fetched
    assert len(house.records("token_refused")) == 9


@pytest.mark.bears("TX25", "X05")
async def test_the_same_checks_stand_before_every_format(house: Rig) -> None:
    """Kind by kind: a workload that may no longer act gets nothing, whichever variant of the grant it asks for."""
    none = {"resource": None, "authorization_details": None, "scope": "ticket.read"}
    wiki = {"resource": WIKI, "authorization_details": detail(locations=[WIKI])}
    held, of_wiki = await house.issued(), await house.issued(**wiki)
    running = {"task": held["task"], "resource": TICKETS}
    variants: list[dict[str, Any]] = [
        {},
        {"requested_token_type": JWT},
        {"scope": "ticket.read", "authorization_details": None},
        none | running,
        none | running | {"requested_token_type": TXN_TOKEN, "audience": "example.org"},
        none | {"requested_token_type": TXN_TOKEN, "audience": "example.org", "subject_token": held["access_token"]},
        none | {"requested_token_type": ID_JAG, "audience": REMOTE, "subject_token": of_wiki["access_token"]},
        none | {"requested_token_type": JWT, "audience": REMOTE, "subject_token": of_wiki["access_token"]},
        none | {"requested_token_type": ID_JAG, "audience": REMOTE, "task": of_wiki["task"]},
    ]
    for changes in variants:
        assert (await house.token(**changes)).status_code == 200, changes
    await house.estate.entries.delete(house.entries[TRIAGE])
    for changes in variants:
        refused = await house.token(**changes)
        assert refused.status_code == 400, (changes, refused.text)
        assert refused.json()["error"] in {"invalid_grant", "invalid_request", "unauthorized_client"}, changes
        assert house.records("token_refused")[-1].actor == str(TRIAGE)
    assert not await house.active(held["access_token"])


async def test_the_grant_type_is_the_exchange_and_no_other(house: Rig) -> None:
    for other in (
        "client_credentials",
        "refresh_token",
        "urn:ietf:params:oauth:grant-type:jwt-bearer",
        GRANT_TYPE + " ",
    ):
        response = await house.token(grant_type=other)
        assert (response.status_code, response.json()["error"]) == (400, "unsupported_grant_type")
    assert len(house.records("token_refused")) == 4
    # With its own parameter, too; beside the exchange that is one too many.
    for parameter in ("assertion", "refresh_token", "code", "device_code", "username"):
        alone = await house.post("/token", [("grant_type", "x"), (parameter, "x")], TRIAGE)
        assert (alone.status_code, alone.json()["error"]) == (400, "unsupported_grant_type")
        for more in ({}, {"requested_token_type": TXN_TOKEN}, {"requested_token_type": ID_JAG}):
            beside = await house.token(**{parameter: "x"}, **more)
            assert (beside.status_code, beside.json()["error_code"]) == (400, "parameter_unknown")


@pytest.mark.bears("TX09", "TX15")
async def test_what_a_token_gave_up_it_does_not_give_back(house: Rig) -> None:
    """A token of ours as the subject is the ceiling: of authority, of scope and of time, whatever its task may still do."""
    wide = (await house.issued())["access_token"]
    narrow = await house.issued(subject_token=wide, authorization_details=detail(actions=["ticket.read"]))
    assert narrow["scope"] == "ticket.read"
    held = narrow["access_token"]
    before = len(house.records("token_issued"))
    for wider in (
        {},
        {"authorization_details": detail(actions=["ticket.write"])},
        {"authorization_details": None, "scope": "ticket.write"},
    ):
        response = await house.token(subject_token=held, **wider)
        assert response.status_code == 400, response.text
        assert "access_token" not in response.json()
        assert house.records("token_refused")[-1].fields["reason"] == response.json()["error_code"]
    assert len(house.records("token_issued")) == before
    again = await house.issued(subject_token=held, authorization_details=None)
    assert (again["scope"], again["authorization_details"][0]["actions"]) == ("ticket.read", ["ticket.read"])
    first, second = (jose.parse_compact(token).payload for token in (held, again["access_token"]))
    assert second["exp"] <= first["exp"] and second["task"]["id"] == first["task"]["id"]
