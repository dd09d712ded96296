"""Name constraints, through whole chains."""

from collections.abc import Sequence
from typing import Any

import pytest
from cryptography import x509

from broker.errors import InvalidSvid
from broker.spiffe import Bundle, BundleSet, TrustDomain, X509Svid, nameconstraints, verify_x509_svid

DNS, URI = x509.DNSName, x509.UniformResourceIdentifier
EMPTY = x509.Name([])


def verify(
    pki: Any, permitted: Any, excluded: Any, uri: str, names: Sequence[Any] = (), *, critical: bool = True
) -> X509Svid:
    root = pki.root()
    limit = (x509.NameConstraints(permitted, excluded), critical)
    signer = pki.intermediate(root, extra=[limit])
    leaf = pki.leaf(signer, sans=[URI(uri), *names])
    domain = TrustDomain(uri)
    return verify_x509_svid([leaf.der, signer.der], BundleSet.of(Bundle(domain, (root.certificate,))), now=pki.now)


def refused(*arguments: Any, **options: Any) -> None:
    with pytest.raises(InvalidSvid) as caught:
        verify(*arguments, **options)
    assert caught.value.reason == "svid_name_constraints"


@pytest.mark.bears("X5-11", "X5-17")
@pytest.mark.parametrize(
    ("permitted", "excluded", "uri"),
    [
        (["example.org"], None, "spiffe://example.org/web"),
        (["EXAMPLE.org"], None, "spiffe://example.org/web"),
        ([".example.org"], None, "spiffe://a.example.org/web"),
        (["other", "example.org"], None, "spiffe://example.org/web"),
        (None, ["other.org"], "spiffe://example.org/web"),
        (None, ["xample.org"], "spiffe://example.org/web"),
        (["example.org"], ["a.example.org"], "spiffe://example.org/web"),
    ],
)
def test_ids_within_uri_constraints_are_accepted(pki: Any, permitted: Any, excluded: Any, uri: str) -> None:
    assert verify(pki, *_uris(permitted, excluded), uri).id.path == "/web"


@pytest.mark.bears("X5-11", "X5-17")
@pytest.mark.parametrize(
    ("permitted", "excluded", "uri"),
    [
        (["other.org"], None, "spiffe://example.org/web"),
        (["example.org"], None, "spiffe://a.example.org/web"),
        ([".example.org"], None, "spiffe://example.org/web"),
        (["example.org"], None, "spiffe://evilexample.org/web"),
        ([".example.org"], None, "spiffe://evilexample.org/web"),
        (None, ["example.org"], "spiffe://example.org/web"),
        (None, ["example.org"], "spiffe://a.example.org/web"),
        (None, [".example.org"], "spiffe://a.example.org/web"),
        (["example.org"], ["example.org"], "spiffe://example.org/web"),
        (["1.2.3.4"], None, "spiffe://1.2.3.4/web"),
        (None, ["other"], "spiffe://a..b/web"),
        (["spiffe://example.org"], None, "spiffe://example.org/web"),
        (["*.org"], None, "spiffe://example.org/web"),
    ],
)
def test_ids_outside_of_uri_constraints_are_refused(pki: Any, permitted: Any, excluded: Any, uri: str) -> None:
    refused(pki, *_uris(permitted, excluded), uri)


def _uris(permitted: Any, excluded: Any) -> tuple[Any, Any]:
    return permitted and [URI(text) for text in permitted], excluded and [URI(text) for text in excluded]


@pytest.mark.parametrize(
    ("permitted", "excluded", "name", "good"),
    [
        (["a.org"], None, "a.org", True),
        (["a.org"], None, "x.A.org", True),
        (["a.org"], None, "*.a.org", True),
        (["a.org"], None, "xa.org", False),
        (["x.a.org"], None, "*.a.org", False),
        (None, ["a.org"], "b.org", True),
        (None, ["a.org"], "x.a.org", False),
        (None, ["x.a.org"], "*.a.org", False),
        (None, ["x.a.org"], "a.org", True),
        ([".a.org"], None, "x.a.org", False),
        (["a.org"], None, "a..a.org", False),
        (["a.org"], None, "*.*.a.org", False),
    ],
)
def test_dns_constraints(pki: Any, permitted: Any, excluded: Any, name: str, good: bool) -> None:
    limits = (permitted and [DNS(text) for text in permitted], excluded and [DNS(text) for text in excluded])
    if good:
        assert verify(pki, *limits, "spiffe://example.org/web", [DNS(name)]).id.path == "/web"
    else:
        refused(pki, *limits, "spiffe://example.org/web", [DNS(name)])


def test_constraints_of_a_kind_the_leaf_lacks_do_not_matter(pki: Any) -> None:
    assert verify(pki, [DNS("a.org")], None, "spiffe://example.org/web").id.path == "/web"
    assert verify(pki, [x509.RFC822Name("a.org")], None, "spiffe://example.org/web").id.path == "/web"


def test_constraints_that_cannot_be_processed_are_refused(pki: Any) -> None:
    web = "spiffe://example.org/web"
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "workload")])
    refused(pki, [x509.DirectoryName(name)], None, web)
    refused(pki, None, [x509.RFC822Name("b.org")], web, [x509.RFC822Name("me@a.org")])
    other = x509.OtherName(x509.ObjectIdentifier("1.2.3"), b"\x05\x00")
    refused(pki, None, [other], web, [other])


def test_constraints_that_others_may_skip_are_refused(pki: Any) -> None:
    # RFC 5280 §4.2.1.10: critical, always.
    refused(pki, [URI("example.org")], None, "spiffe://example.org/web", critical=False)


@pytest.mark.bears("X5-11")
def test_constraints_reach_over_intermediates(pki: Any) -> None:
    root = pki.root(extra=[(x509.NameConstraints([URI("example.org")], None), True)])
    signer = pki.intermediate(root)
    for uri, good in (("spiffe://example.org/web", True), ("spiffe://other.org/web", False)):
        bundles = BundleSet.of(Bundle(TrustDomain(uri), (root.certificate,)))
        chain = [pki.leaf(signer, uri).der, signer.der]
        if good:
            assert verify_x509_svid(chain, bundles, now=pki.now).id.path == "/web"
        else:
            with pytest.raises(InvalidSvid):
                verify_x509_svid(chain, bundles, now=pki.now)


def test_constraints_bind_the_names_of_intermediates_too(pki: Any) -> None:
    root = pki.root(extra=[(x509.NameConstraints([URI("example.org")], None), True)])
    bundles = BundleSet.of(Bundle(TrustDomain("example.org"), (root.certificate,)))
    signer = pki.intermediate(root, sans=[URI("spiffe://other.org")])
    with pytest.raises(InvalidSvid):
        verify_x509_svid([pki.leaf(signer).der, signer.der], bundles, now=pki.now)


def test_the_work_is_bounded() -> None:
    limits = x509.NameConstraints([DNS(f"a{n}.org") for n in range(100)], None)
    with pytest.raises(InvalidSvid):
        nameconstraints.check(limits, [DNS("a99.org")] * 100, EMPTY)
    nameconstraints.check(limits, [DNS("a99.org")] * 10, EMPTY)


def test_names_beyond_ascii_are_refused_not_folded() -> None:
    limits = x509.NameConstraints([URI("k8s.org")], None)
    with pytest.raises(InvalidSvid):
        nameconstraints.check(limits, [URI._init_without_validation("spiffe://\u212a8s.org/a")], EMPTY)


@pytest.mark.parametrize("kind", [DNS, URI])
@pytest.mark.parametrize("limit", ["example..org", "exa mple.org", "https://example.org", "example.org:443"])
def test_a_constraint_that_cannot_be_read_permits_nothing(kind: Any, limit: str) -> None:
    """What it was to exclude is not known."""
    names = [URI("spiffe://other.org/web"), DNS("web.other.org")]
    for constraints in (x509.NameConstraints(None, [kind(limit)]), x509.NameConstraints([kind("other.org"), kind("web.other.org"), kind(limit)], None)):  # fmt: skip
        with pytest.raises(InvalidSvid) as caught:
            nameconstraints.check(constraints, names, EMPTY)
        assert caught.value.reason == "svid_name_constraints"
