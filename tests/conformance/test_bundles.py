"""SPIFFE Trust Domain and Bundle, line by line (TB-01 … TB-10).

Does not apply: the half of TB-09 that is about producers (this server publishes no bundle maps), and TB-10, an advice that one
trust domain has one root key: here each replica signs with an authority of its own, all of them published (TB-02), so that no
key ever has to be copied between machines.
"""

import json
from datetime import timedelta

import pytest

from broker.clock import SystemClock
from broker.errors import InvalidBundle, InvalidSvid, InvalidToken
from broker.server.authority.authorities import REFRESH_HINT
from broker.spiffe import Bundle, BundleSet, TrustDomain, verify_jwt_svid, verify_x509_svid
from broker.spiffe.bundles import MAX_NUMBER
from tests.unit.server.authority.world import DOMAIN
from tests.unit.server.identity.world import world
from tests.unit.transport.pki import Authority

CA = Authority("example.org")


@pytest.fixture
async def here(tmp_path):
    async with world(tmp_path) as one:
        yield one


@pytest.fixture
def document(here):
    return json.loads(here.authorities.bundle.to_json())


def changed(document, **members):
    return json.dumps({**document, **members})


def parsed(document, **members) -> Bundle:
    return Bundle.parse(DOMAIN, changed(document, **members))


@pytest.mark.bears("TB-01")
def test_a_bundle_is_a_jwk_set_and_may_hold_more(here, document):
    assert isinstance(document["keys"], list)
    assert all(isinstance(key["kty"], str) for key in document["keys"])
    assert parsed(document, something={"else": [1, 2]}, spiffe_unknown="x") == here.authorities.bundle


@pytest.mark.bears("TB-02")
async def test_the_sequence_grows_whenever_the_content_changes(here, document):
    seen = {here.authorities.bundle.sequence: here.authorities.bundle.to_json()}
    for _ in range(12):
        here.clock.advance(timedelta(hours=4))
        await here.rotation.settle()
        bundle = here.authorities.bundle
        assert seen.setdefault(bundle.sequence, bundle.to_json()) == bundle.to_json()
    assert len(seen) > 4
    assert list(seen) == sorted(seen)
    # Read with 64 bit and no fewer.
    assert MAX_NUMBER == 2**64 - 1
    assert parsed(document, spiffe_sequence=MAX_NUMBER).sequence == MAX_NUMBER
    for bad in (-1, MAX_NUMBER + 1, 1.5, "7", None, True):
        with pytest.raises(InvalidBundle):
            parsed(document, spiffe_sequence=bad)


@pytest.mark.bears("TB-03")
def test_the_refresh_hint_is_whole_seconds(document):
    assert document["spiffe_refresh_hint"] == REFRESH_HINT == 300
    for bad in (-1, 1.5, "300", None, False):
        with pytest.raises(InvalidBundle):
            parsed(document, spiffe_refresh_hint=bad)


@pytest.mark.bears("TB-04")
def test_keys_are_there_and_unknown_ones_are_passed_over(here, document):
    del document["spiffe_sequence"], document["spiffe_refresh_hint"]
    with pytest.raises(InvalidBundle):
        Bundle.parse(DOMAIN, '{"spiffe_sequence": 1}')
    strange = [
        {"kty": "EC", "use": "wit-svid", "kid": "w"},
        {"kty": "oct", "use": "jwt-svid", "kid": "s", "k": "AAAA"},
        {"kty": "AKP", "use": "jwt-svid", "kid": "p"},
        {"use": "x509-svid", "x5c": ["no"]},
    ]
    read = parsed(document, keys=[*strange, *document["keys"]])
    assert read.x509_authorities == here.authorities.bundle.x509_authorities
    assert read.jwt_authorities == here.authorities.bundle.jwt_authorities


@pytest.mark.bears("TB-05")
@pytest.mark.parametrize("keys", [[], [{"kty": "EC", "use": "something-else"}]], ids=["none", "none usable"])
def test_an_empty_bundle_makes_every_svid_invalid(here, keys):
    identity = CA.issue("/app")
    empty = Bundle.parse(TrustDomain("example.org"), json.dumps({"keys": keys}))
    now = SystemClock().now()
    assert verify_x509_svid(identity.chain_der, BundleSet.of(CA.bundle), now=now)
    with pytest.raises(InvalidSvid):
        verify_x509_svid(identity.chain_der, BundleSet.of(empty), now=now)
    token = "eyJhbGciOiJFUzI1NiIsImtpZCI6ImsifQ.eyJzdWIiOiJzcGlmZmU6Ly9leGFtcGxlLm9yZy9hIn0.AAAA"
    with pytest.raises((InvalidSvid, InvalidToken)):
        verify_jwt_svid(token, BundleSet.of(empty), audience="a", now=now)


@pytest.mark.bears("TB-06")
@pytest.mark.parametrize(
    "damage",
    [
        {"use": None}, {"use": "X509-SVID"}, {"use": "x509-SVID"}, {"use": "JWT-SVID"}, {"use": "sig"}, {"use": ""},
        {"kty": None}, {"kty": "ec"}, {"kty": "unknown"},
    ],
    ids=str,
)  # fmt: skip
def test_a_key_without_its_use_or_type_is_passed_over_as_a_whole(document, damage):
    keys = [{name: value for name, value in {**key, **damage}.items() if value is not None} for key in document["keys"]]
    read = parsed(document, keys=keys)
    assert (read.x509_authorities, dict(read.jwt_authorities)) == ((), {})


@pytest.mark.bears("TB-06")
def test_every_key_of_ours_says_its_use_and_type(document):
    assert {key["use"] for key in document["keys"]} == {"x509-svid", "jwt-svid"}
    assert {key["kty"] for key in document["keys"]} == {"EC"}


@pytest.mark.bears("TB-07")
def test_nothing_is_written_that_the_standard_does_not_define(document):
    assert document.keys() == {"keys", "spiffe_sequence", "spiffe_refresh_hint"}
    for key in document["keys"]:
        own = {"x5c"} if key["use"] == "x509-svid" else {"kid"}
        assert key.keys() == {"kty", "use", "crv", "x", "y"} | own


@pytest.mark.bears("TB-08")
def test_the_name_is_held_beside_the_document(document):
    other = TrustDomain("other.test")
    assert DOMAIN.name not in json.dumps({name: value for name, value in document.items() if name != "keys"})
    assert Bundle.parse(other, json.dumps(document)).trust_domain == other


@pytest.mark.bears("TB-09")
def test_a_map_names_each_trust_domain_once_and_its_hints_are_not_obeyed(document):
    text = json.dumps(document)
    read = BundleSet.parse_map(f'{{"trust_domains": {{"a.test": {text}, "b.test": {text}}}}}')
    assert {name.name for name in read} == {"a.test", "b.test"}
    assert {bundle.refresh_hint for bundle in read.values()} == {None}
    assert len(BundleSet.parse_map('{"trust_domains": {}}')) == 0
    for bad in (f'{{"trust_domains": {{"a.test": {text}, "a.test": {text}}}}}', "{}", '{"trust_domains": []}'):
        with pytest.raises(InvalidBundle):
            BundleSet.parse_map(bad)
