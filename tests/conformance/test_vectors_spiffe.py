"""Public vectors against the SPIFFE vocabulary: IDs, fixtures of four libraries, Wycheproof, JSON, path validation.

Read from the folder that ``BROKER_VECTORS`` names. Where we differ from a vector's own verdict, the difference is in a
list here with its reason, and the lists are exact: a difference that is not listed fails, and so does one that is gone.
"""

import base64
import json
import os
import re
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from broker.errors import Invalid, InvalidBundle, InvalidJson, InvalidSpiffeId, InvalidSvid, InvalidToken
from broker.spiffe import Bundle, BundleSet, SpiffeId, TrustDomain, X509Svid, jose, strictjson, verify_x509_svid
from broker.spiffe import certificates as certs
from broker.spiffe.jose import UnverifiedJws
from broker.spiffe.x509svid import parse_x509_svid_id, split_der
from tests.conformance import limbo

if "BROKER_VECTORS" not in os.environ:
    pytest.skip("BROKER_VECTORS does not name the folder of public vectors", allow_module_level=True)

VECTORS = Path(os.environ["BROKER_VECTORS"])
LIBRARIES = VECTORS / "spiffe-libs"
DOMAIN = TrustDomain("example.org")

pytestmark = pytest.mark.filterwarnings("ignore::cryptography.utils.CryptographyDeprecationWarning")


def read_json(name: str) -> Any:
    return json.loads((VECTORS / name).read_bytes())


# --- SPIFFE IDs ---------------------------------------------------------------------------------------------------


@pytest.mark.bears("I03", "ID-01", "ID-08", "ID-10", "ID-12")
@pytest.mark.parametrize("case", read_json("spiffe_ids.json")["valid"], ids=lambda case: case["id"])
def test_valid_ids_are_accepted(case: dict[str, str]) -> None:
    spiffe_id = SpiffeId(case["id"])
    assert (str(spiffe_id), spiffe_id.trust_domain.name, spiffe_id.path) == (
        case["id"],
        case["trust_domain"],
        case["path"],
    )
    assert TrustDomain(case["id"]) == TrustDomain(case["trust_domain"]) == spiffe_id.trust_domain


@pytest.mark.bears("I03", "ID-01", "ID-02", "ID-03", "ID-04", "ID-06", "ID-07", "ID-09", "ID-10", "ID-11", "ID-12")
@pytest.mark.parametrize("case", read_json("spiffe_ids.json")["invalid"], ids=lambda case: repr(case["id"]))
def test_invalid_ids_are_refused(case: dict[str, str]) -> None:
    with pytest.raises(InvalidSpiffeId):
        SpiffeId(case["id"])


# --- fixtures of go-, py-, java- and rust-spiffe ------------------------------------------------------------------


def chain_of(path: Path) -> list[bytes]:
    data = path.read_bytes()
    if b"-----BEGIN" in data:
        blocks = re.findall(rb"-----BEGIN CERTIFICATE-----(.*?)-----END CERTIFICATE-----", data, re.DOTALL)
        return [base64.b64decode(b"".join(block.split())) for block in blocks]
    return split_der(data)


def load_svid(path: Path) -> SpiffeId:
    """Judge a chain as the Workload API's clients do: every rule but time, signatures and trust."""
    leaf, *others = [certs.load(der) for der in chain_of(path)] or [certs.load(b"")]
    facts = certs.read(leaf)
    spiffe_id = parse_x509_svid_id(leaf)
    certs.check_leaf_usage(facts)
    for other in others:
        certs.read_authority(other)
    if not spiffe_id.path:
        raise InvalidSvid("the leaf's SPIFFE ID has no path")
    return spiffe_id


GOOD_SVIDS = [
    "go/x509svid/good-leaf-only.pem",
    "go/x509svid/good-leaf-and-intermediate.pem",
    "py/x509-certs/1-chain.der",
    "py/x509-certs/2-chain.pem",
    "py/x509-certs/3-good-leaf-only.pem",
    "py/x509-certs/4-cert.der",
    "java/x509svid/good-leaf-only.pem",
    "java/x509svid/good-leaf-and-intermediate.pem",
    "java/x509svid/cert.der",
    "java/workloadapi/svid.der",
    "rust/svid/x509/1-svid-chain.der",
    "rust/svid/x509/expired-svid-chain.der",
    "rust/svid/x509/svid-with-dns.der",
    "rust/rustls-fixtures/spiffe_leaf.der",
    "rust/rustls-fixtures/spiffe_leaf_uri_only.der",
]
BAD_SVIDS = [
    *sorted(
        str(path.relative_to(LIBRARIES))
        for path in LIBRARIES.rglob("*")
        if path.name.startswith(("wrong-", "corrupt", "not-pem", "empty.pem"))
    ),
    "rust/rustls-fixtures/no_spiffe_leaf.der",
    "rust/rustls-fixtures/spiffe_leaf_no_digital_signature.der",
    "rust/rustls-fixtures/spiffe_leaf_no_key_usage.der",
    "rust/rustls-fixtures/ca.der",
    "rust/rustls-fixtures/ca_with_spiffe_signing.der",
    # Key usage and names not critical, without a subject: rust-spiffe loads it, X5-04 and X5-12 do not.
    "rust/svid/x509/empty-subject-name.der",
]


@pytest.mark.bears("I02", "X5-01", "X5-14")
@pytest.mark.parametrize("name", GOOD_SVIDS)
def test_good_svids_of_the_libraries_load(name: str) -> None:
    assert load_svid(LIBRARIES / name).path


@pytest.mark.bears("I02", "X5-03", "X5-09", "X5-13", "X5-14", "X5-18", "X5-19")
@pytest.mark.parametrize("name", BAD_SVIDS)
def test_bad_svids_of_the_libraries_do_not_load(name: str) -> None:
    with pytest.raises(InvalidSvid):
        load_svid(LIBRARIES / name)


@pytest.mark.bears("X5-17")
@pytest.mark.parametrize(
    ("leaf", "root", "good"),
    [
        ("spiffe_leaf", "ca", True),
        ("spiffe_leaf_uri_only", "ca_uri_only", True),
        ("spiffe_leaf", "ca_uri_only", False),
        ("spiffe_leaf", "ca_with_spiffe_signing", False),
    ],
)
def test_chains_of_rust_spiffe(leaf: str, root: str, good: bool) -> None:
    folder = LIBRARIES / "rust" / "rustls-fixtures"
    der = (folder / f"{leaf}.der").read_bytes()
    anchor = x509.load_der_x509_certificate((folder / f"{root}.der").read_bytes())
    now = x509.load_der_x509_certificate(der).not_valid_before_utc + timedelta(days=1)
    bundles = BundleSet.of(Bundle(DOMAIN, (anchor,)))

    def verify() -> X509Svid:
        return verify_x509_svid([der], bundles, now=now)

    if good:
        assert verify().id == SpiffeId("spiffe://example.org/service")
    else:
        with pytest.raises(InvalidSvid):
            verify()


@pytest.mark.bears("TB-04", "TB-06", "X5-21", "JW-12")
@pytest.mark.parametrize(
    ("name", "x509_count", "jwt_count"),
    [
        ("go/spiffebundle/spiffebundle_valid_1.json", 1, 1),
        ("go/spiffebundle/spiffebundle_valid_2.json", 1, 6),
        ("go/spiffebundle/spiffebundle_valid_with_wit.json", 1, 2),
        # go-spiffe refuses two certificates in one entry; X5-23 says to take the first.
        ("go/spiffebundle/spiffebundle_multiple_x509.json", 1, 1),
        ("java/workloadapi/bundle.json", 0, 3),
        # Keys without a use are passed over: TB-06.
        ("go/jwtbundle/jwks_valid_2.json", 0, 0),
    ],
)
def test_bundles_of_the_libraries_parse(name: str, x509_count: int, jwt_count: int) -> None:
    bundle = Bundle.parse(DOMAIN, (LIBRARIES / name).read_bytes())
    assert (len(bundle.x509_authorities), len(bundle.jwt_authorities)) == (x509_count, jwt_count)
    assert Bundle.parse(DOMAIN, bundle.to_json()) == bundle


@pytest.mark.bears("TB-04", "JW-12")
@pytest.mark.parametrize("name", ["spiffebundle_no_keys.json", "spiffebundle_missing_kid.json"])
def test_bad_bundles_of_the_libraries_are_refused(name: str) -> None:
    with pytest.raises(InvalidBundle):
        Bundle.parse(DOMAIN, (LIBRARIES / "go" / "spiffebundle" / name).read_bytes())


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("go/jwtbundle/jwks_valid_1.json", 1),
        ("go/jwtbundle/jwks_valid_2.json", 2),
        ("go/jwtbundle/jwks_missing_kid.json", None),
        ("go/witbundle/jwks_valid_1.json", 1),
        ("java/jwtbundle/jwks_valid_EC_1.json", 1),
        ("java/jwtbundle/jwks_missing_kid.json", None),
        # An Edwards key signs no JWT-SVID, and is passed over.
        ("java/jwtbundle/jwks_invalid_keytype.json", 0),
        # These publish the private key. java-spiffe takes them; whoever has such a bundle has no secret.
        ("java/jwtbundle/jwks_valid_RSA_1.json", None),
        ("java/jwtbundle/jwks_valid_RSA_EC.json", None),
    ],
)
def test_jwt_bundles_of_the_libraries(name: str, count: int | None) -> None:
    document = (LIBRARIES / name).read_bytes()
    if count is None:
        with pytest.raises(InvalidBundle):
            Bundle.from_workload_api(DOMAIN, jwks=document)
    else:
        assert len(Bundle.from_workload_api(DOMAIN, jwks=document).jwt_authorities) == count


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("py/x509-bundle-certs/cert.der", 1),
        ("py/x509-bundle-certs/certs.der", 2),
        ("py/x509-bundle-certs/federated_bundle.der", 1),
        ("java/workloadapi/bundle.der", 1),
        ("rust/bundle/x509/bundle.der", 2),
        ("rust/bundle/x509/cert1.der", 1),
        ("py/x509-bundle-certs/corrupted", None),
        ("py/x509-bundle-certs/cert.pem", None),
        ("rust/bundle/x509/corrupted", None),
    ],
)
def test_x509_bundles_of_the_libraries(name: str, count: int | None) -> None:
    blob = (LIBRARIES / name).read_bytes()
    if count is None:
        with pytest.raises(InvalidBundle):
            Bundle.from_workload_api(DOMAIN, x509_der=blob)
    else:
        bundle = Bundle.from_workload_api(DOMAIN, x509_der=blob)
        assert len(bundle.x509_authorities) == count
        assert bundle.x509_der() == blob


# --- JSONTestSuite ------------------------------------------------------------------------------------------------

# A name twice in one object has no one meaning (RFC 7493 §2.3): refused though the grammar allows it.
DUPLICATES = {"y_object_duplicated_key.json", "y_object_duplicated_key_and_value.json"}
# What the suite leaves open: numbers too small for a double become zero; everything else is refused.
OPEN_ACCEPTED = {"i_number_double_huge_neg_exp.json", "i_number_real_underflow.json"}


@pytest.mark.bears("I14", "JW09", "JW16", "JW18")
@pytest.mark.parametrize(
    "path", sorted((VECTORS / "JSONTestSuite" / "test_parsing").iterdir()), ids=lambda path: path.name
)
def test_json_parsing(path: Path) -> None:
    data = path.read_bytes()
    if (path.name.startswith("y_") and path.name not in DUPLICATES) or path.name in OPEN_ACCEPTED:
        assert strictjson.loads(data) == json.loads(data)
    else:
        with pytest.raises(InvalidJson):
            strictjson.loads(data)


@pytest.mark.bears("I14")
@pytest.mark.parametrize(
    "path", sorted((VECTORS / "JSONTestSuite" / "test_parsing").glob("[ny]_*")), ids=lambda path: path.name
)
def test_the_same_bytes_through_every_door(path: Path) -> None:
    # No body of the suite is a bundle or a token. Whatever the door, the answer is our refusal.
    data = path.read_bytes()
    doors: list[Callable[[], object]] = [
        lambda: Bundle.parse(DOMAIN, data),
        lambda: BundleSet.parse_map(data),
        lambda: jose.parse_compact(f"{jose.b64url_encode(data)}.e30.AA"),
        lambda: jose.parse_compact(f"{jose.b64url_encode(b'[]')}.{jose.b64url_encode(data)}.AA"),
    ]
    for door in doors:
        with pytest.raises(Invalid):
            door()


# --- Wycheproof ---------------------------------------------------------------------------------------------------


def check_jws(text: str, jwk: Mapping[str, Any]) -> None:
    """Check a signature over any payload: Wycheproof signs text, where every token of ours is a JSON object."""
    parts = text.split(".")
    if len(parts) != 3:
        raise InvalidToken("not three parts")
    cut = jose.parse_compact(f"{parts[0]}.e30.{parts[2]}")
    jose.b64url_decode(parts[1])
    signed = f"{parts[0]}.{parts[1]}".encode()
    jws = UnverifiedJws(cut.alg, cut.kid, cut.typ, cut.header, {}, signed, cut.signature)
    jose.verify_signature(jws, jose.public_key_from_jwk(jwk), jwk.get("alg") or cut.alg)


def wycheproof(name: str) -> list[Any]:
    return [
        pytest.param(group, case, id=f"{case['tcId']}-{case['comment'] or 'case'}")
        for group in read_json(f"wycheproof/{name}")["testGroups"]
        for case in group["tests"]
    ]


# The key says one algorithm and the token another; the vectors take both, we take the key's word.
JWS_STRICTER = {346, 347, 350, 351}


@pytest.mark.bears("I01", "JW-03", "JW13", "JW14", "JW15", "JW17")
@pytest.mark.parametrize(("group", "case"), wycheproof("json_web_signature_test.json"))
def test_wycheproof_jws(group: dict[str, Any], case: dict[str, Any]) -> None:
    jwk = group.get("public") or group["private"]
    symmetric = jwk["kty"] == "oct"
    if case["result"] == "valid" and not symmetric and case["tcId"] not in JWS_STRICTER:
        check_jws(case["jws"], jwk)
        return
    with pytest.raises(InvalidToken):
        check_jws(case["jws"], jwk)


@pytest.mark.bears("I01", "JW-12")
@pytest.mark.parametrize(("group", "case"), wycheproof("json_web_key_test.json"))
def test_wycheproof_jwk(group: dict[str, Any], case: dict[str, Any]) -> None:
    keys = (group.get("public") or group["private"])["keys"]
    document = {"keys": [{**key, "use": "jwt-svid" if key.get("use") == "sig" else key.get("use")} for key in keys]}

    def check() -> None:
        bundle = Bundle.parse(DOMAIN, json.dumps(document))
        header, _, signature = case["jws"].split(".")
        cut = jose.parse_compact(f"{header}.e30.{signature}")
        key = bundle.jwt_authorities.get(cut.kid or "")
        if key is None:
            raise InvalidBundle("the key is not in the bundle")
        check_jws(case["jws"], jose.jwk_from_public_key(key))

    if case["result"] == "valid" and all(key["kty"] != "oct" for key in keys):
        check()
    else:
        with pytest.raises(Invalid):
            check()


@pytest.mark.bears("I01", "JW14", "JW15")
@pytest.mark.parametrize(("group", "case"), wycheproof("ecdsa_secp256r1_sha256_p1363_test.json"))
def test_wycheproof_ecdsa(group: dict[str, Any], case: dict[str, Any]) -> None:
    numbers = {axis: bytes.fromhex(group["publicKey"]["w" + axis])[-32:].rjust(32, b"\x00") for axis in "xy"}
    jwk = {"kty": "EC", "crv": "P-256"} | {axis: jose.b64url_encode(number) for axis, number in numbers.items()}
    key = jose.public_key_from_jwk(jwk)
    jws = UnverifiedJws("ES256", None, None, {}, {}, bytes.fromhex(case["msg"]), bytes.fromhex(case["sig"]))
    if case["result"] == "valid":
        jose.verify_signature(jws, key, "ES256")
        return
    with pytest.raises(InvalidToken):
        jose.verify_signature(jws, key, "ES256")


# --- x509-limbo, the chain layer ----------------------------------------------------------------------------------

# Where the suite refuses and our chain layer does not, and why that opens nothing. An ID that ends in "::" is a family.
LOOSER = {
    "crl::": "SPIFFE has no CRLs: SVIDs live for an hour, and a tainted authority leaves the bundle",
    "webpki::cn::": "DNS names and common names are no identity here; the SPIFFE ID is",
    "webpki::san::": "the same: DNS names are not matched against anything",
    "rfc5280::san::underscore-dns": "the same",
    "rfc5280::san::ip-in-dns": "the same",
    "webpki::eku::": "a rule for public web sites; the leaf rules of X5-16 apply instead",
    "rfc5280::eku::ee-wrong-eku": "a leaf rule, X5-16: check_leaf_usage refuses it",
    "rfc5280::leaf-ku-keycertsign": "a leaf rule, X5-14: check_leaf_usage refuses it",
    "pathlen::max-chain-depth-0-exhausted": "the depth is a constant, not an option of the caller",
    "pathlen::max-chain-depth-1-exhausted": "the same",
    "rfc5280::aki::leaf-missing-aki": "a duty of issuers (§4.2.1.1) that path validation (§6) does not ask for",
    "rfc5280::aki::intermediate-missing-aki": "the same; OpenSSL and Go accept it too",
    "rfc5280::aki::cross-signed-root-missing-aki": "the same",
    "rfc5280::ski::root-missing-ski": "the same, for §4.2.1.2",
    "rfc5280::ski::intermediate-missing-ski": "the same",
    "webpki::aki::": "an anchor is trusted for its name and key; what it says of its own issuer is not read",
}
# Where the suite accepts and we refuse.
STRICTER = {
    "cve::cve-2024-0567": "more certificates than MAX_CHAIN",
    "pathlen::validation-ignores-pathlen-in-leaf": "the leaf is an authority",
    "rfc5280::ca-as-leaf": "the leaf is an authority",
    "rfc5280::nc::permitted-ipv4-match": "constraints on IP addresses are not processed",
    "rfc5280::nc::permitted-ipv6-match": "the same",
    "rfc5280::nc::permitted-dn-match": "constraints on directory names are not processed",
    "rfc5280::nc::nc-permits-email-exact": "constraints on mail addresses are not processed",
    "rfc5280::nc::nc-permits-email-domain": "the same",
    "rfc5280::nc::nc-permits-email-literal-asterisk-exact-match": "the same",
    "rfc5280::nc::nc-permits-email-literal-double-asterisk": "the same",
    "rfc5280::nc::nc-permits-email-literal-mid-asterisk": "the same",
    "webpki::nc::permitted-dns-match-noncritical": "RFC 5280 wants them critical; the suite has both verdicts",
    "rfc5280::validity::notafter-fractional": "notAfter ends with its second's beginning, as in Go",
    "rfc5280::unknown-critical-extension-unrelated-intermediate": "every certificate a peer sends must be in order",
    "online::microsoft.com": "its intermediate is for servers only, and an SVID is for both",
    "online::bing.com": "the same",
}


@pytest.mark.bears("I02", "I13", "X5-17")
def test_x509_limbo_differs_only_where_listed() -> None:
    looser, stricter = set(), set()
    for case in limbo.cases():
        accepts = limbo.chain_verdict(case)
        if accepts != case.accepted:
            (looser if accepts else stricter).add(case.id)
    explained = {name: {entry for entry in LOOSER if _covers(entry, name)} for name in looser}
    assert [name for name, entries in explained.items() if not entries] == []
    assert set().union(*explained.values()) == set(LOOSER)
    assert stricter == set(STRICTER)


def _covers(entry: str, name: str) -> bool:
    return name.startswith(entry) if entry.endswith("::") else name == entry


@pytest.mark.bears("I02")
def test_no_limbo_certificate_is_an_svid() -> None:
    # Their names are DNS names: the whole door refuses every one of them, also where the chain is good.
    for case in limbo.cases():
        loaded = [limbo.loaded(pem) for pem in (case.leaf_pem, *case.others_pem)]
        chain = [one.public_bytes(Encoding.DER) for one in loaded if one is not None]
        with pytest.raises(InvalidSvid):
            verify_x509_svid(chain, BundleSet.of(Bundle(DOMAIN)), now=datetime(2026, 1, 1, tzinfo=UTC))
