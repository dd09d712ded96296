"""JWT-SVID.md, line by line: the tokens that are issued, and what the agent, the library and the exchange refuse alike."""

import http.client
import json
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import jwt as pyjwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from broker._proto.broker.agent.v1 import tasks_pb2
from broker._proto.service import Stub
from broker._proto.spiffe import workload_pb2
from broker.agent.listener import TASKS
from broker.clock import SystemClock
from broker.errors import InvalidSvid
from broker.spiffe import Bundle, BundleSet, jose, verify_jwt_svid
from broker.spiffe.jose import b64url_encode, parse_compact
from broker.transport.tls import TlsIdentity, client_context
from tests.conformance.house import DOMAIN, HEADER, ONE, SECONDS, TWO, House, es256, reason
from tests.conformance.token_doors import TokenDoors, Verdicts


@pytest.fixture
def doors(house: House) -> Iterator[TokenDoors]:
    with closing(TokenDoors(house)) as one:
        yield one


def header_of(token: str) -> dict[str, Any]:
    found: dict[str, Any] = pyjwt.get_unverified_header(token)
    return found


@pytest.mark.bears("JW-01")
def test_compact_and_nothing_else(house: House, doors: TokenDoors) -> None:
    issued = house.jwt("tests").svids[0].svid
    assert issued.count(".") == 2
    good = house.replica.token(aud=[doors.audience])
    assert doors.ask(good).accepted
    protected, payload, signature = good.split(".")
    flattened = {"protected": protected, "payload": payload, "signature": signature}
    general = {"payload": payload, "signatures": [{"protected": protected, "signature": signature}]}
    for text in (
        json.dumps(flattened),
        json.dumps(general),
        f"{good}.",
        f".{good}",
        f"{protected}..{signature}",
        good + ".x.y",
    ):
        assert not doors.ask(text).accepted, text


@pytest.mark.bears("JW-02")
def test_no_header_but_three(house: House, doors: TokenDoors) -> None:
    assert set(header_of(house.jwt("tests").svids[0].svid)) == {"alg", "kid", "typ"}
    for name in ("jku", "jwk", "x5u", "x5c", "x5t", "x5t#S256", "cty", "crit", "b64", "zip", "anything"):
        assert not doors.ask(
            house.replica.token({name: ["exp"] if name == "crit" else "x"}, aud=[doors.audience])
        ).accepted


@pytest.mark.bears("JW-03")
def test_algorithms(house: House, doors: TokenDoors) -> None:
    assert header_of(house.jwt("tests").svids[0].svid)["alg"] == "ES256"
    for alg in ("none", "HS256", "HS512", "EdDSA", "ES256K", "ES384", "RS256", "PS256", "es256", ""):
        assert not doors.ask(house.replica.token({"alg": alg}, aud=[doors.audience])).accepted, alg
    # The public key as the secret of an HMAC.
    claims = json.dumps(house.replica.claims(aud=[doors.audience]))
    unsigned = ".".join(
        b64url_encode(part.encode()) for part in (json.dumps(house.replica.header(alg="HS256")), claims)
    )
    assert not doors.ask(f"{unsigned}.{b64url_encode(b'0' * 32)}").accepted
    assert not doors.ask(f"{unsigned}.").accepted


@pytest.mark.bears("JW-03")
@pytest.mark.parametrize("alg", sorted(jose.ALGORITHMS))
def test_each_of_the_nine(house: House, alg: str) -> None:
    # Authorities of ours sign by ES256; what a federated trust domain signs by another of the nine must verify, too.
    curves = {"ES256": ec.SECP256R1(), "ES384": ec.SECP384R1(), "ES512": ec.SECP521R1()}
    key = ec.generate_private_key(curves[alg]) if alg in curves else rsa.generate_private_key(65537, 2048)
    token = pyjwt.encode(house.replica.claims(), key, algorithm=alg, headers={"kid": "k"})
    bundles = BundleSet.of(Bundle(DOMAIN, (), {"k": key.public_key()}))
    assert str(verify_jwt_svid(token, bundles, audience="tests", now=SystemClock().now()).id) == ONE


@pytest.mark.bears("JW-04")
def test_a_key_is_always_named(house: House, doors: TokenDoors) -> None:
    assert header_of(house.jwt("tests").svids[0].svid)["kid"] in house.bundles[DOMAIN].jwt_authorities
    for kid in (None, "", "unknown", 7, "another-replica\n"):
        assert not doors.ask(house.replica.token({"kid": kid}, aud=[doors.audience])).accepted, kid


@pytest.mark.bears("JW-05")
def test_types(house: House, doors: TokenDoors) -> None:
    assert header_of(house.jwt("tests").svids[0].svid)["typ"] == "JWT"
    for typ, good in (
        ("JWT", True), ("JOSE", True), (None, True), ("jwt", False), ("at+jwt", False), ("wit+jwt", False),
        ("dpop+jwt", False), ("txntoken+jwt", False), ("secevent+jwt", False), ("", False), (1, False),
    ):  # fmt: skip
        assert doors.ask(house.replica.token({"typ": typ}, aud=[doors.audience])).accepted is good, typ


@pytest.mark.bears("JW-06")
def test_the_subject_is_the_spiffe_id(house: House, doors: TokenDoors) -> None:
    for one in house.jwt("tests").svids:
        assert parse_compact(one.svid).payload["sub"] == one.spiffe_id
    for sub in (None, "", "one", f"spiffe://{DOMAIN}", "https://dev.test/one", "spiffe://other.test/one", 1, [ONE]):
        assert not doors.ask(house.replica.token(sub=sub, aud=[doors.audience])).accepted, sub


@pytest.mark.bears("JW-06")
def test_an_actor_token_is_the_callers_own(house: House, doors: TokenDoors) -> None:
    other = house.replica.token(sub=TWO, aud=[doors.audience])
    assert (doors.agent(other), doors.library(other), doors.exchange(other)) == ("", "", "actor_token")


@pytest.mark.bears("JW-07")
def test_audiences(house: House, doors: TokenDoors) -> None:
    assert parse_compact(house.jwt("b", "a").svids[0].svid).payload["aud"] == ["a", "b"]
    audience = doors.audience
    for aud, good in (
        ([audience], True), (audience, True), (None, False), ([], False), ("", False),
        ([""], False), ("other", False), ([audience + "/"], False), (audience[:-1], False), (audience + "0", False),
        ({"a": audience}, False), ([[audience]], False), ([1, audience], False), (True, False),
    ):  # fmt: skip
        assert doors.ask(house.replica.token(aud=aud)).accepted is good, aud
    # Whoever else it is for could show it here: to the exchange it is for this issuer alone.
    assert doors.ask(house.replica.token(aud=[audience, "more"])) == Verdicts("", "", "actor_token")


@pytest.mark.bears("JW-08")
def test_expiry(house: House, doors: TokenDoors) -> None:
    issued = parse_compact(house.jwt("tests").svids[0].svid).payload
    assert isinstance(issued["exp"], int) and isinstance(issued["iat"], int)
    now = int(house.replica.claims()["iat"])
    for claims, good in (
        ({}, True), ({"exp": None}, False), ({"exp": now - 300}, False), ({"exp": 0}, False), ({"exp": -1}, False),
        ({"exp": str(now + 300)}, False), ({"exp": now + 300.5}, False), ({"exp": True}, False), ({"exp": 10**18}, False),
        ({"exp": [now + 300]}, False), ({"nbf": now + 3000}, False), ({"iat": now + 3000}, False), ({"nbf": "0"}, False),
        ({"iat": None}, True), ({"nbf": now - 10}, True),
    ):  # fmt: skip
        assert doors.ask(house.replica.token(aud=[doors.audience], **claims)).accepted is good, claims


@pytest.mark.bears("JW-09", "JW-14")
def test_other_claims_are_allowed(house: House, doors: TokenDoors) -> None:
    assert parse_compact(house.jwt("tests").svids[0].svid).payload["jti"]
    more = {"act": {"sub": "x"}, "scope": "a b", "iss": "https://elsewhere.test", "custom": [1, {"a": None}]}
    assert doors.ask(house.replica.token(aud=[doors.audience], **more)).accepted
    assert doors.ask(house.replica.token(aud=[doors.audience], jti=None)).accepted
    # JW-14: a jti is not tracked, the same token is good twice.
    again = house.replica.token(aud=[doors.audience], jti="the same")
    assert doors.ask(again).accepted and doors.ask(again).accepted


@pytest.mark.bears("JW-10")
def test_over_http_it_is_no_credential_of_the_exchange(house: House, doors: TokenDoors) -> None:
    # Our HTTPS services know callers by their certificate; a bearer token beside it is two authentications.
    leaf = house.replica.leaf()
    context = client_context(TlsIdentity((leaf.der,), leaf.key), house.roots)
    connection = http.client.HTTPSConnection("127.0.0.1", house.port, timeout=SECONDS, context=context)
    try:
        bearer = {"authorization": f"Bearer {house.replica.token(aud=[doors.audience])}"}
        connection.request("POST", "/token", "", bearer)
        assert json.loads(connection.getresponse().read())["error_code"] == "two_authentications"
    finally:
        connection.close()


@pytest.mark.bears("JW-11")
def test_over_grpc_it_says_nothing_about_the_caller(house: House) -> None:
    # Whoever sends somebody else's token as metadata is still who the kernel says.
    bearer = (*HEADER, ("authorization", f"Bearer {house.replica.token(sub=TWO)}"))
    with house.workload() as stub:
        call = stub.FetchX509SVID(workload_pb2.X509SVIDRequest(), metadata=bearer, timeout=SECONDS)
        assert [one.spiffe_id for one in next(call).svids] == [ONE, TWO]
        call.cancel()
    with house.channel(house.agent_socket) as channel:
        stub = Stub(channel, TASKS)
        wanted = tasks_pb2.StartTaskRequest(user_token="x", purpose="x", authorization_details="[]")
        assert reason(lambda: stub.StartTask(wanted, metadata=bearer, timeout=SECONDS))


@pytest.mark.bears("JW-12")
def test_keys_of_a_bundle_document(house: House) -> None:
    keys = [key for key in json.loads(house.bundles[DOMAIN].to_json())["keys"] if key["use"] == "jwt-svid"]
    assert {key["kid"] for key in keys} == set(house.bundles[DOMAIN].jwt_authorities)
    assert len(keys) >= 2


@pytest.mark.bears("JW-13")
def test_only_keys_for_jwt_svids_verify_them(house: House) -> None:
    key = {"kid": "k", **jose.jwk_from_public_key(house.replica.jwt_key.public_key())}
    claims, header = house.replica.claims(), {"alg": "ES256", "kid": "k"}
    text = ".".join(b64url_encode(json.dumps(part).encode()) for part in (header, claims))
    token = f"{text}.{b64url_encode(es256(house.replica.jwt_key, text.encode()))}"
    for use, good in (
        ("jwt-svid", True),
        ("wit-svid", False),
        ("x509-svid", False),
        ("sig", False),
        ("JWT-SVID", False),
        (None, False),
    ):
        document = json.dumps({"keys": [{**key, "use": use} if use else key]})
        bundles = BundleSet.of(Bundle.parse(DOMAIN, document))
        if good:
            verify_jwt_svid(token, bundles, audience="tests", now=SystemClock().now())
            continue
        with pytest.raises(InvalidSvid):
            verify_jwt_svid(token, bundles, audience="tests", now=SystemClock().now())
