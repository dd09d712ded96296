"""SPIFFE IDs and trust domains, line by line of SPIFFE-ID §2."""

import copy
import pickle
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.errors import Invalid, InvalidSpiffeId, InvalidTrustDomain
from broker.spiffe import SpiffeId, TrustDomain
from broker.spiffe.ids import MAX_SPIFFE_ID, MAX_TRUST_DOMAIN

NAMES = st.text(string.ascii_lowercase + string.digits + "._-", min_size=1, max_size=MAX_TRUST_DOMAIN)
SEGMENTS = st.text(string.ascii_letters + string.digits + "._-", min_size=1, max_size=40).filter(
    lambda segment: segment not in (".", "..")
)
PATHS = st.lists(SEGMENTS, max_size=8).map(lambda segments: "".join("/" + segment for segment in segments))


def refused(text: str, code: str) -> None:
    with pytest.raises(InvalidSpiffeId) as caught:
        SpiffeId(text)
    assert caught.value.reason == code


@pytest.mark.bears("ID-01")
@pytest.mark.parametrize(
    "text",
    [
        "",
        "s",
        "example.org/web",
        "http://example.org/web",
        "spiffe:/example.org",
        "xspiffe://example.org",
        " spiffe://a",
    ],
)
def test_the_scheme_is_spiffe(text: str) -> None:
    refused(text, "spiffe_id_wrong_scheme")


@pytest.mark.bears("ID-02")
@pytest.mark.parametrize("text", ["spiffe://", "spiffe:///", "spiffe:///web"])
def test_the_trust_domain_is_not_empty(text: str) -> None:
    refused(text, "trust_domain_missing")


@pytest.mark.bears("ID-03")
@pytest.mark.parametrize("tail", ["?", "#", "?x=1", "#x", "?x#y"])
def test_there_is_no_query_and_no_fragment(tail: str) -> None:
    refused("spiffe://example.org/web" + tail, "spiffe_id_bad_character")
    refused("spiffe://example.org" + tail, "trust_domain_bad_character")


@pytest.mark.bears("ID-04")
@pytest.mark.parametrize("authority", ["user@td", "user:secret@td", "@td", "td:80", "td:", ":80"])
def test_there_is_no_user_and_no_port(authority: str) -> None:
    refused(f"spiffe://{authority}/web", "trust_domain_bad_character")


@pytest.mark.bears("ID-05", "ID-16")
@pytest.mark.parametrize("name", ["Example.org", "EXAMPLE", "example.orG", "\u212a8s.example.org"])
def test_upper_case_is_refused_and_not_folded(name: str) -> None:
    refused(f"spiffe://{name}/web", "trust_domain_bad_character")
    refused("SPIFFE://example.org/web", "spiffe_id_wrong_scheme")
    refused("Spiffe://example.org/web", "spiffe_id_wrong_scheme")


@pytest.mark.bears("ID-06", "ID-07")
@pytest.mark.parametrize(
    "name",
    ["a!b", "a b", "a%41", "%61", "a,b", "[::1]", "a\n", "\na", "a\x00", "ä", "a\u2028", "a\\b", "a\tb", "\u0661"],
)
def test_the_trust_domain_has_its_own_alphabet(name: str) -> None:
    refused(f"spiffe://{name}/web", "trust_domain_bad_character")
    with pytest.raises(InvalidTrustDomain):
        TrustDomain(name)


@pytest.mark.bears("ID-08")
@pytest.mark.parametrize("name", ["1.2.3.4", "example..org", ".", "-", "_", "a.", "999.999", "0"])
def test_names_need_not_look_like_dns_or_ip_addresses(name: str) -> None:
    assert SpiffeId(f"spiffe://{name}/web").trust_domain == TrustDomain(name)


@pytest.mark.bears("ID-09", "ID-12")
@pytest.mark.parametrize(
    "segment", ["%41", "a%2Fb", "a b", "a:b", "a;b", "a@b", "é", "a\n", "a\x00b", "a\\b", "~", "a+b", "\u0661"]
)
def test_path_segments_have_their_own_alphabet(segment: str) -> None:
    refused(f"spiffe://example.org/{segment}", "spiffe_id_bad_character")
    refused(f"spiffe://example.org/{segment}/x", "spiffe_id_bad_character")


@pytest.mark.bears("ID-10")
@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("//a", "spiffe_id_empty_segment"),
        ("/a//b", "spiffe_id_empty_segment"),
        ("/.", "spiffe_id_dot_segment"),
        ("/..", "spiffe_id_dot_segment"),
        ("/a/./b", "spiffe_id_dot_segment"),
        ("/a/../b", "spiffe_id_dot_segment"),
    ],
)
def test_there_are_no_empty_and_no_dot_segments(path: str, code: str) -> None:
    refused("spiffe://example.org" + path, code)


@pytest.mark.bears("ID-10")
@pytest.mark.parametrize("segment", ["...", "..a", ".a", "a.", "a..", "-", "_"])
def test_dots_are_fine_beside_others(segment: str) -> None:
    assert SpiffeId(f"spiffe://example.org/{segment}").path == f"/{segment}"


@pytest.mark.bears("ID-11")
@pytest.mark.parametrize("path", ["/", "/a/", "/a/b/", "//"])
def test_there_is_no_trailing_slash(path: str) -> None:
    refused("spiffe://example.org" + path, "spiffe_id_trailing_slash")


@pytest.mark.bears("ID-13", "ID-14")
def test_the_longest_id_has_2048_bytes() -> None:
    longest = "spiffe://example.org/" + "a" * (MAX_SPIFFE_ID - len("spiffe://example.org/"))
    assert len(str(SpiffeId(longest))) == 2048
    refused(longest + "a", "spiffe_id_too_long")


@pytest.mark.bears("ID-15")
def test_the_longest_trust_domain_has_255_bytes() -> None:
    assert str(TrustDomain("a" * 255)) == "a" * 255
    refused("spiffe://" + "a" * 256, "trust_domain_too_long")
    with pytest.raises(InvalidTrustDomain):
        TrustDomain("a" * 256)


@pytest.mark.bears("ID-16")
def test_paths_are_case_sensitive() -> None:
    assert SpiffeId("spiffe://example.org/Web") != SpiffeId("spiffe://example.org/web")


@pytest.mark.parametrize("text", ["spiffe://example.org", "spiffe://example.org/web/1"])
def test_a_full_id_stands_for_its_trust_domain(text: str) -> None:
    assert TrustDomain(text).name == "example.org"


@pytest.mark.parametrize(
    "text", ["", "spiffe://", "spiffe:/a", "https://a", "spiffe://a/", "spiffe://a/../b", "a/b", "a:b", "://a"]
)
def test_other_text_is_no_trust_domain(text: str) -> None:
    with pytest.raises(InvalidTrustDomain):
        TrustDomain(text)


@pytest.mark.parametrize("value", [None, 5, b"spiffe://example.org/web", ["spiffe://example.org"], True])
def test_what_is_not_text_is_refused_with_our_error(value: object) -> None:
    with pytest.raises(InvalidSpiffeId):
        SpiffeId(value)  # type: ignore[arg-type]
    with pytest.raises(InvalidTrustDomain):
        TrustDomain(value)  # type: ignore[arg-type]


def test_joining_never_moves_the_trust_domain() -> None:
    domain = TrustDomain("example.org")
    assert SpiffeId.of(domain, "") == domain.id == SpiffeId("spiffe://example.org")
    assert SpiffeId.of(domain, "/a/b") == SpiffeId("spiffe://example.org/a/b")
    for path in (".evil", "evil/a", "a", "/", "?x", "/a/"):
        with pytest.raises(InvalidSpiffeId):
            SpiffeId.of(domain, path)


def test_prefixes_end_at_a_segment() -> None:
    below = SpiffeId("spiffe://example.org/a/b")
    assert below.is_under(SpiffeId("spiffe://example.org/a"))
    assert below.is_under(below)
    assert below.is_under(SpiffeId("spiffe://example.org"))
    assert not SpiffeId("spiffe://example.org/ab").is_under(SpiffeId("spiffe://example.org/a"))
    assert not SpiffeId("spiffe://example.organic/a").is_under(SpiffeId("spiffe://example.org"))
    assert not SpiffeId("spiffe://example.org/a").is_under(below)


def test_membership_is_byte_exact() -> None:
    web = SpiffeId("spiffe://example.org/web")
    assert web.is_member_of(TrustDomain("example.org"))
    assert not web.is_member_of(TrustDomain("example.org."))
    assert not web.is_member_of(TrustDomain("org"))


def test_values_cannot_be_changed() -> None:
    web = SpiffeId("spiffe://example.org/web")
    for name in ("_text", "trust_domain", "other"):
        with pytest.raises((AttributeError, TypeError)):
            setattr(web, name, "spiffe://evil/web")
    assert pickle.loads(pickle.dumps(web)) == copy.deepcopy(web) == web


def test_refusals_do_not_repeat_the_text() -> None:
    # A token handed in by mistake must not reach a log.
    with pytest.raises(Invalid) as caught:
        SpiffeId("spiffe://example.org/eyJhbGciOi%secret")
    assert "eyJ" not in caught.value.message


@given(NAMES, PATHS)
def test_parse_and_print_are_inverse(name: str, path: str) -> None:
    spiffe_id = SpiffeId(f"spiffe://{name}{path}")
    assert str(spiffe_id) == f"spiffe://{name}{path}"
    assert (spiffe_id.trust_domain.name, spiffe_id.path) == (name, path)
    assert SpiffeId.of(spiffe_id.trust_domain, spiffe_id.path) == spiffe_id
    assert hash(SpiffeId(str(spiffe_id))) == hash(spiffe_id)


@given(st.text(max_size=60))
def test_any_text_is_an_id_or_a_typed_refusal(tail: str) -> None:
    for text in (tail, "spiffe://" + tail, "spiffe://td/" + tail):
        try:
            assert str(SpiffeId(text)) == text
        except InvalidSpiffeId:
            continue


@given(st.lists(st.tuples(NAMES, PATHS), min_size=2, max_size=6))
def test_order_is_total_and_is_that_of_the_text(pairs: list[tuple[str, str]]) -> None:
    ids = [SpiffeId(f"spiffe://{name}{path}") for name, path in pairs]
    assert [str(spiffe_id) for spiffe_id in sorted(ids)] == sorted(map(str, ids))
