"""X.509-SVIDs, line by line of X509-SVID §2 to §5."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID
from hypothesis import given
from hypothesis import strategies as st

from broker.errors import InvalidSvid
from broker.spiffe import Bundle, BundleSet, SpiffeId, TrustDomain, X509Svid, verify_x509_svid
from broker.spiffe.certificates import MAX_CERTIFICATE
from broker.spiffe.x509svid import parse_x509_svid_id, split_der

DOMAIN = TrustDomain("example.org")
URI = x509.UniformResourceIdentifier


def code_of(act: Callable[[], object]) -> str:
    with pytest.raises(InvalidSvid) as caught:
        act()
    return caught.value.reason


class Judge:
    """One trust domain with one root."""

    def __init__(self, pki: Any) -> None:
        self.pki = pki
        self.root = pki.root()
        self.bundles = BundleSet.of(Bundle(DOMAIN, (self.root.certificate,)))

    def verify(self, *chain: Any, after: timedelta = timedelta(0)) -> X509Svid:
        return verify_x509_svid([holder.der for holder in chain], self.bundles, now=self.pki.now + after)

    def leaf(self, *uris: str, **changes: Any) -> X509Svid:
        return self.verify(self.pki.leaf(self.root, *uris, **changes))

    def refused(self, *uris: str, **changes: Any) -> str:
        return code_of(lambda: self.leaf(*uris, **changes))


@pytest.fixture
def judge(pki: Any) -> Judge:
    return Judge(pki)


def test_a_good_leaf_is_accepted(judge: Judge) -> None:
    holder = judge.pki.leaf(judge.root)
    svid = judge.verify(holder)
    assert svid.id == SpiffeId("spiffe://example.org/web")
    assert svid.leaf == holder.certificate
    assert svid.chain == (holder.certificate,)
    assert svid.authority == judge.root.certificate
    assert svid.serial == holder.certificate.serial_number
    assert (svid.not_before, svid.not_after) == (
        holder.certificate.not_valid_before_utc,
        holder.certificate.not_valid_after_utc,
    )
    assert svid.expires_at == svid.not_after
    assert len(svid.x5t) == 43
    assert "Certificate" not in repr(svid)


def test_nobody_else_makes_a_verified_svid(judge: Judge) -> None:
    good = judge.leaf()
    arguments = (good.id, good.not_before, good.not_after, 1, good.x5t, good.chain, good.authority)
    with pytest.raises(TypeError):
        X509Svid(*arguments, object())
    with pytest.raises(TypeError):
        X509Svid(*arguments)  # type: ignore[call-arg]


@pytest.mark.bears("X5-01", "X5-20")
def test_there_is_exactly_one_uri_name(judge: Judge) -> None:
    web = "spiffe://example.org/web"
    assert judge.refused(web, web) == "svid_uri_count"
    assert judge.refused(web, "https://example.org/") == "svid_uri_count"
    assert judge.refused(sans=[x509.DNSName("a.example")]) == "svid_uri_count"
    assert judge.refused(sans=[]) == "svid_uri_count"


@pytest.mark.bears("X5-02")
def test_other_names_are_tolerated(judge: Judge) -> None:
    names = [x509.DNSName("a.example"), URI("spiffe://example.org/web"), x509.DNSName("*.b.example")]
    assert judge.leaf(sans=names).id.path == "/web"


@pytest.mark.bears("X5-03", "X5-19")
def test_the_id_has_a_path(judge: Judge) -> None:
    # go-spiffe accepts this one from peers: spiffe.md 6.4.
    assert judge.refused("spiffe://example.org") == "svid_root_path"


@pytest.mark.bears("X5-19", "I03", "ID-20")
@pytest.mark.parametrize(
    "uri",
    [
        "https://example.org/web",
        "SPIFFE://example.org/web",
        "spiffe://EXAMPLE.org/web",
        "spiffe://example.org/web/",
        "spiffe://example.org/%41",
        "spiffe://example.org/a/../b",
        "spiffe://example.org:80/web",
        "spiffe://example.org/web?x=1",
        "spiffe://example.org/web#x",
        "spiffe:///web",
        "spiffe://example.org/a b",
        "spiffe://example.org/web\x00",
        "spiffe://example.org/" + "a" * 2048,
    ],
)
def test_the_uri_is_a_spiffe_id(judge: Judge, uri: str) -> None:
    assert judge.refused(uri).startswith(("spiffe_id", "trust_domain"))


@pytest.mark.bears("X5-04")
def test_without_a_subject_the_names_are_critical(judge: Judge) -> None:
    assert judge.refused(subject=None) == "svid_san"
    assert judge.leaf(subject=None, san_critical=True).id.path == "/web"


@pytest.mark.bears("PB15")
def test_a_common_name_claims_no_other_id(judge: Judge) -> None:
    for other in ("spiffe://example.org/admin", "SPIFFE://example.org/web", "spiffe://example.org/web/"):
        assert judge.refused("spiffe://example.org/web", subject=other) == "svid_subject"
    for same in ("spiffe://example.org/web", "web.example.org", "CN of anything"):
        assert judge.leaf("spiffe://example.org/web", subject=same).id.path == "/web"


@pytest.mark.bears("X5-05", "X5-06", "X5-07")
def test_an_authority_may_be_an_svid_but_without_a_path(judge: Judge) -> None:
    def under(uri: str) -> X509Svid:
        signer = judge.pki.intermediate(judge.root, sans=[URI(uri)])
        return judge.verify(judge.pki.leaf(signer), signer)

    assert under("spiffe://example.org").id.path == "/web"
    assert under("https://ca.example/").id.path == "/web"
    # X5-07 is a SHOULD for issuers: what counts is that our own bundle's root vouches for it.
    assert under("spiffe://upstream.example").id.path == "/web"
    assert code_of(lambda: under("spiffe://example.org/ca")) == "svid_issuer_id"
    assert code_of(lambda: under("spiffe://example.org:1")) == "svid_issuer_id"


@pytest.mark.bears("X5-08", "X5-09", "X5-18")
def test_an_authority_is_never_a_leaf(judge: Judge) -> None:
    assert judge.refused(ca=True) == "svid_leaf_is_ca"
    assert judge.refused(ca=True, usage=("digital_signature", "key_cert_sign")) == "svid_leaf_is_ca"
    assert code_of(lambda: judge.verify(judge.root)) == "svid_uri_count"
    signer = judge.pki.intermediate(judge.root, sans=[URI("spiffe://example.org/ca")])
    assert code_of(lambda: judge.verify(signer)) == "svid_leaf_is_ca"


@pytest.mark.bears("X5-09")
def test_basic_constraints_may_be_missing_in_a_leaf(judge: Judge) -> None:
    assert judge.leaf(ca=None).id.path == "/web"
    assert judge.leaf(basic_critical=False).id.path == "/web"


@pytest.mark.bears("X5-09")
@pytest.mark.parametrize("changes", [{"ca": False}, {"ca": None}, {"basic_critical": False}])
def test_an_intermediate_is_a_critical_authority(judge: Judge, changes: dict[str, Any]) -> None:
    signer = judge.pki.intermediate(judge.root, **changes)
    assert code_of(lambda: judge.verify(judge.pki.leaf(signer), signer)) == "svid_issuer_not_ca"


@pytest.mark.bears("X5-13", "X5-12")
@pytest.mark.parametrize("usage", [None, (), ("digital_signature", "crl_sign")])
def test_an_intermediate_may_sign_certificates(judge: Judge, usage: Any) -> None:
    signer = judge.pki.intermediate(judge.root, usage=usage)
    assert code_of(lambda: judge.verify(judge.pki.leaf(signer), signer)) == "svid_issuer_key_usage"


@pytest.mark.bears("X5-13")
def test_a_root_without_the_right_to_sign_is_no_root(judge: Judge) -> None:
    for changes in ({"usage": ("crl_sign",)}, {"ca": False}, {"ca": None}):
        root = judge.pki.root(**changes)
        bundles = BundleSet.of(Bundle(DOMAIN, (root.certificate,)))
        leaf = judge.pki.leaf(root)
        assert code_of(lambda: verify_x509_svid([leaf.der], bundles, now=judge.pki.now)) == "svid_untrusted"  # noqa: B023


@pytest.mark.bears("X5-12", "X5-14", "X5-18")
@pytest.mark.parametrize(
    "changes",
    [
        {"usage": None},
        {"usage_critical": False},
        {"usage": ("key_encipherment",)},
        {"usage": ("digital_signature", "key_cert_sign")},
        {"usage": ("digital_signature", "crl_sign")},
    ],
)
def test_the_leafs_key_usage_is_critical_and_for_signatures(judge: Judge, changes: dict[str, Any]) -> None:
    assert judge.refused(**changes) == "svid_key_usage"


@pytest.mark.bears("X5-14")
def test_the_leafs_key_may_also_encipher_and_agree(judge: Judge) -> None:
    assert judge.leaf(usage=("digital_signature", "key_encipherment", "key_agreement")).id.path == "/web"


@pytest.mark.bears("X5-15", "X5-16")
def test_extended_key_usage_is_both_or_missing(judge: Judge) -> None:
    server, client = ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH
    assert judge.leaf(purposes=None).id.path == "/web"
    assert judge.leaf(purposes=(server, client, ExtendedKeyUsageOID.CODE_SIGNING)).id.path == "/web"
    for purposes in ((server,), (client,), (ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE,)):
        assert judge.refused(purposes=purposes) == "svid_extended_key_usage"


@pytest.mark.bears("X5-17")
def test_validity_includes_both_ends(judge: Judge) -> None:
    holder = judge.pki.leaf(judge.root, start=timedelta(0), end=timedelta(seconds=10))
    assert judge.verify(holder).id.path == "/web"
    assert judge.verify(holder, after=timedelta(seconds=10)).id.path == "/web"
    assert code_of(lambda: judge.verify(holder, after=timedelta(seconds=11))) == "svid_expired"
    assert code_of(lambda: judge.verify(holder, after=timedelta(seconds=-1))) == "svid_not_yet_valid"


@pytest.mark.bears("X5-17", "I02")
def test_the_authority_is_in_the_bundle_of_the_leafs_own_trust_domain(judge: Judge) -> None:
    theirs = judge.pki.root("theirs")
    bundles = BundleSet.of(
        Bundle(DOMAIN, (judge.root.certificate,)),
        Bundle(TrustDomain("other.example"), (theirs.certificate,)),
        Bundle(TrustDomain("empty.example")),
    )

    def verify(issuer: Any, uri: str) -> X509Svid:
        return verify_x509_svid([judge.pki.leaf(issuer, uri).der], bundles, now=judge.pki.now)

    assert verify(theirs, "spiffe://other.example/web").authority == theirs.certificate
    # What Python's ssl would accept: a root of the merged store signs an ID of another trust domain.
    assert code_of(lambda: verify(theirs, "spiffe://example.org/web")) == "svid_untrusted"
    assert code_of(lambda: verify(judge.root, "spiffe://other.example/web")) == "svid_untrusted"
    assert code_of(lambda: verify(judge.root, "spiffe://empty.example/web")) == "svid_untrusted"
    assert code_of(lambda: verify(judge.root, "spiffe://unknown.example/web")) == "svid_no_bundle"


@pytest.mark.bears("X5-17")
def test_a_leaf_does_not_vouch_for_itself(judge: Judge) -> None:
    lonely = judge.pki.make(
        subject="root", issuer=None, sans=[URI("spiffe://example.org/web")], usage=("digital_signature",)
    )
    assert code_of(lambda: judge.verify(lonely)) == "svid_untrusted"
    bundles = BundleSet.of(Bundle(DOMAIN, (lonely.certificate,)))
    assert code_of(lambda: verify_x509_svid([lonely.der], bundles, now=judge.pki.now)) == "svid_untrusted"


@pytest.mark.parametrize("kind", ["P-256", "P-384", "P-521", "RSA-2048", "Ed25519"])
def test_strong_keys_are_accepted_everywhere(pki: Any, kind: str) -> None:
    root = pki.root(key=pki.key(kind))
    signer = pki.intermediate(root, key=pki.key(kind))
    chain = [pki.leaf(signer, key=pki.key(kind)).der, signer.der]
    assert verify_x509_svid(chain, BundleSet.of(Bundle(DOMAIN, (root.certificate,))), now=pki.now).id.path == "/web"


@pytest.mark.parametrize("kind", ["P-192", "RSA-1024"])
def test_weak_keys_are_refused_everywhere(judge: Judge, kind: str) -> None:
    pki, weak = judge.pki, judge.pki.key(kind)
    assert judge.refused(key=weak) == "svid_weak_key"
    signer = pki.intermediate(judge.root, key=weak)
    assert code_of(lambda: judge.verify(pki.leaf(signer), signer)) == "svid_weak_key"
    root = pki.root(key=weak)
    bundles = BundleSet.of(Bundle(DOMAIN, (root.certificate,)))
    assert code_of(lambda: verify_x509_svid([pki.leaf(root).der], bundles, now=pki.now)) == "svid_untrusted"


def test_old_digests_are_refused(judge: Judge) -> None:
    assert judge.refused(digest=hashes.SHA224()) == "svid_weak_signature"


@pytest.mark.bears("X5-17")
def test_unknown_critical_extensions_are_refused(judge: Judge) -> None:
    unknown = x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3.4"), b"\x05\x00")
    assert judge.refused(extra=[(unknown, True)]) == "svid_critical_extension"
    assert judge.leaf(extra=[(unknown, False)]).id.path == "/web"
    constraints = x509.PolicyConstraints(0, None)
    assert judge.refused(extra=[(constraints, True)]) == "svid_critical_extension"
    policies = x509.CertificatePolicies([x509.PolicyInformation(x509.ObjectIdentifier("2.5.29.32.0"), None)])
    assert judge.leaf(extra=[(policies, True)]).id.path == "/web"
    names = x509.NameConstraints([URI("example.org")], None)
    assert judge.refused(extra=[(names, True)]) == "svid_leaf_is_ca"


@pytest.mark.parametrize("chain", [[], [b""], [b"x"], [b"\x30\x00"], [b"\x30" * 100], [b"0" * (MAX_CERTIFICATE + 1)]])
def test_rubbish_is_refused_with_our_error(judge: Judge, chain: list[bytes]) -> None:
    with pytest.raises(InvalidSvid):
        verify_x509_svid(chain, judge.bundles, now=judge.pki.now)


def test_a_naive_time_is_a_defect_of_the_caller(judge: Judge) -> None:
    holder = judge.pki.leaf(judge.root)
    with pytest.raises(ValueError, match="aware"):
        verify_x509_svid([holder.der], judge.bundles, now=judge.pki.now.replace(tzinfo=None))


@pytest.mark.bears("I02")
@given(data=st.data())
def test_a_damaged_certificate_never_verifies(data: st.DataObject) -> None:
    judge = _damage_judge()
    good = _DAMAGED["leaf"]
    position = data.draw(st.integers(0, len(good) - 1))
    value = data.draw(st.integers(0, 255).filter(lambda byte: byte != good[position]))
    bad = good[:position] + bytes([value]) + good[position + 1 :]
    with pytest.raises(InvalidSvid):
        verify_x509_svid([bad], judge.bundles, now=judge.pki.now)


_DAMAGED: dict[str, Any] = {}


def _damage_judge() -> Judge:
    if not _DAMAGED:
        from tests.unit.spiffe.conftest import NOW, Pki  # noqa: PLC0415 - hypothesis and function fixtures do not mix

        judge = Judge(Pki(NOW))
        _DAMAGED.update(judge=judge, leaf=judge.pki.leaf(judge.root).der)
    return _DAMAGED["judge"]


def test_the_id_of_an_unverified_certificate(judge: Judge) -> None:
    assert parse_x509_svid_id(judge.pki.leaf(judge.root).certificate) == SpiffeId("spiffe://example.org/web")
    assert parse_x509_svid_id(judge.pki.leaf(judge.root, "spiffe://example.org").certificate) == DOMAIN.id
    assert code_of(lambda: parse_x509_svid_id(judge.root.certificate)) == "svid_uri_count"


def test_der_is_cut_at_its_lengths(judge: Judge) -> None:
    pieces = [judge.root.der, judge.pki.leaf(judge.root).der, judge.root.der]
    assert split_der(b"".join(pieces)) == pieces
    assert split_der(b"") == []
    assert split_der(b"\x30\x00\x30\x01\xff") == [b"\x30\x00", b"\x30\x01\xff"]


@pytest.mark.parametrize(
    "blob",
    [
        b"\x30",
        b"\x31\x00",
        b"\x30\x01",
        b"\x30\x80\x00\x00",
        b"\x30\x81\x01\x00",
        b"\x30\x82\x00\x80" + bytes(128),
        b"\x30\x82\x00",
        b"\x30\x84\x00\x00\x00\x01\x00",
        b"\x30\x83\x10\x00\x00" + bytes(0x100000),
        b"\x30\x00\x00",
        b"\x30\x00-----BEGIN CERTIFICATE-----",
    ],
)
def test_der_with_a_bad_length_is_refused(blob: bytes) -> None:
    assert code_of(lambda: split_der(blob)) == "svid_malformed"


@given(st.binary(max_size=64))
def test_cutting_loses_nothing(blob: bytes) -> None:
    try:
        pieces = split_der(blob)
    except InvalidSvid:
        return
    assert b"".join(pieces) == blob


def test_text_is_not_der(judge: Judge) -> None:
    pem = judge.root.certificate.public_bytes(Encoding.PEM)
    assert code_of(lambda: split_der(pem)) == "svid_malformed"
