"""Federation's rules: addresses, redirects, freshness, pace."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.errors import Invalid, Refused
from broker.spiffe import Bundle, SpiffeId, TrustDomain
from broker.spiffe.federation import (
    DEFAULT_REFRESH,
    MAX_REFRESH,
    MIN_REFRESH,
    Freshness,
    Profile,
    Relationship,
    freshness,
    is_reachable,
    redirected,
    refresh_seconds,
)
from tests.unit.transport.pki import Authority

OTHER = TrustDomain("other.test")
ENDPOINT = SpiffeId("spiffe://other.test/spire/server")
ONE, TWO = Authority("other.test"), Authority("other.test")


def web(url: str = "https://bundles.other.test/") -> Relationship:
    return Relationship(OTHER, url, Profile.HTTPS_WEB)


def spiffe(url: str = "https://bundles.other.test:8443/") -> Relationship:
    return Relationship(OTHER, url, Profile.HTTPS_SPIFFE, ENDPOINT)


@pytest.mark.parametrize(
    "url", ["https://other.test", "https://other.test:8443/a?b=c", "https://127.0.0.1/", "https://[::1]:8443/"]
)
def test_addresses_of_endpoints(url: str) -> None:
    assert web(url).url == url


@pytest.mark.bears("I15")
@pytest.mark.parametrize(
    "url",
    [
        "", "http://other.test/", "file:///etc/passwd", "ftp://other.test/", "//other.test/", "other.test", "https://",
        "https:///path", "https://user@other.test/", "https://user:word@other.test/", "https://@other.test/",
        "https://other.test:0/", "https://other.test:99999/", "https://other.test:x/", "https://other.test/#part",
        "https://other.test/ x", "https://other.test/\n", "https://öther.test/", "https://other.test/" + "a" * 2048,
        "https://[::1", "HTTPS", "https:other.test", "javascript:alert(1)",
    ],
)  # fmt: skip
def test_what_is_no_address_of_an_endpoint(url: str) -> None:
    with pytest.raises(Invalid) as refused:
        web(url)
    assert refused.value.reason == "bundle_endpoint_url"


def test_the_identity_of_the_endpoint_belongs_to_one_profile() -> None:
    with pytest.raises(Invalid):
        Relationship(OTHER, "https://other.test/", Profile.HTTPS_SPIFFE)
    with pytest.raises(Invalid):
        Relationship(OTHER, "https://other.test/", Profile.HTTPS_WEB, ENDPOINT)
    assert spiffe().is_self_serving
    assert not web().is_self_serving
    elsewhere = Relationship(OTHER, "https://other.test/", Profile.HTTPS_SPIFFE, SpiffeId("spiffe://third.test/e"))
    assert not elsewhere.is_self_serving


@pytest.mark.bears("FE-13", "I15")
def test_redirects() -> None:
    here = "https://bundles.other.test:8443/"
    assert redirected(spiffe(), here, "/moved") == "https://bundles.other.test:8443/moved"
    assert redirected(spiffe(), here, "https://BUNDLES.other.test:8443/b") == "https://BUNDLES.other.test:8443/b"
    assert redirected(web(), "https://bundles.other.test/", "https://cdn.other.test/b") == "https://cdn.other.test/b"
    for location in ("https://elsewhere.test/", "https://bundles.other.test/", "https://bundles.other.test:8444/"):
        with pytest.raises(Refused) as refused:
            redirected(spiffe(), here, location)
        assert refused.value.reason == "redirect_refused"
    for location in ("http://bundles.other.test/", "file:///etc/passwd", "https://u@bundles.other.test/", "gopher://x"):
        with pytest.raises(Refused):
            redirected(web(), "https://bundles.other.test/", location)


@pytest.mark.bears("I15")
@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "10.1.2.3", "192.168.0.1", "172.16.5.5", "169.254.169.254", "0.0.0.0", "100.64.0.1", "::1", "::",
        "fe80::1", "fc00::1", "::ffff:127.0.0.1", "::ffff:169.254.169.254", "not an address", "",
        "64:ff9b::169.254.169.254", "64:ff9b:1::10.0.0.1", "2002:a01:203::1", "::10.1.2.3", "::ffff:0:10.1.2.3", "fec0::1",
    ],
)  # fmt: skip
def test_a_redirect_does_not_lead_into_our_network(address: str) -> None:
    assert not is_reachable(web(), "https://cdn.other.test/", address)
    # Whoever configured a host knows where it is.
    assert is_reachable(web(), "https://bundles.other.test/moved", address)


def test_a_redirect_may_lead_into_the_world() -> None:
    assert is_reachable(web(), "https://cdn.other.test/", "93.184.216.34")
    assert is_reachable(web(), "https://cdn.other.test/", "2606:2800:220:1::1")
    # By a translator: a network without IPv4 has no other way.
    assert is_reachable(web(), "https://cdn.other.test/", "64:ff9b::93.184.216.34")


def bundle(authority: Authority = ONE, sequence: int | None = None, hint: int | None = None) -> Bundle:
    return authority.bundle.with_sequence(sequence).with_refresh_hint(hint)


@pytest.mark.bears("FE-03", "SP04")
@pytest.mark.parametrize(
    ("held", "fetched", "verdict"),
    [
        pytest.param(None, bundle(), Freshness.NEWER, id="first"),
        pytest.param(bundle(), bundle(), Freshness.SAME, id="same without numbers"),
        pytest.param(bundle(sequence=3), bundle(sequence=3), Freshness.SAME, id="same"),
        pytest.param(bundle(sequence=3), bundle(TWO, 4), Freshness.NEWER, id="newer"),
        pytest.param(bundle(sequence=3), bundle(sequence=4), Freshness.NEWER, id="higher number, same content"),
        pytest.param(bundle(sequence=3, hint=300), bundle(sequence=3, hint=60), Freshness.NEWER, id="another hint"),
        pytest.param(bundle(sequence=3), bundle(TWO, 2), Freshness.OLDER, id="older"),
        pytest.param(bundle(sequence=3), bundle(sequence=2), Freshness.OLDER, id="older, same content"),
        pytest.param(bundle(sequence=3), bundle(TWO, 3), Freshness.CHANGED, id="changed under one number"),
        pytest.param(bundle(), bundle(TWO), Freshness.NEWER, id="latest wins without numbers"),
        pytest.param(bundle(sequence=3), bundle(TWO), Freshness.NEWER, id="latest wins when the number is gone"),
        pytest.param(bundle(), bundle(TWO, 1), Freshness.NEWER, id="numbers begin"),
        pytest.param(bundle(sequence=3), Bundle(OTHER, sequence=4), Freshness.NEWER, id="withdrawn altogether"),
    ],
)
def test_freshness(held: Bundle | None, fetched: Bundle, verdict: Freshness) -> None:
    assert freshness(held, fetched) is verdict


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1))
def test_a_lower_number_is_never_taken(held: int, fetched: int) -> None:
    verdict = freshness(bundle(ONE, held), bundle(TWO, fetched))
    assert (verdict is Freshness.OLDER) == (0 < fetched < held)


@pytest.mark.bears("FE-02")
@pytest.mark.parametrize(
    ("hint", "seconds"),
    [(None, DEFAULT_REFRESH), (0, DEFAULT_REFRESH), (1, MIN_REFRESH), (600, 600), (10**12, MAX_REFRESH)],
)
def test_pace(hint: int | None, seconds: int) -> None:
    assert refresh_seconds(bundle(hint=hint)) == seconds
    assert refresh_seconds(None) == DEFAULT_REFRESH == 300
