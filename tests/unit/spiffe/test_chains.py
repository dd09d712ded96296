"""Path validation: order, length, names, time, and bounded work."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from broker.errors import InvalidSvid
from broker.spiffe import Bundle, BundleSet, TrustDomain, X509Svid, verify_x509_svid
from broker.spiffe.chains import MAX_CHAIN, MAX_SIGNATURES
from tests.fakes.costs import Costs

DOMAIN = TrustDomain("example.org")


def code_of(act: Callable[[], object]) -> str:
    with pytest.raises(InvalidSvid) as caught:
        act()
    return caught.value.reason


def verify(pki: Any, roots: Any, *chain: Any) -> X509Svid:
    bundles = BundleSet.of(Bundle(DOMAIN, tuple(root.certificate for root in roots)))
    return verify_x509_svid([holder.der for holder in chain], bundles, now=pki.now)


def ladder(pki: Any, steps: int, **changes: Any) -> tuple[Any, list[Any]]:
    """Make a root and the chain of a leaf with that many intermediates, leaf first."""
    root = pki.root()
    signers = [root]
    for step in range(steps):
        signers.append(pki.intermediate(signers[-1], f"step {step}", **changes))
    return root, [pki.leaf(signers[-1]), *reversed(signers[1:])]


@pytest.mark.bears("X5-17", "I02")
def test_intermediates_come_in_any_order(pki: Any) -> None:
    root, (leaf, *others) = ladder(pki, 3)
    stranger = pki.root("stranger")
    for chain in (others, others[::-1], [others[1], stranger, others[2], others[0]], [*others, root], others * 2):
        svid = verify(pki, [root], leaf, *chain)
        assert svid.chain == tuple(holder.certificate for holder in (leaf, *others))
        assert svid.authority == root.certificate


def test_a_missing_intermediate_is_missed(pki: Any) -> None:
    root, (leaf, first, second) = ladder(pki, 2)
    assert code_of(lambda: verify(pki, [root], leaf, first)) == "svid_untrusted"
    assert code_of(lambda: verify(pki, [root], leaf, second)) == "svid_untrusted"
    assert code_of(lambda: verify(pki, [root], leaf)) == "svid_untrusted"


def test_the_bundle_may_hold_an_intermediate_alone(pki: Any) -> None:
    _, (leaf, first, second) = ladder(pki, 2)
    assert verify(pki, [second], leaf, first).authority == second.certificate
    assert verify(pki, [first], leaf).chain == (leaf.certificate,)


@pytest.mark.bears("X5-17")
def test_the_root_a_peer_sends_proves_nothing(pki: Any) -> None:
    root, chain = ladder(pki, 1)
    assert code_of(lambda: verify(pki, [pki.root()], *chain, root)) == "svid_untrusted"
    assert code_of(lambda: verify(pki, [], *chain, root)) == "svid_untrusted"


@pytest.mark.bears("X5-17")
def test_the_same_name_with_another_key_is_another_authority(pki: Any) -> None:
    ours, forged = pki.root("root"), pki.root("root")
    assert code_of(lambda: verify(pki, [ours], pki.leaf(forged))) == "svid_untrusted"
    assert verify(pki, [ours, forged, pki.root("root")], pki.leaf(forged)).authority == forged.certificate


def test_key_identifiers_are_only_hints(pki: Any) -> None:
    roots = [pki.root("root", identifiers=False) for _ in range(5)]
    assert verify(pki, roots, pki.leaf(roots[4])).authority == roots[4].certificate
    liar = pki.root("root", identifiers=False)
    hint = x509.AuthorityKeyIdentifier(b"wrong" * 4, None, None)
    assert (
        verify(pki, [pki.root("root"), liar], pki.leaf(liar, identifiers=False, extra=[(hint, False)])).id.path
        == "/web"
    )


@pytest.mark.bears("X5-10", "X5-17")
def test_path_lengths_hold(pki: Any) -> None:
    root = pki.root(path_length=1)
    first = pki.intermediate(root, "first", path_length=0)
    second = pki.intermediate(first, "second")
    assert verify(pki, [root], pki.leaf(first), first).id.path == "/web"
    assert code_of(lambda: verify(pki, [root], pki.leaf(second), second, first)) == "svid_path_length"
    wide = pki.intermediate(root, "wide")
    third = pki.intermediate(wide, "third")
    assert code_of(lambda: verify(pki, [root], pki.leaf(third), third, wide)) == "svid_path_length"


@pytest.mark.bears("X5-10")
def test_self_issued_certificates_do_not_count_for_the_length(pki: Any) -> None:
    root = pki.root("same", path_length=0)
    renewed = pki.intermediate(root, "same")
    assert verify(pki, [root], pki.leaf(renewed), renewed).id.path == "/web"


@pytest.mark.bears("X5-17")
@pytest.mark.parametrize(
    ("start", "end", "code"),
    [
        (timedelta(days=-2), timedelta(seconds=-1), "svid_expired"),
        (timedelta(seconds=1), timedelta(days=2), "svid_not_yet_valid"),
    ],
)
def test_every_certificate_of_the_path_is_valid_now(pki: Any, start: timedelta, end: timedelta, code: str) -> None:
    root = pki.root()
    signer = pki.intermediate(root, start=start, end=end)
    assert code_of(lambda: verify(pki, [root], pki.leaf(signer), signer)) == code
    dead = pki.root("dead", start=start, end=end)
    assert code_of(lambda: verify(pki, [dead], pki.leaf(dead))) == code


def test_an_expired_path_does_not_hide_a_valid_one(pki: Any) -> None:
    root, key = pki.root(), pki.key()
    dead = pki.intermediate(root, "signer", key=key, start=timedelta(days=-2), end=timedelta(days=-1))
    alive = pki.intermediate(root, "signer", key=key)
    leaf = pki.leaf(alive)
    for chain in ((dead, alive), (alive, dead)):
        assert verify(pki, [root], leaf, *chain).chain[1] == alive.certificate


def test_what_ends_first_ends_the_svid(pki: Any) -> None:
    root = pki.root(end=timedelta(minutes=5))
    svid = verify(pki, [root], pki.leaf(root, end=timedelta(hours=1)))
    assert svid.expires_at == root.certificate.not_valid_after_utc < svid.not_after


def test_an_intermediate_for_other_purposes_does_not_sign_svids(pki: Any) -> None:
    root = pki.root()
    for purposes, good in (
        ((ExtendedKeyUsageOID.CODE_SIGNING,), False),
        ((ExtendedKeyUsageOID.SERVER_AUTH,), False),
        ((ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH), True),
        ((ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE,), True),
    ):
        signer = pki.intermediate(root, purposes=purposes)
        chain = (pki.leaf(signer), signer)
        if good:
            assert verify(pki, [root], *chain).id.path == "/web"
        else:
            assert code_of(lambda: verify(pki, [root], *chain)) == "svid_issuer_key_usage"  # noqa: B023


def test_an_authority_without_a_name_signs_nothing(pki: Any) -> None:
    root = pki.root()
    nameless = pki.intermediate(root, None)
    assert code_of(lambda: verify(pki, [root], pki.leaf(nameless), nameless)) == "svid_malformed"


def test_a_trust_anchor_is_taken_as_it_is(pki: Any) -> None:
    # Roots made by hand often leave key usage and identifiers out.
    root = pki.root(usage=None, identifiers=False)
    assert verify(pki, [root], pki.leaf(root)).id.path == "/web"


@pytest.mark.bears("JW16", "I02")
def test_chains_are_short(pki: Any) -> None:
    root, chain = ladder(pki, MAX_CHAIN - 1)
    assert len(chain) == MAX_CHAIN
    assert len(verify(pki, [root], *chain).chain) == MAX_CHAIN
    assert code_of(lambda: verify(pki, [root], *chain, root)) == "svid_chain_length"
    assert code_of(lambda: verify(pki, [root], *([chain[0]] * 1000))) == "svid_chain_length"


@pytest.mark.bears("I02")
def test_authorities_that_all_vouch_for_each_other_cost_little(pki: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # Seven certificates of one name and key: every order of them is a path, and none ends at our root.
    key = pki.key()
    first = pki.root("ring", key=key)
    ring = [pki.intermediate(first, "ring", key=key) for _ in range(MAX_CHAIN - 1)]
    leaf = pki.leaf(ring[0])
    costs = Costs.of(b"", monkeypatch)
    assert code_of(lambda: verify(pki, [pki.root("other")], leaf, *ring)) == "svid_untrusted"
    assert costs.signatures == MAX_SIGNATURES + 1  # the last one is refused


@pytest.mark.bears("I02")
def test_many_roots_of_one_name_cost_little(pki: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    key = pki.key()
    roots = [pki.root("root", key=key, identifiers=False) for _ in range(100)]
    stranger = pki.root("root", identifiers=False)
    costs = Costs.of(b"", monkeypatch)
    assert code_of(lambda: verify(pki, roots, pki.leaf(stranger, identifiers=False))) == "svid_untrusted"
    assert costs.signatures == MAX_SIGNATURES + 1  # the last one is refused
