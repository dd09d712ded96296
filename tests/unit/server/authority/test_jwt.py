from datetime import timedelta

import pytest

from broker.errors import Invalid, Unavailable
from broker.keys.local import generated
from broker.server.authority.jwt import JwtAuthority, JwtSvidClaims, sign_jwt_svid
from broker.spiffe import Bundle, BundleSet, SpiffeId, jose, verify_jwt_svid
from tests.unit.server.authority.world import DOMAIN, NOW

APP = SpiffeId("spiffe://example.org/app")


@pytest.fixture
def authority():
    return JwtAuthority("key-1", NOW + timedelta(hours=1), generated("key-1"))


def claims(audience=("aud",)):
    return JwtSvidClaims(APP, audience, NOW - timedelta(seconds=10), NOW + timedelta(minutes=5), "id", "https://issuer")


@pytest.mark.bears("JW-02", "JW-03", "JW-04", "JW-05", "JW-06", "JW-07", "JW-08")
def test_a_jwt_svid_verifies_and_says_its_key(authority):
    token = sign_jwt_svid(authority, claims())
    parts = jose.parse_compact(token)
    assert dict(parts.header) == {"alg": "ES256", "kid": "key-1", "typ": "JWT"}
    assert parts.payload["aud"] == ["aud"]
    assert all(isinstance(parts.payload[name], int) for name in ("exp", "iat"))
    bundles = BundleSet.of(Bundle(DOMAIN, jwt_authorities={"key-1": authority.signer.public_key}))
    assert verify_jwt_svid(token, bundles, audience="aud", now=NOW).id == APP


def test_no_audience_no_token(authority):
    with pytest.raises(Invalid):
        sign_jwt_svid(authority, claims(()))


@pytest.mark.bears("I07")
def test_a_token_never_outlives_its_key(authority):
    assert authority.expiry(NOW, timedelta(minutes=5)) == NOW + timedelta(minutes=5)
    assert authority.expiry(NOW, timedelta(hours=5)) == NOW + timedelta(hours=1)
    with pytest.raises(Unavailable):
        authority.expiry(NOW + timedelta(hours=1), timedelta(minutes=5))
