import pytest

from broker.errors import Invalid
from broker.registry.dns_names import MAX_DNS_NAMES, checked_dns_names, require_no_overlap

LABEL = "x" * 49 + "."


def test_names_are_kept_in_lower_case_and_their_order_each_once() -> None:
    assert checked_dns_names(("Web.Example.ORG", "*.other.org", "web.example.org")) == (
        "web.example.org",
        "*.other.org",
    )


@pytest.mark.parametrize(
    "name",
    [
        "a.org", "a_b.org", "_sip.org", "*.a.org", "*.org", "localhost", "1.2.3.4", "123", "abc--d.org", "x" * 63 + ".org",
        LABEL * 5 + "abc", "xn--bcher-kva.org", "xn--ls8h.org", "xn--zca.org", "xn--80ak6aa92e.com",
    ],
)  # fmt: skip
def test_what_spire_takes_for_a_host_is_taken(name: str) -> None:
    assert checked_dns_names((name,)) == (name,)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        # SPIRE's own words.
        ("bücher.org", "name must be ascii"),
        ("\u212a.org", "name must be ascii"),
        ("*.*.org", "too many wildcards"),
        ("*", "wildcard must be first label"),
        ("a.*.org", "wildcard must be first label"),
        ("a*.org", "wildcard must be first label"),
        ("*.", "empty or only whitespace"),
        ("", "empty or only whitespace"),
        (" ", "empty or only whitespace"),
        ("a.org.", "domain ends with dot"),
        ("..", "domain ends with dot"),
        ("-a.org", 'idna error\nidna: invalid label "-a"'),
        ("*.-a.org", 'idna error\nidna: invalid label "-a"'),
        ("a-.org", 'idna error\nidna: invalid label "a-"'),
        ("ab--cd.org", 'idna error\nidna: invalid label "ab--cd"'),
        ("a..org", 'idna error\nidna: invalid label "a..org"'),
        (".a.org", 'idna error\nidna: invalid label ".a.org"'),
        ("*..org", 'idna error\nidna: invalid label ".org"'),
        ("x" * 64 + ".org", f'idna error\nidna: invalid label "{"x" * 64}"'),
        (LABEL * 5 + "abcd", f'idna error\nidna: invalid label "{LABEL * 5}abcd"'),
        # Decoded there, as they came here.
        ("xn--a.org", 'idna error\nidna: invalid label "xn--a"'),
        ("xn--.org", 'idna error\nidna: invalid label "xn--"'),
        ("xn--a-ecp.ru", 'idna error\nidna: invalid label "xn--a-ecp"'),
        ("xn--0.pt", 'idna error\nidna: invalid label "xn--0"'),
        ("xn--abc-.org", 'idna error\nidna: invalid label "xn--abc-"'),
        # SPIRE takes these.
        ("a b.org", "a character is none of a host's name"),
        (" a.org", "a character is none of a host's name"),
        ("a.org\n", "a character is none of a host's name"),
        ("a.org/b", "a character is none of a host's name"),
        ("a.org:80", "a character is none of a host's name"),
        ("a\x00b", "a character is none of a host's name"),
    ],
)
def test_what_is_no_host_s_name_is_refused(name: str, words: str) -> None:
    with pytest.raises(Invalid) as refused:
        checked_dns_names(("a.org", name))
    assert (refused.value.message, refused.value.reason) == (words, "invalid_dns_name")


def test_there_are_not_too_many() -> None:
    names = [f"h{n}.org" for n in range(MAX_DNS_NAMES + 1)]
    assert len(checked_dns_names(names[1:])) == MAX_DNS_NAMES
    with pytest.raises(Invalid):
        checked_dns_names(names)


def test_a_wildcard_covers_one_label() -> None:
    require_no_overlap(("*.a.org", "a.org", "b.c.a.org"))
    with pytest.raises(Invalid) as refused:
        require_no_overlap(("*.a.org", "b.a.org"))
    assert (
        refused.value.message == 'name "b.a.org" overlaps with an existing wildcard name in the list: wildcard overlap'
    )
