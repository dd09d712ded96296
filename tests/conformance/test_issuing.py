"""What our authorities issue, line by line of the checklist, on certificates that a real key room signed.

pkilint and OpenSSL judge every kind of certificate (I05): rules that are not ours.
"""

import csv
import io
import math
import secrets
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID

from broker.errors import Invalid, Refused, Unavailable
from broker.keys.local import generated
from broker.server.authority import lint, profile
from broker.server.authority import x509 as authorities
from broker.server.authority.jwt import JwtAuthority
from broker.server.authority.profile import Leaf
from broker.server.authority.upstream import DiskUpstream
from broker.server.authority.x509 import X509Authority
from broker.spiffe import SpiffeId, TrustDomain
from broker.spiffe.certificates import split_der

DOMAIN = TrustDomain("example.org")
NOW = datetime.now(UTC).replace(microsecond=0)
HOUR = timedelta(hours=1)
TOLERATED = "pkix.invalid_uri_syntax"  # pkilint takes a URI for a URL


class Clock:
    def now(self):
        return NOW

    def monotonic(self):
        return 0.0


def serial(number=1):
    return profile.serial_number(number << 100)


def root(ttl=24 * HOUR):
    signer = generated(profile.key_identifier)
    der = authorities.self_signed(DOMAIN, signer, serial(), profile.authority_validity(NOW, ttl))
    return X509Authority.of(signer.id, der, signer), x509.load_der_x509_certificate(der)


def key():
    return ec.generate_private_key(ec.SECP256R1()).public_key()


def leaf(authority, path="/wl", dns=(), ttl=HOUR, addresses=()):
    validity = authority.validity(NOW, ttl)
    der = authority.sign(Leaf(SpiffeId.of(DOMAIN, path), serial(7), validity, dns, addresses), key())
    return x509.load_der_x509_certificate(der)


async def below_disk(directory: Path, *, with_intermediate: bool):
    """An authority of ours under a corporate root, directly or over an intermediate, from files."""
    above, top = root()
    certificates, signer = [top], above.signer
    if with_intermediate:
        signer = generated("corporate")
        validity = above.validity(NOW, 20 * HOUR)
        der = above.certify(DOMAIN, signer.public_key, serial(2), validity)[0]
        certificates.insert(0, x509.load_der_x509_certificate(der))
    texts = {
        "cert.pem": b"".join(one.public_bytes(Encoding.PEM) for one in certificates),
        "key.pem": signer._key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
        "roots.pem": top.public_bytes(Encoding.PEM),
    }
    for name, text in texts.items():
        (directory / name).write_bytes(text)
        (directory / name).chmod(0o600)
    upstream = DiskUpstream(
        DOMAIN, Clock(), certificate=directory / "cert.pem", key=directory / "key.pem", bundle=directory / "roots.pem"
    )
    ours = generated(profile.key_identifier)
    minted = await upstream.mint(ours, 24 * HOUR)
    authority = X509Authority.of(ours.id, minted.certificate, ours, minted.above, is_root=False)
    return authority, top, minted


async def every_kind(directory: Path):
    """One of each: name, certificate, what leads from it to the root, root."""
    authority, top = root()
    # Not localhost, which pkilint's checker of domain names does not know for one either.
    names = ("broker.example.org",)
    yield "root", top, (), top
    yield "workload", leaf(authority), (), top
    yield "workload with DNS names", leaf(authority, dns=("a.example.org", "b.example.org")), (), top
    yield "agent", leaf(authority, "/spire/agent/join_token/abc"), (), top
    yield "server", leaf(authority, "/spire/server", names), (), top
    chain = authority.certify(DOMAIN, key(), serial(3), authority.validity(NOW, HOUR))
    yield "downstream authority", x509.load_der_x509_certificate(chain[0]), (), top
    under, above, minted = await below_disk(directory, with_intermediate=True)
    between = tuple(x509.load_der_x509_certificate(der) for der in split_der(minted.above))
    own = x509.load_der_x509_certificate(minted.certificate)
    yield "authority under files", own, between, above
    yield "workload under files", leaf(under), (own, *between), above


@pytest.mark.bears("I05")
async def test_every_kind_passes_the_linter_and_openssl(tmp_path):
    async for name, certificate, between, top in every_kind(tmp_path):
        path = tmp_path / "one.pem"
        path.write_bytes(certificate.public_bytes(Encoding.PEM))
        linter = Path(sys.executable).with_name("lint_pkix_cert")
        linted = subprocess.run(
            [linter, "lint", "-s", "WARNING", "-f", "CSV", path], capture_output=True, text=True, check=False
        )
        assert not linted.stderr, (name, linted.stderr)
        rows = csv.DictReader(io.StringIO(linted.stdout))
        codes = {row["code"] for row in rows}
        assert codes <= {TOLERATED}, name
        (tmp_path / "root.pem").write_bytes(top.public_bytes(Encoding.PEM))
        (tmp_path / "between.pem").write_bytes(b"".join(one.public_bytes(Encoding.PEM) for one in between))
        command = ["openssl", "verify", "-x509_strict", "-CAfile", tmp_path / "root.pem"]
        if between:
            command += ["-untrusted", tmp_path / "between.pem"]
        verified = subprocess.run([*command, path], capture_output=True, text=True, check=False)
        assert verified.returncode == 0, (name, verified.stderr)


@pytest.mark.bears("I05")
def test_the_linter_is_one_that_finds_things(tmp_path):
    signer = generated("bad")
    name = x509.Name([])
    builder = profile._build((name, name), signer.public_key, 1, profile.authority_validity(NOW, HOUR), [])
    path = tmp_path / "bad.pem"
    path.write_bytes(signer.certify(builder).public_bytes(Encoding.PEM))
    linter = Path(sys.executable).with_name("lint_pkix_cert")
    linted = subprocess.run(
        [linter, "lint", "-s", "WARNING", "-f", "CSV", path], capture_output=True, text=True, check=False
    )
    assert len(linted.stdout.splitlines()) > 1


@pytest.mark.bears("X5-01", "X5-02", "X5-03", "X5-04")
def test_names_of_a_leaf():
    authority, _ = root()
    for dns in ((), ("a.example.org", "b.example.org")):
        certificate = leaf(authority, dns=dns)
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
        assert names.value.get_values_for_type(x509.UniformResourceIdentifier) == ["spiffe://example.org/wl"]
        assert tuple(names.value.get_values_for_type(x509.DNSName)) == dns
        assert names.critical == (not list(certificate.subject))
    with pytest.raises(Invalid, match="X5-03"):
        leaf(authority, path="")
    for dns in (("-x",), ("a_b..c",), ("é.example",), ("x" * 64 + ".org",), ("a.b", "a.b"), ("",), ("a\n",)):
        with pytest.raises(Invalid, match="X5-02"):
            leaf(authority, dns=dns)


@pytest.mark.bears("ID-17", "ID-18", "ID-19", "X5-05", "X5-06", "X5-07", "X5-08", "X5-09", "X5-10", "X5-12", "X5-13")
async def test_signing_certificates(tmp_path):
    authority, top = root()
    chain = authority.certify(DOMAIN, key(), serial(3), authority.validity(NOW, HOUR))
    below = x509.load_der_x509_certificate(chain[0])
    under, _, minted = await below_disk(tmp_path, with_intermediate=True)
    for certificate in (top, below, x509.load_der_x509_certificate(minted.certificate)):
        extensions = certificate.extensions
        names = extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        assert [str(one.value) for one in names] == ["spiffe://example.org"]
        constraints = extensions.get_extension_for_class(x509.BasicConstraints)
        assert constraints.critical and constraints.value.ca
        usage = extensions.get_extension_for_class(x509.KeyUsage)
        assert usage.critical and usage.value.key_cert_sign and not usage.value.digital_signature
        with pytest.raises(x509.ExtensionNotFound):
            extensions.get_extension_for_class(x509.ExtendedKeyUsage)
    lengths = [one.extensions.get_extension_for_class(x509.BasicConstraints).value.path_length for one in (top, below)]
    assert lengths == [profile.NESTING, profile.NESTING - 1]
    other = Leaf(SpiffeId("spiffe://other.example/wl"), serial(), authority.validity(NOW, HOUR))
    with pytest.raises(Invalid, match="X5-07"):
        authority.sign(other, key())
    assert under.chain_der[0] == minted.certificate


@pytest.mark.bears("X5-10")
def test_nesting_ends():
    authority, _ = root()
    for depth in range(profile.NESTING):
        signer = generated(f"below-{depth}")
        chain = authority.certify(DOMAIN, signer.public_key, serial(9 + depth), authority.validity(NOW, HOUR))
        authority = X509Authority.of(signer.id, chain[0], signer, b"".join(chain[1:]), is_root=False)
    assert len(authority.issue(Leaf(SpiffeId.of(DOMAIN, "/x"), serial(), authority.validity(NOW, HOUR)), key())) == 5
    with pytest.raises(Refused) as caught:
        authority.certify(DOMAIN, key(), serial(99), authority.validity(NOW, HOUR))
    assert caught.value.reason == "path_length"


@pytest.mark.bears("X5-09", "X5-12", "X5-14", "X5-15", "X5-16")
def test_usages_of_a_leaf():
    authority, _ = root()
    extensions = leaf(authority).extensions
    usage = extensions.get_extension_for_class(x509.KeyUsage)
    assert usage.critical and usage.value.digital_signature
    assert not usage.value.key_cert_sign and not usage.value.crl_sign
    assert not extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert set(extensions.get_extension_for_class(x509.ExtendedKeyUsage).value) >= {
        ExtendedKeyUsageOID.SERVER_AUTH,
        ExtendedKeyUsageOID.CLIENT_AUTH,
    }


@pytest.mark.bears("I07")
async def test_nothing_outlives_who_signed_it(tmp_path):
    authority, top = root(ttl=HOUR)
    short = leaf(authority, ttl=10 * HOUR)
    assert short.not_valid_after_utc == top.not_valid_after_utc
    assert NOW - short.not_valid_before_utc <= timedelta(seconds=60)
    below = authority.certify(DOMAIN, key(), serial(3), authority.validity(NOW, 10 * HOUR))
    assert x509.load_der_x509_certificate(below[0]).not_valid_after_utc == top.not_valid_after_utc
    for late in (top.not_valid_after_utc, top.not_valid_after_utc + HOUR):
        with pytest.raises(Unavailable):
            authority.validity(late, HOUR)
        with pytest.raises(Unavailable):
            JwtAuthority("kid", top.not_valid_after_utc, authority.signer).expiry(late, HOUR)
    assert (
        JwtAuthority("kid", top.not_valid_after_utc, authority.signer).expiry(NOW, 9 * HOUR) == top.not_valid_after_utc
    )
    # Under files the shortest life of the whole chain counts: here 20 hours of the intermediate.
    under, _, minted = await below_disk(tmp_path, with_intermediate=True)
    assert leaf(under, ttl=48 * HOUR).not_valid_after_utc == NOW + 20 * HOUR
    assert minted.roots[0].not_after >= NOW + 20 * HOUR


@pytest.mark.bears("I06")
def test_serial_numbers_are_random_and_positive():
    count = 20_000
    numbers = [profile.serial_number(secrets.randbits(profile.SERIAL_BITS)) for _ in range(count)]
    assert len(set(numbers)) == count
    assert all(0 < one < 1 << 159 for one in numbers)
    # Each bit is set in half of them: 6 standard deviations, over 128 bits.
    for bit in range(profile.SERIAL_BITS):
        ones = sum(one >> bit & 1 for one in numbers)
        assert abs(ones - count / 2) < 6 * math.sqrt(count / 4), bit


@pytest.mark.bears("I06")
def test_a_forked_process_does_not_repeat_numbers():
    program = """
import os, secrets
from broker.server.authority import profile
secrets.randbits(8)
for _ in range(4):
    if os.fork() == 0:
        os.write(1, f"{profile.serial_number(secrets.randbits(profile.SERIAL_BITS)):x}\\n".encode())
        os._exit(0)
for _ in range(4):
    os.wait()
"""
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    assert len(set(said)) == 4


@pytest.mark.bears("X5-05", "X5-09", "X5-12")
def test_what_breaks_the_profile_is_not_signed():
    authority, top = root()
    good = Leaf(SpiffeId.of(DOMAIN, "/wl"), serial(), authority.validity(NOW, HOUR))
    lint.leaf(good, key(), authority.issuer)

    def changed(**fields):
        values = {name: getattr(good, name) for name in ("spiffe_id", "serial", "validity", "dns_names")}
        return Leaf(**(values | fields))

    life = good.validity
    for bad in (
        changed(serial=0),
        changed(serial=-1),
        changed(serial=1 << 159),
        changed(validity=profile.Validity(life.not_after, life.not_before)),
        changed(validity=profile.Validity(life.not_before, top.not_valid_after_utc + HOUR)),
        changed(validity=profile.Validity(life.not_before - 48 * HOUR, life.not_after)),
        changed(validity=profile.Validity(life.not_before, life.not_after - timedelta(microseconds=1))),
    ):
        with pytest.raises(Invalid) as caught:
            lint.leaf(bad, key(), authority.issuer)
        assert caught.value.reason == "certificate_profile"
    # The other looks: a leaf is no authority, an authority no leaf, and neither may be under somebody else's name.
    with pytest.raises(Invalid, match="X5-09"):
        lint.authority(leaf(authority), authority.issuer)
    with pytest.raises(Invalid):
        lint.certified_leaf(top, authority.issuer)
    stranger, _ = root()
    with pytest.raises(Invalid):
        lint.certified_leaf(leaf(authority), stranger.issuer)
