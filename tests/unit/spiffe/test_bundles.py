"""Trust bundles and the sets of them, line by line of SPIFFE Trust Domain and Bundle §4."""

import base64
import json
from collections.abc import Callable
from typing import Any

import pytest
import spiffe as py_spiffe
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from hypothesis import given
from hypothesis import strategies as st

from broker.errors import InvalidBundle
from broker.spiffe import Bundle, BundleSet, TrustDomain, jose

DOMAIN, OTHER = TrustDomain("example.org"), TrustDomain("other.example")
KEY, KEY2 = (ec.generate_private_key(ec.SECP256R1()).public_key() for _ in range(2))


def code_of(act: Callable[[], object]) -> str:
    with pytest.raises(InvalidBundle) as caught:
        act()
    return caught.value.reason


def jwt_jwk(key: Any = KEY, **changes: Any) -> dict[str, Any]:
    members = {"use": "jwt-svid", "kid": "k1", **jose.jwk_from_public_key(key), **changes}
    return {name: value for name, value in members.items() if value is not ...}


def x509_jwk(holder: Any, **changes: Any) -> dict[str, Any]:
    key = jose.jwk_from_public_key(holder.certificate.public_key())
    members = {"use": "x509-svid", **key, "x5c": [base64.b64encode(holder.der).decode()], **changes}
    return {name: value for name, value in members.items() if value is not ...}


def parse(*keys: Any, **members: Any) -> Bundle:
    return Bundle.parse(DOMAIN, json.dumps({"keys": list(keys), **members}))


def refused(*keys: Any, **members: Any) -> str:
    return code_of(lambda: parse(*keys, **members))


@pytest.mark.bears("TB-01", "X5-21", "JW-12")
def test_a_bundle_survives_the_round_trip(pki: Any) -> None:
    roots = [pki.root("a"), pki.root("b", key=pki.key("Ed25519")), pki.root("c", key=pki.key("RSA-2048"))]
    strong = rsa.generate_private_key(65537, 2048).public_key()
    bundle = Bundle(DOMAIN, tuple(root.certificate for root in roots), {"k2": KEY, "k1": strong}, 7, 300)
    document = json.loads(bundle.to_json())
    assert Bundle.parse(DOMAIN, bundle.to_json()) == bundle
    assert Bundle.parse(DOMAIN, bundle.to_json().encode()).to_json() == bundle.to_json()
    assert (document["spiffe_sequence"], document["spiffe_refresh_hint"]) == (7, 300)
    for jwk in document["keys"][:3]:
        assert jwk["use"] == "x509-svid"
        assert "kid" not in jwk
        assert len(jwk["x5c"]) == 1
    assert [(jwk["use"], jwk["kid"]) for jwk in document["keys"][3:]] == [("jwt-svid", "k1"), ("jwt-svid", "k2")]


@pytest.mark.bears("TB-07")
def test_a_document_holds_nothing_but_what_is_defined(pki: Any) -> None:
    document = json.loads(Bundle(DOMAIN, (pki.root().certificate,), {"k1": KEY}).to_json())
    assert set(document) == {"keys"}
    assert set(document["keys"][0]) == {"use", "kty", "crv", "x", "y", "x5c"}
    assert set(document["keys"][1]) == {"use", "kty", "kid", "crv", "x", "y"}


def test_the_forms_of_the_workload_api(pki: Any) -> None:
    roots = [pki.root("a"), pki.root("b")]
    bundle = Bundle(DOMAIN, tuple(root.certificate for root in roots), {"k1": KEY}, 7)
    assert bundle.x509_der() == roots[0].der + roots[1].der
    assert json.loads(bundle.jwks()) == {"keys": [{"kid": "k1", **jose.jwk_from_public_key(KEY)}]}
    again = Bundle.from_workload_api(DOMAIN, x509_der=bundle.x509_der(), jwks=bundle.jwks())
    assert again == bundle.with_sequence(None)
    assert Bundle.from_workload_api(DOMAIN) == Bundle(DOMAIN)
    for use in ("jwt-svid", "sig"):
        document = json.dumps({"keys": [jwt_jwk(use=use)]})
        assert Bundle.from_workload_api(DOMAIN, jwks=document).jwt_authorities == {"k1": KEY}
    foreign = json.dumps({"keys": [jwt_jwk(use="wit-svid"), jwt_jwk(use="x509-svid")]})
    assert not Bundle.from_workload_api(DOMAIN, jwks=foreign).jwt_authorities
    assert code_of(lambda: Bundle.from_workload_api(DOMAIN, x509_der=roots[0].der[:-1])) == "bundle_certificate"
    assert code_of(lambda: Bundle.from_workload_api(DOMAIN, x509_der=b"\x30\x00")) == "bundle_certificate"


def test_py_spiffe_reads_the_forms_of_the_workload_api(pki: Any) -> None:
    roots = [pki.root("a"), pki.root("b")]
    bundle = Bundle(DOMAIN, tuple(root.certificate for root in roots), {"k1": KEY, "k2": KEY2})
    domain = py_spiffe.TrustDomain("example.org")
    jwt_keys = py_spiffe.JwtBundle.parse(domain, bundle.jwks().encode()).jwt_authorities
    assert {kid: key.public_numbers() for kid, key in jwt_keys.items()} == {
        "k1": KEY.public_numbers(),
        "k2": KEY2.public_numbers(),
    }
    authorities = py_spiffe.X509Bundle.parse_raw(domain, bundle.x509_der()).x509_authorities
    assert {certificate.serial_number for certificate in authorities} == {
        root.certificate.serial_number for root in roots
    }


@pytest.mark.bears("TB-01")
def test_other_members_are_ignored() -> None:
    assert parse(jwt_jwk(extra=[1]), other={"x": 1}).jwt_authorities == {"k1": KEY}


@pytest.mark.bears("TB-02", "TB-03")
@pytest.mark.parametrize("name", ["spiffe_sequence", "spiffe_refresh_hint"])
def test_numbers_are_integers_of_64_bits(name: str) -> None:
    for value in (0, 2**63, 2**64 - 1):
        bundle = parse(**{name: value})
        assert value in (bundle.sequence, bundle.refresh_hint)
    for bad in (-1, 1.0, "1", True, None, [1]):
        assert refused(**{name: bad}) == "bundle_number"
    assert refused(**{name: 2**64}) == "bundle_malformed"


@pytest.mark.bears("TB-04")
@pytest.mark.parametrize(
    "document",
    ["", "[]", "{}", '{"keys":{}}', '{"keys":null}', '{"keys":[5]}', '{"keys":[],"keys":[]}', "\ufeff{}", "\ud800"],
)
def test_keys_is_a_required_list(document: str) -> None:
    assert code_of(lambda: Bundle.parse(DOMAIN, document)) == "bundle_malformed"


@pytest.mark.bears("TB-05")
def test_an_empty_bundle_is_valid_and_holds_nothing() -> None:
    bundle = parse()
    assert (bundle.x509_authorities, dict(bundle.jwt_authorities)) == ((), {})
    assert Bundle.parse(DOMAIN, bundle.to_json()) == bundle


@pytest.mark.bears("TB-04", "TB-06", "JW-13")
@pytest.mark.parametrize(
    "changes",
    [
        {"use": ...},
        {"use": "JWT-SVID"},
        {"use": "wit-svid"},
        {"use": "sig"},
        {"use": None},
        {"use": ["jwt-svid"]},
        {"use": {"jwt-svid": 1}},
        {"kty": ...},
        {"kty": "oct"},
        {"kty": "ec"},
        {"kty": ["EC"]},
        {"kty": "AKP"},
        {"crv": "secp256k1"},
        {"kty": "OKP", "crv": "Ed25519"},
        {"crv": ["P-256"]},
        {"alg": "HS256"},
        {"alg": "ECDH-ES"},
        {"key_ops": ["sign"]},
    ],
)
def test_keys_of_other_uses_and_types_are_passed_over(changes: dict[str, Any]) -> None:
    assert parse(jwt_jwk(**changes), jwt_jwk(KEY2, kid="k2")).jwt_authorities == {"k2": KEY2}


@pytest.mark.bears("JW-12")
@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"kid": ...}, "bundle_key_id"),
        ({"kid": ""}, "bundle_key_id"),
        ({"kid": 5}, "bundle_key_id"),
        ({"x": ...}, "jwk_malformed"),
        ({"x": "AA"}, "jwk_malformed"),
        ({"d": "AA"}, "jwk_private"),
    ],
)
def test_bad_jwt_keys_refuse_the_bundle(changes: dict[str, Any], code: str) -> None:
    assert refused(jwt_jwk(**changes)) == code


def test_one_key_id_means_one_key() -> None:
    assert refused(jwt_jwk(), jwt_jwk(KEY2)) == "bundle_key_id"
    assert refused(jwt_jwk(), jwt_jwk()) == "bundle_key_id"


@pytest.mark.bears("X5-23")
def test_only_the_first_certificate_of_an_entry_counts(pki: Any) -> None:
    root, second = pki.root("a"), pki.root("b")
    both = [base64.b64encode(holder.der).decode() for holder in (root, second)]
    assert parse(x509_jwk(root, x5c=both)).x509_authorities == (root.certificate,)
    for empty in (..., [], None):
        assert parse(x509_jwk(root, x5c=empty), x509_jwk(second)).x509_authorities == (second.certificate,)


@pytest.mark.bears("X5-21")
def test_a_key_id_on_a_certificate_means_nothing(pki: Any) -> None:
    root = pki.root()
    assert parse(x509_jwk(root, kid="x"), x509_jwk(root)).x509_authorities == (root.certificate,)


@pytest.mark.bears("X5-22")
def test_an_authority_need_not_be_self_signed(pki: Any) -> None:
    signer = pki.intermediate(pki.root())
    assert parse(x509_jwk(signer)).x509_authorities == (signer.certificate,)


@pytest.mark.parametrize("chain", ["AA", 5, {}, ["AA=="], [5], [None], ["!"], [""], ["é"]])
def test_bad_certificates_refuse_the_bundle(pki: Any, chain: object) -> None:
    assert refused(x509_jwk(pki.root(), x5c=chain)) == "bundle_certificate"


@pytest.mark.bears("I10")
def test_two_copies_of_a_key_must_agree(pki: Any) -> None:
    root, other = pki.root("a"), pki.root("b")
    assert refused(x509_jwk(root, x5c=x509_jwk(other)["x5c"])) == "bundle_key_mismatch"
    assert refused(x509_jwk(root, crv="P-384")) == "bundle_key_mismatch"
    assert refused(x509_jwk(root, d="AA")) == "bundle_private_key"


@pytest.mark.bears("TB-08")
def test_the_trust_domain_is_not_in_the_document() -> None:
    document = Bundle(DOMAIN, (), {"k1": KEY}).to_json()
    assert "example.org" not in document
    assert Bundle.parse(OTHER, document).trust_domain == OTHER


def test_bundles_are_values(pki: Any) -> None:
    root = pki.root().certificate
    keys = {"k1": KEY}
    bundle = Bundle(DOMAIN, (root, root), keys, 1)
    keys["k2"] = KEY2
    assert bundle.x509_authorities == (root,)
    assert bundle == Bundle(DOMAIN, (root,), {"k1": KEY}, 1)
    assert hash(bundle) == hash(Bundle(DOMAIN, (root,), {"k1": KEY}, 1))
    with pytest.raises((AttributeError, TypeError)):
        bundle.sequence = 2  # type: ignore[misc]
    with pytest.raises(TypeError):
        bundle.jwt_authorities["k2"] = KEY2  # type: ignore[index]
    grown = bundle.with_jwt_authorities({"k2": KEY2}).with_x509_authorities([]).with_sequence(2).with_refresh_hint(60)
    assert grown == Bundle(DOMAIN, (), {"k2": KEY2}, 2, 60)
    assert bundle.sequence == 1
    assert "Certificate" not in repr(bundle)
    for bad in ({"sequence": -1}, {"refresh_hint": 2**64}, {"jwt_authorities": {"": KEY}}):
        assert code_of(lambda: Bundle(DOMAIN, **bad)) in {"bundle_number", "bundle_key_id"}  # noqa: B023


def test_sets_hold_one_bundle_of_each_trust_domain() -> None:
    one, two = Bundle(DOMAIN, sequence=1), Bundle(OTHER)
    bundles = BundleSet.of(one, two)
    assert (bundles[DOMAIN], bundles.get(TrustDomain("x")), len(bundles), set(bundles)) == (
        one,
        None,
        2,
        {DOMAIN, OTHER},
    )
    assert code_of(lambda: BundleSet.of(one, Bundle(DOMAIN, sequence=2))) == "bundle_duplicate"
    newer = bundles.with_bundle(Bundle(DOMAIN, sequence=2))
    assert (newer[DOMAIN].sequence, bundles[DOMAIN].sequence) == (2, 1)
    assert set(bundles.without(DOMAIN)) == {OTHER}
    assert set(bundles.without(TrustDomain("x"))) == {DOMAIN, OTHER}
    assert bundles == BundleSet([two, one])
    assert repr(bundles) == "BundleSet(example.org, other.example)"
    with pytest.raises(KeyError):
        bundles[TrustDomain("x")]
    with pytest.raises(TypeError):
        bundles[DOMAIN] = two  # type: ignore[index]


@pytest.mark.bears("TB-09")
def test_bundle_maps() -> None:
    inner = json.loads(Bundle(DOMAIN, (), {"k1": KEY}, 3, 60).to_json())
    bundles = BundleSet.parse_map(json.dumps({"trust_domains": {"example.org": inner, "other.example": {"keys": []}}}))
    assert bundles[DOMAIN] == Bundle(DOMAIN, (), {"k1": KEY}, 3)
    assert len(BundleSet.parse_map('{"trust_domains":{}}')) == 0
    twice = '{"trust_domains":{"example.org":{"keys":[]},"example.org":{"keys":[]}}}'
    alias = '{"trust_domains":{"example.org":{"keys":[]},"spiffe://example.org":{"keys":[]}}}'
    for text in (twice, alias, "{}", '{"trust_domains":[]}', '{"trust_domains":{"example.org":[]}}',
                 '{"trust_domains":{"Example.org":{"keys":[]}}}', '{"trust_domains":{"example.org":{}}}'):  # fmt: skip
        with pytest.raises(InvalidBundle):
            BundleSet.parse_map(text)


@pytest.mark.bears("I14")
@given(st.binary(max_size=80) | st.text('{}[]":,keysu012', max_size=60).map(str.encode))
def test_any_bytes_are_a_bundle_or_a_typed_refusal(data: bytes) -> None:
    for document in (data, b'{"keys":[' + data + b"]}"):
        try:
            Bundle.parse(DOMAIN, document)
        except InvalidBundle:
            continue
