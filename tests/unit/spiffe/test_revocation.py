"""What is taken back is refused, by whoever holds the bundle; what cannot be believed is said so."""

from datetime import timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from broker.errors import InvalidBundle, InvalidSvid
from broker.keys.local import generated
from broker.server.authority.crl import CrlIssuer, sign_crl
from broker.server.authority.profile import Leaf
from broker.server.authority.x509 import X509Authority
from broker.spiffe import Bundle, BundleSet, SpiffeId, verify_x509_svid
from broker.spiffe.revocation import MAX_CRL, MAX_CRLS, NOTHING, Revocations, key_of, read_crls
from tests.unit.server.authority.test_crl import issuer, revoked
from tests.unit.server.authority.world import DOMAIN, NOW, authority, root_der


def test_nothing_is_revoked_by_nothing():
    ca = issuer()
    assert len(NOTHING) == len(Revocations({b"key": frozenset()})) == 0
    assert Revocations({b"key": frozenset()}) == NOTHING
    assert not NOTHING.names_any((ca.certificate, ca.certificate))
    assert len(Revocations({b"a": frozenset({1, 2}), b"b": frozenset({1})})) == 3


def test_a_list_counts_only_under_the_authority_that_signed_it():
    ca, namesake, foreign = issuer(), issuer(), issuer(serial=5)
    row = sign_crl(ca, [revoked(1)], None, NOW)
    assert read_crls([row.der], [namesake.certificate, ca.certificate]).serials == {key_of(ca.certificate): {1}}
    elsewhere = read_crls([row.der], [foreign.certificate])
    assert (elsewhere.serials, len(elsewhere)) == ({}, 1)  # kept until a path shows that authority
    with pytest.raises(InvalidBundle) as refused:
        read_crls([row.der], [namesake.certificate])
    assert refused.value.reason == "crl_untrusted"
    with pytest.raises(InvalidBundle) as refused:
        read_crls([row.der[:-1] + bytes([row.der[-1] ^ 1])], [ca.certificate])
    assert refused.value.reason == "crl_untrusted"


@pytest.mark.parametrize(
    ("lists", "code"),
    [
        ([b""], "crl_malformed"),
        ([b"\x30\x00"], "crl_malformed"),
        ([b"x" * (MAX_CRL + 1)], "crl_too_large"),
        ([b""] * (MAX_CRLS + 1), "crl_too_large"),
    ],
)
def test_garbage_is_said_to_be_garbage(lists, code):
    with pytest.raises(InvalidBundle) as refused:
        read_crls(lists, [issuer().certificate])
    assert refused.value.reason == code


def test_only_the_named_leaf_is_refused():
    signer = authority()
    root = x509.load_der_x509_certificate(root_der(signer.signer))
    bundle = Bundle(DOMAIN, (root,))
    key = ec.generate_private_key(ec.SECP256R1()).public_key()
    one, two = (
        signer.sign(Leaf(SpiffeId("spiffe://example.org/a"), serial, signer.validity(NOW, timedelta(hours=1))), key)
        for serial in (11, 12)
    )
    bundles = BundleSet.of(bundle.with_revoked(Revocations({key_of(root): frozenset({11})})))
    assert verify_x509_svid([two], bundles, now=NOW).issuer == root
    with pytest.raises(InvalidSvid) as refused:
        verify_x509_svid([one], bundles, now=NOW)
    assert refused.value.reason == "svid_revoked"
    assert bundle != bundle.with_revoked(Revocations({key_of(root): frozenset({11})}))
    # The document does not speak of it.
    assert bundle.to_json() == bundle.with_revoked(Revocations({key_of(root): frozenset({11})})).to_json()


@pytest.mark.bears("2.5")
def test_an_authority_below_the_bundle_is_believed_where_it_stands_in_the_path():
    top, below_key, other_key = authority(), generated("below"), generated("other")
    root = x509.load_der_x509_certificate(root_der(top.signer))
    life = top.validity(NOW, timedelta(hours=2))
    chain = top.certify(DOMAIN, below_key.public_key, 77, life)
    below = X509Authority.of("below", chain[0], below_key, is_root=False)
    key = ec.generate_private_key(ec.SECP256R1()).public_key()
    leaf, other = (
        below.issue(Leaf(SpiffeId("spiffe://example.org/a"), serial, below.validity(NOW, timedelta(hours=1))), key)
        for serial in (11, 12)
    )
    issuing = CrlIssuer("below", x509.load_der_x509_certificate(chain[0]), below_key)
    stranger = CrlIssuer("below", issuing.certificate, other_key)  # says that it is that authority
    for signer, is_refused in ((issuing, True), (stranger, False)):
        found = read_crls([sign_crl(signer, [revoked(11)], None, NOW).der], [root])
        bundles = BundleSet.of(Bundle(DOMAIN, (root,)).with_revoked(found))
        assert verify_x509_svid(other, bundles, now=NOW).serial == 12
        if is_refused:
            with pytest.raises(InvalidSvid) as refused:
                verify_x509_svid(leaf, bundles, now=NOW)
            assert refused.value.reason == "svid_revoked"
        else:
            assert verify_x509_svid(leaf, bundles, now=NOW).serial == 11
    # The root takes the authority itself back.
    bundles = BundleSet.of(Bundle(DOMAIN, (root,)).with_revoked(Revocations({key_of(root): frozenset({77})})))
    with pytest.raises(InvalidSvid):
        verify_x509_svid(leaf, bundles, now=NOW)
