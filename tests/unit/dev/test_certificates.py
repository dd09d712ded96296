"""The development authority stays, its server certificates are new each time, and both vouch for loopback only."""

import ipaddress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

from broker.dev.certificates import CA_LIFE, LEAF_LIFE, Files, load_or_make_key, prepare, write_private
from broker.errors import Misconfigured

NOW = datetime(2026, 6, 1, tzinfo=UTC)


def loaded(path: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate(path.read_bytes())


@pytest.mark.parametrize("host", [x509.IPAddress(ipaddress.ip_address("127.0.0.1")), x509.DNSName("localhost")])
def test_it_verifies_for_loopback(tmp_path: Path, host: x509.IPAddress | x509.DNSName) -> None:
    files = Files(tmp_path)
    prepare(files, NOW)
    verifier = PolicyBuilder().store(Store([loaded(files.ca)])).time(NOW).build_server_verifier(host)
    assert verifier.verify(loaded(files.leaf), [])
    elsewhere = PolicyBuilder().store(Store([loaded(files.ca)])).time(NOW).build_server_verifier(x509.DNSName("a.test"))
    with pytest.raises(VerificationError):
        elsewhere.verify(loaded(files.leaf), [])


def test_the_authority_stays_until_its_end_is_near(tmp_path: Path) -> None:
    files = Files(tmp_path)
    prepare(files, NOW)
    first, leaf = loaded(files.ca), loaded(files.leaf)
    prepare(files, NOW + timedelta(days=1))
    assert loaded(files.ca) == first
    assert loaded(files.leaf) != leaf
    prepare(files, NOW + CA_LIFE - LEAF_LIFE)
    assert loaded(files.ca) != first


def test_keys_are_private(tmp_path: Path) -> None:
    files = Files(tmp_path)
    prepare(files, NOW)
    load_or_make_key(files.signing_key)
    for key in (files.ca_key, files.leaf_key, files.signing_key):
        assert key.stat().st_mode & 0o777 == 0o600


def test_a_key_is_made_once(tmp_path: Path) -> None:
    path = tmp_path / "k"
    assert load_or_make_key(path).private_numbers() == load_or_make_key(path).private_numbers()
    write_private(path, b"nonsense")
    with pytest.raises(Misconfigured, match="no P-256 key"):
        load_or_make_key(path)
