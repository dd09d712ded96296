"""SPIFFE_Workload_API.md, line by line: what a running agent sends to this process."""

import hashlib
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography.hazmat.primitives.serialization import load_der_private_key
from cryptography.x509 import load_der_x509_certificate, load_der_x509_crl
from google.protobuf.json_format import MessageToDict

from broker._proto.spiffe import workload_pb2
from broker.clock import SystemClock
from broker.errors import InvalidSvid
from broker.spiffe import verify_jwt_svid, verify_x509_svid
from broker.spiffe.jose import b64url_encode, parse_compact
from broker.spiffe.x509svid import split_der
from tests.conformance.house import DOMAIN, HEADER, ONE, SECONDS, TWO, House, es256, reason
from tests.fakes.running_agent import estate

WIRE: dict[str, dict[str, tuple[int, str]]] = {
    "X509SVIDRequest": {},
    "X509SVIDResponse": {"svids": (1, "X509SVID*"), "crl": (2, "bytes*"), "federated_bundles": (3, "map")},
    "X509SVID": {
        "spiffe_id": (1, "string"), "x509_svid": (2, "bytes"), "x509_svid_key": (3, "bytes"), "bundle": (4, "bytes"),
        "hint": (5, "string"),
    },
    "X509BundlesRequest": {},
    "X509BundlesResponse": {"crl": (1, "bytes*"), "bundles": (2, "map")},
    "JWTSVIDRequest": {"audience": (1, "string*"), "spiffe_id": (2, "string")},
    "JWTSVIDResponse": {"svids": (1, "JWTSVID*")},
    "JWTSVID": {"spiffe_id": (1, "string"), "svid": (2, "string"), "hint": (3, "string")},
    "JWTBundlesRequest": {},
    "JWTBundlesResponse": {"bundles": (1, "map")},
    "ValidateJWTSVIDRequest": {"audience": (1, "string"), "svid": (2, "string")},
    "ValidateJWTSVIDResponse": {"spiffe_id": (1, "string"), "claims": (2, "Struct")},
    "WITSVIDRequest": {"spiffe_id": (1, "string")},
    "WITSVIDResponse": {"svids": (1, "WITSVID*")},
    "WITSVID": {"spiffe_id": (1, "string"), "wit_svid": (2, "string"), "wit_svid_key": (3, "string"), "hint": (4, "string")},
    "WITBundlesRequest": {},
    "WITBundlesResponse": {"bundles": (1, "map")},
}  # fmt: skip
STREAMS = {
    "FetchX509SVID": True, "FetchX509Bundles": True, "FetchJWTSVID": False, "FetchJWTBundles": True,
    "ValidateJWTSVID": False, "FetchWITSVID": True, "FetchWITBundles": True,
}  # fmt: skip
OWN = str(DOMAIN.id)


@contextmanager
def stream(house: House, method: str, request: Any) -> Iterator[Any]:
    """An open stream of the Workload API."""
    with house.workload() as stub:
        call = getattr(stub, method)(request, metadata=HEADER, timeout=SECONDS)
        try:
            yield call
        finally:
            call.cancel()


def first(house: House, method: str, request: Any) -> Any:
    with stream(house, method, request) as call:
        return next(call)


def ids(message: Any) -> list[str]:
    return [one.spiffe_id for one in message.svids]


def validate(house: House, token: str, audience: str = "tests") -> Any:
    with house.workload() as stub:
        request = workload_pb2.ValidateJWTSVIDRequest(audience=audience, svid=token)
        return stub.ValidateJWTSVID(request, metadata=HEADER, timeout=SECONDS)


@pytest.mark.bears("WA-01")
def test_both_profiles(house: House) -> None:
    now = SystemClock().now()
    for one in house.x509().svids:
        assert str(verify_x509_svid(split_der(one.x509_svid), house.bundles, now=now).id) == one.spiffe_id
    for other in house.jwt("tests").svids:
        assert str(verify_jwt_svid(other.svid, house.bundles, audience="tests", now=now).id) == other.spiffe_id


@pytest.mark.bears("WA-02")
def test_the_wire_is_the_standards_and_no_more() -> None:
    def kind(field: Any) -> str:
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            return "map"
        name = field.message_type.name if field.message_type else {9: "string", 12: "bytes"}[field.type]
        return name + ("*" if field.is_repeated else "")

    file = workload_pb2.DESCRIPTOR
    assert file.package == ""
    assert {
        name: {field.name: (field.number, kind(field)) for field in message.fields}
        for name, message in file.message_types_by_name.items()
    } == WIRE
    (service,) = file.services_by_name.values()
    assert service.full_name == "SpiffeWorkloadAPI"
    assert {method.name: method.server_streaming for method in service.methods} == STREAMS
    assert not any(method.client_streaming for method in service.methods)


@pytest.mark.bears("WA-04", "WA-05")
def test_events_bring_the_whole_set(house: House) -> None:
    third = f"spiffe://{DOMAIN}/conformance/three"
    with stream(house, "FetchX509SVID", workload_pb2.X509SVIDRequest()) as call:
        assert ids(next(call)) == [ONE, TWO]
        with house.registered("/conformance/three"):
            assert set(ids(next(call))) == {ONE, TWO, third}
        assert ids(next(call)) == [ONE, TWO]
        # And nothing while nothing happens: a change of somebody else's is no message.
        began = time.monotonic()
        with (
            house.registered("/conformance/other", selectors=["unix:uid:4294960"]),
            house.registered("/conformance/three"),
        ):
            assert third in ids(next(call))
        assert ids(next(call)) == [ONE, TWO]
        assert time.monotonic() - began < SECONDS


@pytest.mark.bears("WA-06")
@pytest.mark.parametrize("method", ["FetchX509SVID", "FetchX509Bundles", "FetchJWTBundles"])
def test_the_first_answer_waits_for_nothing(house: House, method: str) -> None:
    house.x509()
    request = {
        "FetchX509SVID": workload_pb2.X509SVIDRequest(),
        "FetchX509Bundles": workload_pb2.X509BundlesRequest(),
        "FetchJWTBundles": workload_pb2.JWTBundlesRequest(),
    }[method]
    began = time.monotonic()
    first(house, method, request)
    assert time.monotonic() - began < 20


@pytest.mark.bears("WA-09")
def test_mandatory_fields_of_requests(house: House) -> None:
    for audience in ((), ("",), ("a", "")):
        assert reason(lambda audience=audience: house.jwt(*audience)) == "audience_missing"
    assert reason(lambda: validate(house, house.replica.token(), audience="")) == "audience_missing"
    assert reason(lambda: validate(house, "")) == "svid_missing"


@pytest.mark.bears("WA-10", "WA-21")
def test_a_trust_domain_without_a_bundle_is_not_trusted(house: House) -> None:
    foreign = "spiffe://foreign.test/x"
    assert reason(lambda: validate(house, house.replica.token(sub=foreign))) == "svid_no_bundle"
    with pytest.raises(InvalidSvid, match="no bundle"):
        verify_x509_svid([house.replica.leaf(foreign).der], house.bundles, now=SystemClock().now())
    # Signed by a key that is trusted: but the subject's own trust domain chooses the bundle.
    assert validate(house, house.replica.token()).spiffe_id == ONE


@pytest.mark.bears("WA-11")
def test_keys_of_one_kind_verify_nothing_of_the_other(house: House) -> None:
    text = ".".join(
        b64url_encode(json.dumps(part).encode()) for part in (house.replica.header(), house.replica.claims())
    )
    by_the_x509_authority = f"{text}.{b64url_encode(es256(house.replica.root.key, text.encode()))}"
    assert reason(lambda: validate(house, by_the_x509_authority)) == "token_signature"
    pki = house.replica.pki
    root = pki.root("another replica", key=house.replica.jwt_key)
    assert house.present(house.replica.leaf(issuer=root)).status != 200
    bundles = first(house, "FetchX509Bundles", workload_pb2.X509BundlesRequest()).bundles
    signers = [load_der_x509_certificate(one).public_key() for one in split_der(bundles[OWN])]
    assert not any(key in signers for key in house.bundles[DOMAIN].jwt_authorities.values())


@pytest.mark.bears("WA-12", "WA-18")
def test_an_answer_has_an_identity(house: House) -> None:
    answer = house.x509()
    assert answer.svids
    roots = [load_der_x509_certificate(root) for root in house.roots]
    for crl in map(load_der_x509_crl, answer.crl):
        assert any(crl.is_signature_valid(root.public_key()) for root in roots)
        assert not list(crl)
    assert not answer.federated_bundles
    for one in answer.svids:
        leaf = load_der_x509_certificate(split_der(one.x509_svid)[0])
        assert load_der_private_key(one.x509_svid_key, None).public_key() == leaf.public_key()
        assert split_der(one.bundle) == list(house.roots)
    assert house.jwt("tests").svids


@pytest.mark.bears("WA-13")
def test_hints_are_unique(house: House) -> None:
    # The oldest entry keeps the hint.
    with (
        house.registered("/conformance/three", id="conformance-3", hint="internal"),
        house.registered("/conformance/four", hint=""),
    ):
        deadline = time.monotonic() + SECONDS
        while f"spiffe://{DOMAIN}/conformance/four" not in ids(house.x509()):
            assert time.monotonic() < deadline
        for answer in (house.x509(), house.jwt("tests")):
            hints = [one.hint for one in answer.svids if one.hint]
            assert sorted(hints) == ["external", "internal"]
            assert next(one.spiffe_id for one in answer.svids if one.hint == "internal") == ONE


@pytest.mark.bears("WA-14")
def test_who_is_not_entitled_is_denied(house: House) -> None:
    assert house.refusals == dict.fromkeys(
        ("FetchX509SVID", "FetchX509Bundles", "FetchJWTSVID", "FetchJWTBundles"),
        ("PERMISSION_DENIED", "no identity issued"),
    )


@pytest.mark.bears("WA-16")
def test_the_own_bundle_is_always_there(house: House) -> None:
    assert set(first(house, "FetchX509Bundles", workload_pb2.X509BundlesRequest()).bundles) == {OWN}
    assert set(first(house, "FetchJWTBundles", workload_pb2.JWTBundlesRequest()).bundles) == {OWN}


@pytest.mark.bears("WA-17")
def test_whose_jwt_svid(house: House) -> None:
    assert ids(house.jwt("tests")) == [ONE, TWO]
    assert ids(house.jwt("tests", spiffe_id=TWO)) == [TWO]
    with pytest.raises(grpc.RpcError) as denied:
        house.jwt("tests", spiffe_id=f"spiffe://{DOMAIN}/conformance/three")
    assert (denied.value.code().name, denied.value.details()) == ("PERMISSION_DENIED", "no identity issued")
    with pytest.raises(grpc.RpcError) as foreign:
        house.jwt("tests", spiffe_id="spiffe://foreign.test/x")
    assert foreign.value.code() is grpc.StatusCode.PERMISSION_DENIED


@pytest.mark.bears("WA-19")
def test_a_jwt_bundle_is_a_plain_key_set(house: House) -> None:
    text = first(house, "FetchJWTBundles", workload_pb2.JWTBundlesRequest()).bundles[OWN]
    document = json.loads(text)
    assert set(document) == {"keys"}
    assert {key["kid"] for key in document["keys"]} == set(house.bundles[DOMAIN].jwt_authorities)
    for key in document["keys"]:
        assert set(key) - {"use", "alg"} == {"kty", "crv", "x", "y", "kid"}
        assert key.get("use", "jwt-svid") == "jwt-svid"
    # Nothing of another use: neither the authorities of certificates nor the keys of task tokens.
    task_keys = {key["kid"] for key in house.ask(None, "/keys").body["keys"]}
    assert task_keys and task_keys.isdisjoint(key["kid"] for key in document["keys"])


@pytest.mark.bears("WA-20")
def test_claims_of_a_validated_token(house: House) -> None:
    token = house.jwt("tests", spiffe_id=ONE).svids[0].svid
    answer = validate(house, token)
    claims = MessageToDict(answer.claims)
    assert answer.spiffe_id == ONE
    assert claims == {**parse_compact(token).payload, "aud": ["tests"]}
    for bad in (token[:-2] + "AA", token + "x", "x", "a.b.c"):
        with pytest.raises(grpc.RpcError) as refused:
            validate(house, bad)
        assert refused.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert reason(lambda: validate(house, token, audience="other")) == "svid_audience"


@pytest.mark.bears("WA-23")
def test_wit_svids_are_not_implemented(house: House) -> None:
    for method, request in (
        ("FetchWITSVID", workload_pb2.WITSVIDRequest()),
        ("FetchWITBundles", workload_pb2.WITBundlesRequest()),
    ):
        with pytest.raises(grpc.RpcError) as refused:
            first(house, method, request)
        assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.bears("WA-25")
def test_the_order_is_kept(house: House) -> None:
    assert [ids(house.x509()) for _ in range(5)] == [[ONE, TWO]] * 5
    assert [ids(house.jwt("tests")) for _ in range(5)] == [[ONE, TWO]] * 5


@pytest.mark.bears("WA-26")
def test_long_hints(house: House) -> None:
    longest = "ä" * 512
    (refused,) = house.create(house.entry("/conformance/long", hint=longest + "x"))
    assert refused.status.code == grpc.StatusCode.INVALID_ARGUMENT.value[0]
    with house.registered("/conformance/long", hint=longest):
        deadline = time.monotonic() + SECONDS
        while longest not in {one.hint for one in house.x509().svids}:
            assert time.monotonic() < deadline


@pytest.mark.bears("WA-27")
def test_the_words_that_operators_know(house: House) -> None:
    def words(method: str, request: Any, metadata: Any = HEADER) -> tuple[str, str]:
        with house.workload() as stub:
            try:
                call = getattr(stub, method)(request, metadata=metadata, timeout=SECONDS)
                if STREAMS[method]:
                    next(call)
            except grpc.RpcError as error:
                return error.code().name, error.details() or ""
        return "OK", ""

    jwt, check = workload_pb2.JWTSVIDRequest, workload_pb2.ValidateJWTSVIDRequest
    assert words("FetchJWTSVID", jwt(), ()) == ("INVALID_ARGUMENT", "security header missing from request")
    assert house.refusals["FetchX509SVID"] == ("PERMISSION_DENIED", "no identity issued")
    assert words("FetchJWTSVID", jwt()) == ("INVALID_ARGUMENT", "audience must be specified")
    assert words("ValidateJWTSVID", check(svid="x")) == ("INVALID_ARGUMENT", "audience must be specified")
    assert words("ValidateJWTSVID", check(audience="x")) == ("INVALID_ARGUMENT", "svid must be specified")
    code, text = words("FetchJWTSVID", jwt(audience=["a"], spiffe_id="http://x"))
    assert code == "INVALID_ARGUMENT" and text.startswith("invalid requested SPIFFE ID: ")


@pytest.mark.bears("WA-27")
async def test_the_words_while_the_server_is_away() -> None:
    async with estate() as agent, agent.workload() as stub:
        agent.server.drop()
        await agent.server.listener.stop()
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.FetchJWTSVID(workload_pb2.JWTSVIDRequest(audience=["a"]), metadata=HEADER, timeout=SECONDS)
        assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
        assert (refused.value.details() or "").startswith("could not fetch JWT-SVID: ")


@pytest.mark.bears("WA-27")
async def test_the_words_of_a_failed_attestation() -> None:
    program = Path("/bin/false").resolve()
    broken = {"name": "broken", "path": str(program), "sha256": hashlib.sha256(program.read_bytes()).hexdigest()}
    asked = {"node": {"join_token": {}}, "workload": {"unix": {}, "exec": {"programs": [broken]}}}
    async with estate(attestors=asked) as agent, agent.workload() as stub:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.FetchX509SVID(workload_pb2.X509SVIDRequest(), metadata=HEADER, timeout=SECONDS).read()
        told = refused.value.code(), refused.value.details()
        assert told == (grpc.StatusCode.UNAVAILABLE, "workload attestation failed")


def test_a_stub_of_the_standard_reaches_it_by_path(house: House) -> None:
    with house.channel(house.agent_socket) as channel:
        call = channel.unary_stream("/SpiffeWorkloadAPI/FetchX509SVID", None, workload_pb2.X509SVIDResponse.FromString)
        answers = call(b"", metadata=HEADER, timeout=SECONDS)
        assert ids(next(answers)) == [ONE, TWO]
        answers.cancel()
