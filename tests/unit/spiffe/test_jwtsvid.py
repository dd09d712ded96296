"""JWT-SVIDs, line by line of JWT-SVID §2 to §5."""

import json
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from jwt.algorithms import ECAlgorithm

from broker.errors import InvalidSvid
from broker.spiffe import Bundle, BundleSet, JwtSvid, SpiffeId, TrustDomain, jose, verify_jwt_svid
from broker.spiffe.jwtsvid import LEEWAY

NOW = datetime(2026, 11, 22, 12, 0, 0, tzinfo=UTC)
TS = int(NOW.timestamp())
ES256 = ECAlgorithm(ECAlgorithm.SHA256)
KEY, OTHER = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
BUNDLES = BundleSet.of(
    Bundle(TrustDomain("example.org"), jwt_authorities={"k1": KEY.public_key()}),
    Bundle(TrustDomain("other.example"), jwt_authorities={"k1": OTHER.public_key(), "k2": OTHER.public_key()}),
    Bundle(TrustDomain("empty.example")),
)
LEFT_OUT = object()


def make(header: dict[str, Any] | None = None, key: Any = KEY, **claims: Any) -> str:
    base = {"sub": "spiffe://example.org/web", "aud": ["https://api.example"], "exp": TS + 300, "iat": TS}
    payload = {name: value for name, value in (base | claims).items() if value is not LEFT_OUT}
    full = {"alg": "ES256", "kid": "k1", "typ": "JWT"} | (header or {})
    wanted = {name: value for name, value in full.items() if value is not LEFT_OUT}
    parts = [jose.b64url_encode(json.dumps(part).encode()) for part in (wanted, payload)]
    signing_input = ".".join(parts)
    return f"{signing_input}.{jose.b64url_encode(ES256.sign(signing_input.encode(), key))}"


def verify(token: str, audience: Any = "https://api.example", now: datetime = NOW, **options: Any) -> JwtSvid:
    return verify_jwt_svid(token, BUNDLES, audience=audience, now=now, **options)


def code_of(act: Callable[[], object]) -> str:
    with pytest.raises(InvalidSvid) as caught:
        act()
    return caught.value.reason


def refused(token: str, **options: Any) -> str:
    return code_of(lambda: verify(token, **options))


def test_a_good_token_is_accepted_and_hides_itself() -> None:
    token = make(jti="1", scope="read")
    svid = verify(token)
    assert svid.id == SpiffeId("spiffe://example.org/web")
    assert svid.audience == ("https://api.example",)
    assert svid.expires_at == NOW + timedelta(seconds=300)
    assert (svid.issued_at, svid.claims["scope"], svid.token) == (NOW, "read", token)
    assert token not in repr(svid)
    assert "scope" not in repr(svid)
    with pytest.raises(TypeError):
        svid.claims["scope"] = "write"  # type: ignore[index]


def test_nobody_else_makes_a_verified_svid() -> None:
    good = verify(make())
    with pytest.raises(TypeError):
        JwtSvid(good.id, good.audience, good.expires_at, None, {}, "", object())
    with pytest.raises(TypeError):
        JwtSvid(good.id, good.audience, good.expires_at, None, {}, "")  # type: ignore[call-arg]


@pytest.mark.bears("JW-01", "JW17")
def test_only_the_compact_form_is_a_token() -> None:
    header, payload, signature = make().split(".")
    for text in (
        json.dumps({"protected": header, "payload": payload, "signature": signature}),
        json.dumps({"payload": payload, "signatures": [{"protected": header, "signature": signature}] * 2}),
        f"{header}.{payload}",
        f"{header}.{payload}.{signature}.",
        f"{header}.{payload}.",
        f"{header}.{payload}.{signature}\n",
        f" {header}.{payload}.{signature}",
    ):
        refused(text)


@pytest.mark.bears("JW-02", "JW04", "JW06")
@pytest.mark.parametrize("name", ["jku", "x5u", "x5c", "jwk", "crit", "cty", "b64", "x5t", "foo"])
def test_other_header_parameters_are_refused(name: str) -> None:
    assert refused(make({name: "https://evil.example/"})) == "token_header"


@pytest.mark.bears("JW-03")
@pytest.mark.parametrize("alg", ["none", "HS256", "EdDSA", "ES256K", LEFT_OUT])
def test_other_algorithms_are_refused(alg: object) -> None:
    assert refused(make({"alg": alg})) == "token_algorithm"


@pytest.mark.bears("JW-04")
def test_the_key_id_is_required() -> None:
    assert refused(make({"kid": LEFT_OUT})) == "svid_key_id"
    assert refused(make({"kid": "k2"})) == "svid_untrusted"


@pytest.mark.bears("JW05")
@pytest.mark.parametrize("kid", ["../../dev/null", "k1'--", "k" * 300, "k1\x00", "K1", "k1 "])
def test_a_key_id_is_only_an_index(kid: str) -> None:
    assert refused(make({"kid": kid})) in {"svid_untrusted", "token_header"}


@pytest.mark.bears("JW-05", "JW07")
def test_the_type_is_jwt_or_jose_or_absent() -> None:
    for typ in ("JWT", "JOSE", LEFT_OUT):
        assert verify(make({"typ": typ})).id.path == "/web"
    for typ in (
        "jwt", "at+jwt", "application/at+jwt", "wit+jwt", "txntoken+jwt", "dpop+jwt", "logout+jwt", "secevent+jwt",
        "statuslist+jwt", "wpt+jwt", "oauth-id-jag+jwt", "JWT ", "JOSE+JSON",
    ):  # fmt: skip
        assert refused(make({"typ": typ})) == "svid_type"


@pytest.mark.bears("JW-06", "I03")
@pytest.mark.parametrize(
    "sub",
    [
        LEFT_OUT, None, "", 5, ["spiffe://example.org/web"], "web", "https://example.org/web", "SPIFFE://example.org/web",
        "spiffe://Example.org/web", "spiffe://example.org/web/", "spiffe://example.org/../web", "spiffe://example.org:1/a",
        "spiffe://example.org/web\n", "spiffe://example.org/%77eb", "spiffe://example.org/web?x",
    ],
)  # fmt: skip
def test_the_subject_is_a_spiffe_id(sub: object) -> None:
    refused(make(sub=sub))


@pytest.mark.bears("JW-06")
def test_the_subject_has_a_path() -> None:
    # Both reference libraries accept this one: spiffe.md 6.4.
    assert refused(make(sub="spiffe://example.org")) == "svid_root_path"


@pytest.mark.bears("JW-07", "JW11")
@pytest.mark.parametrize(
    "aud",
    [
        LEFT_OUT, None, "", [], [""], {}, {"https://api.example": 1}, 5, [5], ["https://api.example", 5],
        ["https://api.example", None], [["https://api.example"]], ["https://api.example"] * 65,
        "https://other.example", ["https://api.example/"], ["https://API.example"], "https://api.example.evil", " https://api.example",
        "xhttps://api.example",
    ],
)  # fmt: skip
def test_the_audience_must_be_ours_exactly(aud: object) -> None:
    assert refused(make(aud=aud)) == "svid_audience"


@pytest.mark.bears("JW-07")
def test_an_audience_is_never_found_inside_another() -> None:
    assert refused(make(aud="https://api.example"), audience="api") == "svid_audience"
    assert refused(make(aud="https://api.example"), audience="h") == "svid_audience"
    assert verify(make(aud="https://api.example")).audience == ("https://api.example",)
    assert verify(make(aud=["x", "https://api.example"])).audience == ("x", "https://api.example")


@pytest.mark.bears("JW-07")
@pytest.mark.parametrize("audience", [None, ""])
def test_nobody_may_leave_the_audience_open(audience: object) -> None:
    assert refused(make(), audience=audience) == "svid_audience"


@pytest.mark.bears("JW-08", "JW10")
@pytest.mark.parametrize(
    "exp", [LEFT_OUT, None, "x", str(TS + 300), TS + 300.5, float(TS + 300), True, -1, 253402300800, [TS]]
)
def test_the_expiry_is_a_required_whole_number(exp: object) -> None:
    assert refused(make(exp=exp)) in {"token_claim_missing", "token_claim_invalid"}


@pytest.mark.bears("JW10")
def test_an_infinite_expiry_is_refused() -> None:
    header, _, _ = make().split(".")
    payload = b'{"sub":"spiffe://example.org/web","aud":"https://api.example","exp":1e400}'
    signing_input = f"{header}.{jose.b64url_encode(payload)}"
    refused(f"{signing_input}.{jose.b64url_encode(ES256.sign(signing_input.encode(), KEY))}")


@pytest.mark.bears("JW-08", "JW20")
def test_clocks_may_differ_by_the_leeway_and_no_more() -> None:
    leeway = int(LEEWAY.total_seconds())
    assert leeway == 30
    assert verify(make(exp=TS - 30)).id.path == "/web"
    assert refused(make(exp=TS - 31)) == "svid_expired"
    assert refused(make(exp=TS - 30), now=NOW + timedelta(milliseconds=1)) == "svid_expired"
    for name in ("nbf", "iat"):
        assert verify(make(**{name: TS + 30})).id.path == "/web"
        assert refused(make(**{name: TS + 31})) == "svid_not_yet_valid"
        assert refused(make(**{name: float(TS)})) == "token_claim_invalid"
        assert refused(make(**{name: None})) == "token_claim_invalid"
    assert refused(make(exp=TS), leeway=timedelta(0)) == "svid_expired"
    assert verify(make(exp=TS + 1), leeway=timedelta(0)).issued_at == NOW
    assert verify(make(iat=LEFT_OUT)).issued_at is None


@pytest.mark.bears("JW-09", "JW-14")
def test_other_claims_are_kept_and_mean_nothing() -> None:
    claims = verify(make(act={"sub": "x"}, jti="1", iss="https://x", scope="a")).claims
    assert claims["act"] == {"sub": "x"}


@pytest.mark.bears("JW-13", "JW05")
def test_keys_come_only_from_the_subjects_trust_domain() -> None:
    assert verify(make(key=OTHER, sub="spiffe://other.example/web")).id.trust_domain == TrustDomain("other.example")
    # The same key ID, in another trust domain's bundle, signs nothing for ours.
    assert refused(make(key=OTHER)) == "token_signature"
    assert refused(make({"kid": "k2"}, key=OTHER)) == "svid_untrusted"
    assert refused(make(sub="spiffe://other.example/web")) == "token_signature"
    assert refused(make(sub="spiffe://unknown.example/web")) == "svid_no_bundle"


@pytest.mark.bears("TB-05", "JW-13")
def test_an_empty_bundle_verifies_nothing() -> None:
    assert refused(make(sub="spiffe://empty.example/web")) == "svid_untrusted"


@pytest.mark.bears("ID-20", "JW14")
def test_the_id_is_in_what_was_signed() -> None:
    header, payload, signature = make().split(".")
    other = make(sub="spiffe://example.org/admin").split(".")[1]
    assert refused(f"{header}.{other}.{signature}") == "token_signature"
    assert refused(f"{header}.{payload}.{signature[:-2]}") in {"token_signature", "token_encoding"}


def test_refusals_do_not_repeat_the_token() -> None:
    token = make(aud="https://other.example")
    with pytest.raises(InvalidSvid) as caught:
        verify(token)
    assert "eyJ" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_a_naive_time_is_a_defect_of_the_caller() -> None:
    with pytest.raises(ValueError, match="aware"):
        verify(make(), now=NOW.replace(tzinfo=None))
