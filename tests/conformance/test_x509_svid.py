"""X509-SVID.md, line by line: what the running programs issue, and what they refuse over a real TLS handshake."""

import base64
import json
from datetime import timedelta
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID

from broker.clock import SystemClock
from broker.errors import InvalidSvid
from broker.spiffe import Bundle, SpiffeId, verify_x509_svid
from broker.spiffe.x509svid import parse_x509_svid_id, split_der
from tests.conformance.house import DOMAIN, ONE, TWO, House
from tests.fakes.svid_pki import Holder

BOTH_WAYS = {ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH}


# --- what is issued -----------------------------------------------------------------------------------------------


@pytest.fixture
def leaves(house: House) -> dict[str, x509.Certificate]:
    """The leaves that this process holds, by SPIFFE ID; and the server's own, as it shows it."""
    answer = house.x509()
    chains = {one.spiffe_id: split_der(one.x509_svid) for one in answer.svids}
    return {name: x509.load_der_x509_certificate(chain[0]) for name, chain in chains.items()}


@pytest.fixture
def authorities(house: House) -> list[x509.Certificate]:
    """The server's own authorities: all but the other replica's."""
    return [one for one in house.bundles[DOMAIN].x509_authorities if one != house.replica.root.certificate]


def extension(certificate: x509.Certificate, kind: Any) -> x509.Extension[Any]:
    return certificate.extensions.get_extension_for_class(kind)


def names(certificate: x509.Certificate, kind: Any) -> list[str]:
    found: list[str] = extension(certificate, x509.SubjectAlternativeName).value.get_values_for_type(kind)
    return found


@pytest.mark.bears("X5-01")
def test_a_leaf_has_exactly_one_uri(leaves: dict[str, x509.Certificate]) -> None:
    assert {name: names(leaf, x509.UniformResourceIdentifier) for name, leaf in leaves.items()} == {
        ONE: [ONE], TWO: [TWO],
    }  # fmt: skip


@pytest.mark.bears("X5-02")
def test_dns_names_stand_beside_it(house: House, leaves: dict[str, x509.Certificate]) -> None:
    assert names(leaves[TWO], x509.DNSName) == ["two.dev.test"]
    assert names(leaves[ONE], x509.DNSName) == []
    more = [x509.UniformResourceIdentifier(ONE), x509.DNSName("a.test"), x509.RFC822Name("a@a.test")]
    assert house.present(house.replica.leaf(sans=more)).status == 200


@pytest.mark.bears("X5-03")
def test_a_leaf_has_a_path(leaves: dict[str, x509.Certificate]) -> None:
    assert all(parse_x509_svid_id(leaf).path for leaf in leaves.values())


@pytest.mark.bears("X5-04")
def test_without_a_subject_the_names_are_critical(leaves: dict[str, x509.Certificate]) -> None:
    assert not list(leaves[ONE].subject)
    assert extension(leaves[ONE], x509.SubjectAlternativeName).critical
    # With a DNS name there is a subject, as SPIRE has it, and then nobody needs to understand the names.
    assert [part.value for part in leaves[TWO].subject] == ["two.dev.test"]
    assert not extension(leaves[TWO], x509.SubjectAlternativeName).critical


@pytest.mark.bears("X5-05", "X5-06", "X5-07")
def test_an_authority_has_the_id_of_the_trust_domain(authorities: list[x509.Certificate]) -> None:
    assert authorities
    assert {parse_x509_svid_id(one) for one in authorities} == {DOMAIN.id}


@pytest.mark.bears("X5-09")
def test_authorities_are_marked_as_such_and_leaves_are_not(
    leaves: dict[str, x509.Certificate], authorities: list[x509.Certificate]
) -> None:
    said = [extension(one, x509.BasicConstraints) for one in (*leaves.values(), *authorities)]
    assert [one.value.ca for one in said] == [False, False, *(True for _ in authorities)]
    assert all(one.critical for one in said)


@pytest.mark.bears("X5-10")
def test_an_authority_bounds_its_chains(house: House, authorities: list[x509.Certificate]) -> None:
    assert all(extension(one, x509.BasicConstraints).value.path_length is not None for one in authorities)
    flat = house.replica.pki.intermediate(house.replica.root, "flat", path_length=0)
    below = house.replica.pki.intermediate(flat, "below")
    assert house.present(house.replica.leaf(issuer=flat), flat).status == 200
    assert house.present(house.replica.leaf(issuer=below), below, flat).status != 200


@pytest.mark.bears("X5-11")
def test_name_constraints_are_kept(house: House, authorities: list[x509.Certificate]) -> None:
    # None of ours has them, since many libraries refuse them. Of others they count.
    for one in authorities:
        with pytest.raises(x509.ExtensionNotFound):
            extension(one, x509.NameConstraints)
    for host, accepted in (("dev.test", True), ("other.test", False)):
        only = x509.NameConstraints([x509.UniformResourceIdentifier(host)], None)
        bound = house.replica.pki.intermediate(house.replica.root, f"only {host}", extra=[(only, True)])
        assert (house.present(house.replica.leaf(issuer=bound), bound).status == 200) is accepted


@pytest.mark.bears("X5-12", "X5-13", "X5-14")
def test_key_usage_is_critical_and_no_wider_than_needed(
    leaves: dict[str, x509.Certificate], authorities: list[x509.Certificate]
) -> None:
    def used(certificate: x509.Certificate) -> set[str]:
        usage = extension(certificate, x509.KeyUsage)
        assert usage.critical
        return {
            name
            for name in ("digital_signature", "key_cert_sign", "crl_sign", "key_encipherment", "key_agreement")
            if getattr(usage.value, name)
        }

    assert [used(leaf) for leaf in leaves.values()] == [{"digital_signature"}] * 2
    assert all(used(one) == {"key_cert_sign", "crl_sign"} for one in authorities)


@pytest.mark.bears("X5-15", "X5-16")
def test_a_leaf_is_for_both_ends_of_a_connection(leaves: dict[str, x509.Certificate]) -> None:
    assert all(set(extension(leaf, x509.ExtendedKeyUsage).value) == BOTH_WAYS for leaf in leaves.values())


@pytest.mark.bears("X5-21", "X5-22")
def test_an_authority_in_a_bundle_document(house: House, authorities: list[x509.Certificate]) -> None:
    keys = [key for key in json.loads(house.bundles[DOMAIN].to_json())["keys"] if key["use"] == "x509-svid"]
    shown = [x509.load_der_x509_certificate(base64.b64decode(one)) for key in keys for one in key["x5c"]]
    assert [len(key["x5c"]) for key in keys] == [1] * len(keys)
    assert all("kid" not in key for key in keys)
    assert {one.public_bytes(Encoding.DER) for one in shown} == set(house.roots)
    for one in authorities:
        assert one.subject == one.issuer
        one.verify_directly_issued_by(one)


@pytest.mark.bears("X5-23")
def test_only_the_first_certificate_of_an_entry_counts(house: House) -> None:
    document = json.loads(house.bundles[DOMAIN].to_json())
    good = next(key for key in document["keys"] if key["use"] == "x509-svid")
    second = base64.b64encode(house.replica.pki.root("second").der).decode()
    variants = [{"x5c": [good["x5c"][0], second]}, {"x5c": []}, {"x5c": None}]
    counts = []
    for change in variants:
        entry = {name: value for name, value in (good | change).items() if value is not None}
        counts.append(len(Bundle.parse(DOMAIN, json.dumps({"keys": [entry]})).x509_authorities))
    assert counts == [1, 0, 0]


# --- what is refused ----------------------------------------------------------------------------------------------


def verdicts(house: House, leaf: Holder, *chain: Holder) -> tuple[str, str]:
    """Ask the verifier of a workload, and the server's TLS port; empty means accepted."""
    ours = ""
    try:
        ders = [one.der for one in (leaf, *chain)]
        verify_x509_svid(ders, house.bundles, now=SystemClock().now())
    except InvalidSvid as error:
        ours = error.reason
    answer = house.present(leaf, *chain)
    # A status of 0: OpenSSL itself has ended the handshake, before anybody of us was asked.
    return ours, "" if answer.status == 200 else answer.code or "handshake"


def refused_alike(house: House, leaf: Holder, code: str, *chain: Holder) -> None:
    ours, port = verdicts(house, leaf, *chain)
    assert ours == code
    assert port in {code, "handshake"}


@pytest.mark.bears("X5-08", "X5-18")
@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"ca": True, "usage": ("digital_signature", "key_cert_sign")}, "svid_leaf_is_ca"),
        ({"ca": True}, "svid_leaf_is_ca"),
        ({"usage": ("digital_signature", "key_cert_sign")}, "svid_key_usage"),
        ({"usage": ("digital_signature", "crl_sign")}, "svid_key_usage"),
    ],
)
def test_who_may_sign_may_not_authenticate(house: House, changes: dict[str, Any], code: str) -> None:
    refused_alike(house, house.replica.leaf(**changes), code)


@pytest.mark.bears("X5-08")
def test_an_authority_does_not_authenticate(house: House) -> None:
    assert verdicts(house, house.replica.root)[0]
    assert house.present(house.replica.root).status != 200


@pytest.mark.bears("X5-12", "X5-14", "X5-16", "X5-04")
@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"usage": None}, "svid_key_usage"),
        ({"usage_critical": False}, "svid_key_usage"),
        ({"usage": ("key_agreement",)}, "svid_key_usage"),
        ({"purposes": [ExtendedKeyUsageOID.CLIENT_AUTH]}, "svid_extended_key_usage"),
        ({"purposes": [ExtendedKeyUsageOID.SERVER_AUTH]}, "svid_extended_key_usage"),
        ({"subject": None}, "svid_san"),
    ],
)
def test_what_the_reference_libraries_let_through(house: House, changes: dict[str, Any], code: str) -> None:
    refused_alike(house, house.replica.leaf(**changes), code)


@pytest.mark.bears("X5-17")
def test_paths_are_validated(house: House) -> None:
    pki, root = house.replica.pki, house.replica.root
    middle = pki.intermediate(root, "middle")
    assert verdicts(house, house.replica.leaf()) == ("", "")
    assert verdicts(house, house.replica.leaf(issuer=middle), middle) == ("", "")
    refused_alike(house, house.replica.leaf(issuer=middle), "svid_untrusted")
    refused_alike(house, house.replica.leaf(end=timedelta(minutes=-1), start=timedelta(hours=-1)), "svid_expired")
    refused_alike(house, house.replica.leaf(start=timedelta(minutes=30)), "svid_not_yet_valid")
    stranger = pki.root("another replica")
    refused_alike(house, house.replica.leaf(issuer=stranger), "svid_untrusted")
    powerless = pki.intermediate(root, "powerless", ca=False)
    refused_alike(house, house.replica.leaf(issuer=powerless), "svid_issuer_not_ca", powerless)


@pytest.mark.bears("X5-13")
def test_an_issuer_without_the_right_to_sign(house: House) -> None:
    pki = house.replica.pki
    for usage in (("crl_sign",), ("digital_signature",), None):
        middle = pki.intermediate(house.replica.root, "no signer", usage=usage)
        refused_alike(house, house.replica.leaf(issuer=middle), "svid_issuer_key_usage", middle)


@pytest.mark.bears("X5-06", "X5-07")
def test_an_authority_that_is_a_workload(house: House) -> None:
    name = [x509.UniformResourceIdentifier(ONE)]
    middle = house.replica.pki.intermediate(house.replica.root, "workload", sans=name)
    refused_alike(house, house.replica.leaf(issuer=middle), "svid_issuer_id", middle)


@pytest.mark.bears("X5-19")
@pytest.mark.parametrize(
    ("uri", "code"),
    [
        (f"spiffe://{DOMAIN}", "svid_root_path"),
        (f"https://{DOMAIN}/conformance/one", "spiffe_id_wrong_scheme"),
        ("spiffe://elsewhere.test/x", "svid_no_bundle"),
    ],
)
def test_scheme_path_and_trust_domain(house: House, uri: str, code: str) -> None:
    refused_alike(house, house.replica.leaf(uri), code)


@pytest.mark.bears("X5-20")
@pytest.mark.parametrize("uris", [(ONE, TWO), (ONE, "https://dev.test/x"), (ONE, ONE)])
def test_more_than_one_uri(house: House, uris: tuple[str, ...]) -> None:
    refused_alike(house, house.replica.leaf(*uris), "svid_uri_count")


@pytest.mark.bears("X5-20")
def test_no_uri(house: House) -> None:
    refused_alike(house, house.replica.leaf(sans=[x509.DNSName("a.test")]), "svid_uri_count")
    refused_alike(house, house.replica.leaf(sans=()), "svid_uri_count")


def test_the_good_one_is_who_it_says(house: House) -> None:
    chain = [house.replica.leaf().der]
    assert verify_x509_svid(chain, house.bundles, now=SystemClock().now()).id == SpiffeId(ONE)
