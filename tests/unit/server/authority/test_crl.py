"""Revocation lists, as OpenSSL and the library read them."""

import subprocess
import sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from broker.keys.local import generated
from broker.server.authority.crl import CrlIssuer, is_due, listed, renewal, sign_crl
from broker.server.store.revocation_rows import RevokedSvid
from broker.spiffe.revocation import key_of, read_crls
from tests.unit.server.authority.world import NOW, root_der

HOUR = timedelta(hours=1)
SECOND = timedelta(seconds=1)


def issuer(name="ca", serial=1 << 120):
    signer = generated(name)
    return CrlIssuer(name, x509.load_der_x509_certificate(root_der(signer, serial=serial)), signer)


def revoked(serial, authority="ca", **fields):
    values = {
        "spiffe_id": "spiffe://example.org/a", "entry_id": "e", "not_after": NOW + HOUR, "revoked_at": NOW, "reason": 1,
    }  # fmt: skip
    return RevokedSvid(authority, f"{serial:x}", **(values | fields))


def test_it_says_what_rfc_5280_wants():
    ca = issuer()
    row = sign_crl(ca, [revoked(7), revoked(1 << 127, reason=0)], None, NOW + timedelta(milliseconds=5))
    crl = x509.load_der_x509_crl(row.der)
    assert crl.is_signature_valid(ca.certificate.public_key())
    assert crl.issuer == ca.certificate.subject
    assert (crl.last_update_utc, crl.next_update_utc) == (NOW, ca.certificate.not_valid_after_utc)
    assert crl.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number == row.number == 1
    aki = crl.extensions.get_extension_for_class(x509.AuthorityKeyIdentifier)
    assert aki.value.key_identifier.hex() == key_of(ca.certificate)
    assert not any(extension.critical for extension in crl.extensions)
    reasons = {entry.serial_number: [one.value.reason.value for one in entry.extensions] for entry in crl}
    assert reasons == {7: ["keyCompromise"], 1 << 127: []}  # unspecified is written as none
    assert crl.next_update_utc == row.next_update
    assert read_crls([row.der], [ca.certificate]).serials == {key_of(ca.certificate): {7, 1 << 127}}


def test_numbers_and_dates_never_go_back():
    ca = issuer()
    first = sign_crl(ca, [], None, NOW)
    second = sign_crl(ca, [], first, NOW - HOUR)  # the clock was put back
    assert (second.number, second.this_update) == (2, first.this_update)


def test_an_indirect_list_names_who_signed():
    ca, gone, other = issuer(), issuer("gone", 2 << 120), issuer("other", 3 << 120)
    rows = [revoked(1, "gone"), revoked(2, "other"), revoked(3, "other")]
    row = sign_crl(ca, rows, None, NOW, {"gone": gone.certificate, "other": other.certificate})
    crl = x509.load_der_x509_crl(row.der)
    point = crl.extensions.get_extension_for_class(x509.IssuingDistributionPoint)
    assert point.critical
    assert point.value.indirect_crl
    found = read_crls([row.der], [ca.certificate, gone.certificate, other.certificate])
    assert found.serials == {key_of(gone.certificate): {1}, key_of(other.certificate): {2, 3}}
    # Under a bundle that has dropped one, what that one signed is nobody's business any more.
    assert read_crls([row.der], [ca.certificate, gone.certificate]).serials == {key_of(gone.certificate): {1}}


def test_when_a_list_is_due():
    ca = issuer()
    assert is_due((), None, NOW)
    first = sign_crl(ca, [revoked(1)], None, NOW)
    assert not is_due([revoked(1)], first, NOW + HOUR)
    # Also where another server's clock, by which it was revoked, is behind.
    assert is_due([revoked(1), revoked(2, revoked_at=NOW - HOUR)], first, NOW + HOUR)
    assert renewal(first) == NOW + (first.next_update - NOW) / 2
    assert is_due([revoked(1)], first, renewal(first))
    late = replace(first, this_update=first.next_update - SECOND)
    assert renewal(late) > late.next_update  # no later than its own end is anything useful


def test_an_entry_stands_until_a_list_after_its_end_has_shown_it():
    ca, one = issuer(), revoked(1)
    first = sign_crl(ca, [one], None, NOW)
    after = sign_crl(ca, listed([one], first), first, NOW + 2 * HOUR)
    assert [entry.serial_number for entry in x509.load_der_x509_crl(after.der)] == [1]
    assert listed([one], after) == ()


@pytest.mark.bears("2.5")
def test_a_thousand_are_small(tmp_path):
    ca = issuer()
    row = sign_crl(ca, [revoked((1 << 127) + number) for number in range(1000)], None, NOW)
    assert len(row.der) < 64 * 1024
    path = tmp_path / "crl.der"
    path.write_bytes(row.der)
    root = tmp_path / "ca.pem"
    root.write_bytes(ca.certificate.public_bytes(Encoding.PEM))
    said = subprocess.run(
        ["openssl", "crl", "-inform", "DER", "-in", str(path), "-noout", "-text", "-CAfile", str(root)],
        capture_output=True, text=True, timeout=30, check=True,
    )  # fmt: skip
    assert "verify OK" in said.stdout + said.stderr
    assert said.stdout.count("Serial Number:") == 1000


def lint(tmp_path, der):
    path = tmp_path / "linted.der"
    path.write_bytes(der)
    program = Path(sys.executable).with_name("lint_crl")
    said = subprocess.run(
        [program, "lint", "-t", "CRL", "-p", "PKIX", "-s", "NOTICE", path],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    return said.returncode, said.stdout.strip() + said.stderr.strip()


def test_a_linter_finds_nothing(tmp_path):
    ca, gone = issuer(), issuer("gone", 2 << 120)
    for row in (
        sign_crl(ca, [], None, NOW),
        sign_crl(ca, [revoked(1), revoked(2, reason=0)], None, NOW),
        sign_crl(ca, [revoked(1, "gone")], None, NOW, {"gone": gone.certificate}),
    ):
        assert lint(tmp_path, row.der) == (0, "")
    # Control: it does find something in a list without its number and key identifier.
    bare = x509.CertificateRevocationListBuilder(
        issuer_name=ca.certificate.subject, last_update=NOW, next_update=NOW + HOUR
    ).sign(ec.generate_private_key(ec.SECP256R1()), hashes.SHA256())
    assert lint(tmp_path, bare.public_bytes(Encoding.DER))[0] != 0
