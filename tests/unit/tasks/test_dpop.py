"""One proof and its request: each of the twelve checks of RFC 9449 §4.3 by itself."""

import hashlib
import json
from datetime import timedelta
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature
from hypothesis import given
from hypothesis import strategies as st

from broker.errors import BrokerError, InvalidToken
from broker.sdk.dpop import ProofKey
from broker.spiffe import jose
from broker.spiffe.jose import b64url_decode, b64url_encode
from broker.tasks import Expected, NonceWanted, Resource, ShownProof, verify_proof
from broker.tasks.dpop import MAX_JTI, MAX_PROOF, PROOF_LEEWAY, PROOF_SECONDS, token_hash
from tests.unit.tasks.world import NOW

URL = "https://broker.example.org:8443/token"
AT = int(NOW.timestamp())
KEY = ec.generate_private_key(ec.SECP256R1())
ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
CLAIMS = {"jti": "j1", "htm": "POST", "htu": URL, "iat": AT}


def signed(claims: Any, *, key: Any = KEY, **header: Any) -> str:
    members = {"alg": "ES256", "typ": "dpop+jwt", "jwk": jose.jwk_from_public_key(key.public_key())} | header

    def sign(data: bytes) -> bytes:
        r, s = decode_dss_signature(key.sign(data, ec.ECDSA(hashes.SHA256())))
        size = (key.key_size + 7) // 8
        return r.to_bytes(size) + s.to_bytes(size)

    return jose.sign_compact({k: v for k, v in members.items() if v is not None}, claims, sign)


def proof(**changes: Any) -> str:
    return signed({k: v for k, v in (CLAIMS | changes).items() if v is not None})


def judged(*headers: str, method: str = "POST", url: str = URL, token: str | None = None, **given_: Any) -> ShownProof:
    return verify_proof(headers, Expected(method, Resource(url), token), **({"now": NOW} | given_))


def refused(*headers: str, **given_: Any) -> str:
    with pytest.raises(InvalidToken) as caught:
        judged(*headers, **given_)
    assert caught.value.reason == "invalid_dpop_proof"
    return caught.value.message


def test_a_good_proof_names_its_key_and_how_long_to_remember_it() -> None:
    shown = judged(proof())
    assert shown.jkt == jose.thumbprint(KEY.public_key())
    assert (shown.expires_at - NOW).total_seconds() >= PROOF_SECONDS + PROOF_LEEWAY
    with pytest.raises(TypeError):
        ShownProof("k", "i", NOW, "", object())


def test_what_the_sdk_makes_is_one() -> None:
    key = ProofKey()
    now = key._clock.now()
    text = key.proof("GET", "https://tickets.example.org/t/1?q=1#f", token="tok", nonce="n1")
    shown = judged(
        text, method="GET", url="https://tickets.example.org/t/1", token="tok", now=now, nonce=lambda n: n == "n1"
    )
    assert shown.jkt == key.jkt
    assert "PRIVATE" not in repr(key)
    assert repr(key) == f"ProofKey({key.jkt})"


def test_there_is_exactly_one() -> None:
    assert "exactly one" in refused()
    assert "exactly one" in refused(proof(), proof(jti="j2"))
    refused("")
    refused(f"{proof()}, {proof(jti='j2')}")


@pytest.mark.bears("JW16", "PB09")
@pytest.mark.parametrize(
    "text",
    ["x", "a.b", "a.b.c", "a.b.c.d.e", "{}", '{"payload":""}', "é.é.é", "A" * 5000, proof(jti="x" * 10_000)],
)
def test_what_is_no_proof_is_refused(text: str) -> None:
    refused(text)


@pytest.mark.parametrize("name", ["jti", "htm", "htu", "iat"])
def test_each_claim_is_required(name: str) -> None:
    refused(proof(**{name: None}))


@pytest.mark.bears("JW07", "X07")
@pytest.mark.parametrize("typ", [None, "JWT", "at+jwt", "wpt+jwt", "dpop", "DPOP+JWT\n", "dpop+jwt;x", "dpop+\u212awt"])
def test_another_type_is_refused(typ: str | None) -> None:
    refused(signed(CLAIMS, typ=typ))


def test_the_types_case_means_nothing() -> None:
    judged(signed(CLAIMS, typ="DPoP+JWT"))
    judged(signed(CLAIMS, typ="application/dpop+jwt"))


@pytest.mark.parametrize("alg", ["none", "HS256", "ES384", "RS256", "EdDSA", "ES256K", None])
def test_another_algorithm_is_refused(alg: str | None) -> None:
    refused(signed(CLAIMS, alg=alg))


@pytest.mark.bears("JW15")
def test_another_kind_of_key_is_refused() -> None:
    refused(signed(CLAIMS, key=ec.generate_private_key(ec.SECP384R1()), alg="ES256"))
    weak = rsa.generate_private_key(65537, 2048).public_key()
    refused(signed(CLAIMS, jwk=jose.jwk_from_public_key(weak)))
    point = jose.jwk_from_public_key(KEY.public_key()) | {"y": b64url_encode(bytes(31) + b"\x01")}
    refused(signed(CLAIMS, jwk=point))
    for jwk in (None, {}, [], "x", 1):
        refused(signed(CLAIMS, jwk=jwk))


def test_a_private_key_in_a_proof_is_refused() -> None:
    number = KEY.private_numbers().private_value
    jwk = jose.jwk_from_public_key(KEY.public_key()) | {"d": b64url_encode(number.to_bytes(32))}
    refused(signed(CLAIMS, jwk=jwk))
    refused(signed(CLAIMS, jwk=jose.jwk_from_public_key(KEY.public_key()) | {"k": "x"}))


@pytest.mark.bears("JW04", "JW06")
@pytest.mark.parametrize("header", [{"kid": "x"}, {"crit": ["x"]}, {"jku": "https://evil.example"}, {"x5c": []}])
def test_no_other_header_is_taken(header: dict[str, Any]) -> None:
    refused(signed(CLAIMS, **header))


@pytest.mark.bears("JW14", "JW15")
def test_the_signature_is_checked_and_der_is_none() -> None:
    head, body, signature = proof().split(".")
    other = signed(CLAIMS, key=ec.generate_private_key(ec.SECP256R1())).split(".")[2]
    raw = b64url_decode(signature)
    r, s = int.from_bytes(raw[:32]), int.from_bytes(raw[32:])
    for wrong in (
        other,
        b64url_encode(bytes(64)),
        b64url_encode(raw[:-1]),
        b64url_encode(raw + b"\x00"),
        b64url_encode(encode_dss_signature(r, s)),
        signature + "=",
        "",
    ):
        refused(f"{head}.{body}.{wrong}")
    changed = b64url_encode(json.dumps(CLAIMS | {"jti": "j9"}).encode())
    refused(f"{head}.{changed}.{signature}")
    # The other form of the same signature is the same proof.
    twin = b64url_encode(r.to_bytes(32) + (ORDER - s).to_bytes(32))
    assert judged(f"{head}.{body}.{twin}").id == judged(f"{head}.{body}.{signature}").id


@pytest.mark.bears("PB06")
def test_the_method_is_this_very_one() -> None:
    for htm in ("GET", "post", "Post", "POST ", "", 1, None, ["POST"]):
        refused(proof(htm=htm))
    refused(proof(htm="post"), method="post")


@pytest.mark.bears("PB06", "PB08")
def test_the_address_is_ours_whatever_it_is_written_like() -> None:
    same = (
        "https://BROKER.example.org:8443/token",
        URL + "?q=1",
        URL + "#f",
        URL + "?a#b",
        "HTTPS://broker.example.org:8443/token",
    )
    assert {judged(proof(htu=htu)).id for htu in same} == {judged(proof()).id}
    for htu in (
        "https://broker.example.org/token",
        "http://broker.example.org:8443/token",
        "https://evil.example/token",
        URL + "/",
        URL + "/x",
        "https://broker.example.org:8443/Token",
        "https://broker.example.org:8443/a/../token",
        "https://u@broker.example.org:8443/token",
        "//broker.example.org:8443/token",
        "/token",
        "",
        1,
    ):
        refused(proof(htu=htu))


@pytest.mark.bears("JW20")
def test_a_proof_is_of_this_minute() -> None:
    for seconds in (-PROOF_SECONDS - PROOF_LEEWAY, -1, 0, PROOF_LEEWAY):
        judged(proof(iat=AT + seconds))
    for iat in (AT - PROOF_SECONDS - PROOF_LEEWAY - 1, AT + PROOF_LEEWAY + 1, str(AT), AT + 0.5, True, -1, 10**20):
        refused(proof(iat=iat))


def test_a_proof_that_has_dates_is_held_to_them() -> None:
    """RFC 7519 §4.1.4, §4.1.5: no proof needs them, and what says that it is over is over."""
    judged(proof(exp=AT - PROOF_LEEWAY, nbf=AT + PROOF_LEEWAY))
    for dates in ({"exp": AT - PROOF_LEEWAY - 1}, {"nbf": AT + PROOF_LEEWAY + 1}, {"exp": str(AT + 60)}, {"nbf": True}):
        refused(proof(**dates))


@pytest.mark.bears("X06")
def test_it_is_remembered_for_longer_than_anybody_takes_it() -> None:
    newest = judged(proof(iat=AT + PROOF_LEEWAY))
    last = NOW + timedelta(seconds=PROOF_LEEWAY + PROOF_SECONDS + PROOF_LEEWAY)
    judged(proof(iat=AT + PROOF_LEEWAY), now=last)
    assert newest.expires_at >= last + timedelta(seconds=PROOF_LEEWAY), "another replica's clock may be behind"


def test_a_proof_is_small() -> None:
    judged(proof(more="x" * 2000))
    assert "longer than" in refused(proof(more="x" * MAX_PROOF))


def test_it_is_for_this_token() -> None:
    good = proof(ath=token_hash("tok"))
    assert token_hash("tok") == b64url_encode(hashlib.sha256(b"tok").digest())
    judged(good, token="tok")
    refused(good, token="other")
    refused(proof(), token="tok")
    refused(proof(ath=""), token="tok")


def test_a_nonce_is_asked_for_last() -> None:
    def ours(nonce: str) -> bool:
        if nonce != "n1":
            raise NonceWanted("n1")
        return True

    assert judged(proof(nonce="n1"), nonce=ours).nonce == "n1"
    for text in (proof(), proof(nonce="n0")):
        with pytest.raises(NonceWanted) as wanted:
            judged(text, nonce=ours)
        assert (wanted.value.nonce, wanted.value.reason) == ("n1", "use_dpop_nonce")
    refused(proof(htm="GET"), nonce=ours)
    refused(proof(nonce="n1"), nonce=lambda _: False)
    for nonce in (1, "", "x" * 129, "a b"):
        refused(proof(nonce=nonce))


@pytest.mark.bears("PB05", "PB06", "PB09")
def test_the_name_of_a_proof_is_of_key_jti_method_and_address() -> None:
    other = ec.generate_private_key(ec.SECP256R1())
    names = {
        judged(proof()).id,
        judged(proof(jti="j2")).id,
        judged(signed(CLAIMS, key=other)).id,
        judged(proof(htm="GET"), method="GET").id,
        judged(proof(htu=URL + "/x"), url=URL + "/x").id,
    }
    assert len(names) == 5
    assert judged(proof(iat=AT - 1, nonce="n", extra="x")).id == judged(proof()).id
    for jti in ("x" * (MAX_JTI + 1), "", "a b", "a\n", 1, None, "é"):
        refused(proof(jti=jti))
    judged(proof(jti="x" * MAX_JTI))


@given(st.text(max_size=200) | st.binary(max_size=200).map(lambda b: b.decode("latin-1")))
def test_nothing_but_a_refusal_comes_of_nonsense(text: str) -> None:
    with pytest.raises(BrokerError):
        judged(text)
