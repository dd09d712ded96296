import ipaddress
import secrets
import shutil
import subprocess
from datetime import timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding

from broker.errors import Unavailable
from broker.keys.local import generated
from broker.server.authority import profile
from broker.server.authority.profile import Leaf
from broker.server.authority.x509 import X509Authority
from broker.spiffe import Bundle, BundleSet, SpiffeId, verify_x509_svid
from tests.unit.server.authority.world import DOMAIN, NOW, authority, root_der

HOUR = timedelta(hours=1)
APP = SpiffeId("spiffe://example.org/app")
P256, P384 = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP384R1())
RSA = rsa.generate_private_key(65537, 2048)


@pytest.fixture
def root():
    signer = generated("ca")
    der = root_der(signer)
    return X509Authority.of("ca", der, signer), x509.load_der_x509_certificate(der)


def leaf(under, spiffe_id=APP, ttl=HOUR, **fields):
    return Leaf(spiffe_id, secrets.randbits(128), under.validity(NOW, ttl), **fields)


def extension(certificate, kind):
    return certificate.extensions.get_extension_for_class(kind)


@pytest.mark.bears("X5-05", "X5-06", "X5-07", "X5-09", "X5-12", "X5-13")
def test_an_authority_is_an_svid_of_the_trust_domain_that_only_signs(root):
    _, certificate = root
    constraints = extension(certificate, x509.BasicConstraints)
    usage = extension(certificate, x509.KeyUsage)
    assert constraints.critical
    assert (constraints.value.ca, constraints.value.path_length) == (True, profile.NESTING)
    assert usage.critical
    assert usage.value.key_cert_sign
    assert usage.value.crl_sign
    assert not usage.value.digital_signature
    names = extension(certificate, x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == ["spiffe://example.org"]
    assert len(certificate.subject) > 0


@pytest.mark.bears("X5-01", "X5-04", "X5-09", "X5-12", "X5-14", "X5-15", "X5-16", "I07")
def test_a_leaf_says_what_the_standard_asks_and_nothing_else(root):
    under, _ = root
    certificate = x509.load_der_x509_certificate(under.sign(leaf(under), P256.public_key()))
    usage = extension(certificate, x509.KeyUsage)
    assert usage.critical
    assert usage.value.digital_signature
    assert not any((usage.value.key_cert_sign, usage.value.crl_sign, usage.value.key_agreement))
    assert not extension(certificate, x509.BasicConstraints).value.ca
    assert set(extension(certificate, x509.ExtendedKeyUsage).value) == {
        x509.ExtendedKeyUsageOID.SERVER_AUTH,
        x509.ExtendedKeyUsageOID.CLIENT_AUTH,
    }
    names = extension(certificate, x509.SubjectAlternativeName)
    assert names.critical
    assert len(certificate.subject) == 0
    assert names.value.get_values_for_type(x509.UniformResourceIdentifier) == [str(APP)]
    assert certificate.not_valid_before_utc == NOW - profile.BACKDATE
    assert certificate.not_valid_after_utc == NOW + HOUR
    extension(certificate, x509.AuthorityKeyIdentifier)
    extension(certificate, x509.SubjectKeyIdentifier)


def test_the_first_dns_name_is_the_common_name_if_it_fits(root):
    under, _ = root
    named = x509.load_der_x509_certificate(
        under.sign(leaf(under, dns_names=("a.example.org", "b.example.org")), P256.public_key())
    )
    assert named.subject.rfc4514_string() == "CN=a.example.org"
    assert not extension(named, x509.SubjectAlternativeName).critical
    long_name = ".".join(["a" * 60, "example"])
    unnamed = x509.load_der_x509_certificate(under.sign(leaf(under, dns_names=(long_name,)), P256.public_key()))
    assert len(unnamed.subject) == 0
    assert extension(unnamed, x509.SubjectAlternativeName).critical


@pytest.mark.bears("I07")
def test_a_leaf_never_outlives_its_authority():
    under = authority(ttl=timedelta(minutes=10))
    assert under.validity(NOW, HOUR).not_after == NOW + timedelta(minutes=10)
    with pytest.raises(Unavailable):
        under.validity(NOW + timedelta(minutes=10), HOUR)
    longer = Leaf(APP, 1, profile.Validity(NOW, NOW + timedelta(minutes=11)))
    with pytest.raises(Unavailable):
        under.sign(longer, P256.public_key())


def test_a_leaf_does_not_begin_before_its_authority():
    under = authority(now=NOW)
    assert under.validity(NOW - profile.BACKDATE + timedelta(seconds=1), HOUR).not_before == NOW - profile.BACKDATE


def test_a_serial_number_is_positive():
    assert profile.serial_number(0) == 1
    assert profile.serial_number((1 << 128) - 1) == (1 << 128) - 1


@pytest.mark.parametrize("key", [P256, P384, RSA], ids=["p256", "p384", "rsa"])
@pytest.mark.parametrize("dns_names", [(), ("a.example",), ("x" * 60 + ".example", "b.example")])
@pytest.mark.parametrize("serial", [1, 127, 128, 255, 256, (1 << 127), (1 << 128) - 1])
def test_the_fast_encoding_is_the_librarys_byte_for_byte(root, key, dns_names, serial):
    under, _ = root
    for path in ("/a", "/" + "a" * 120, "/" + "a" * 1900):
        one = Leaf(
            SpiffeId.of(DOMAIN, path),
            serial,
            under.validity(NOW, HOUR),
            dns_names,
            (ipaddress.ip_address("127.0.0.1"), ipaddress.ip_address("::1")),
        )
        certificate = under.signer.certify(profile.leaf_certificate(one, key.public_key(), under.issuer))
        assert certificate.tbs_certificate_bytes == under.form.to_be_signed(one, key.public_key())


def test_the_fast_encoding_writes_times_after_2049():
    under = authority(now=NOW.replace(year=2049, month=12, day=31, hour=23, minute=30), ttl=timedelta(hours=9))
    one = Leaf(APP, 7, under.issuer.validity)
    certificate = under.signer.certify(profile.leaf_certificate(one, P256.public_key(), under.issuer))
    assert certificate.tbs_certificate_bytes == under.form.to_be_signed(one, P256.public_key())


def test_our_own_verifier_accepts_it(root):
    under, certificate = root
    bundles = BundleSet.of(Bundle(DOMAIN, (certificate,)))
    assert verify_x509_svid((under.sign(leaf(under), P256.public_key()),), bundles, now=NOW).id == APP


@pytest.mark.bears("I05", "X5-17")
@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed")
@pytest.mark.parametrize("dns_names", [(), ("a.example",)])
def test_openssl_accepts_it_by_the_letter(root, tmp_path, dns_names):
    under, certificate = root
    (tmp_path / "root.pem").write_bytes(certificate.public_bytes(Encoding.PEM))
    der = under.sign(leaf(under, dns_names=dns_names), P256.public_key())
    (tmp_path / "leaf.pem").write_bytes(x509.load_der_x509_certificate(der).public_bytes(Encoding.PEM))
    for purpose in ("sslserver", "sslclient"):
        verdict = subprocess.run(
            [
                *("openssl", "verify", "-x509_strict", "-purpose", purpose),
                *("-attime", str(int(NOW.timestamp())), "-CAfile", "root.pem", "leaf.pem"),
            ],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert verdict.returncode == 0, verdict.stderr
