"""Somebody else's PKI, with real keys: authorities, intermediates, node certificates, and the files they come in."""

import datetime as dt
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from broker.clock import SystemClock

NO_USAGE = dict.fromkeys(
    (
        "digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
        "key_cert_sign", "crl_sign", "encipher_only", "decipher_only",
    ),
    False,
)  # fmt: skip
SERIALS = iter(range(0xA1, 0xFFFF))


def ec_key(curve=ec.SECP256R1) -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(curve())


def rsa_key(bits: int = 2048, exponent: int = 65537) -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(exponent, bits)


def names(*common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, one) for one in common])


@dataclass
class Certified:
    """A certificate and its key; an authority can certify others."""

    key: object
    certificate: x509.Certificate

    @property
    def der(self) -> bytes:
        return self.certificate.public_bytes(Encoding.DER)

    @property
    def pem(self) -> bytes:
        return self.certificate.public_bytes(Encoding.PEM)

    def key_pem(self) -> bytes:
        return self.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())

    def authority(self, name: str, key=None, **more) -> "Certified":
        return certified(name, key or ec_key(), self, authority=True, **more)

    def node(self, *common: str, key=None, **more) -> "Certified":
        return certified(common or ("node-1",), key or ec_key(), self, **more)

    def write(self, directory: Path, *above: "Certified") -> dict[str, Path]:
        """Write key and chain; gives the agent's settings for them."""
        (directory / "key.pem").write_bytes(self.key_pem())
        (directory / "chain.pem").write_bytes(b"".join(one.pem for one in (self, *above)))
        return {"private_key_path": directory / "key.pem", "certificate_path": directory / "chain.pem"}


def root(name: str = "Fleet Root", key=None, **more) -> Certified:
    return certified(name, key or ec_key(), None, authority=True, **more)


def certified(
    name, key, issuer: Certified | None, *, authority: bool = False, uris=(), life: int = 3600, age: int = 60,
    usage: str | None = "", constrained: bool = True, extra=(), serial: int | None = None,
) -> Certified:  # fmt: skip
    now = SystemClock().now().replace(microsecond=0)
    subject = names(name) if isinstance(name, str) else names(*name)
    wanted = usage or ("key_cert_sign" if authority else "digital_signature")
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer.certificate.subject if issuer else subject)
        .public_key(key.public_key())
        .serial_number(serial or next(SERIALS))
        .not_valid_before(now - dt.timedelta(seconds=age))
        .not_valid_after(now + dt.timedelta(seconds=life))
    )
    if constrained:
        builder = builder.add_extension(x509.BasicConstraints(ca=authority, path_length=None), critical=True)
    if usage is not None:
        builder = builder.add_extension(x509.KeyUsage(**(NO_USAGE | {wanted: True})), critical=True)
    if uris:
        san = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri) for uri in uris])
        builder = builder.add_extension(san, critical=False)
    for extension in extra:
        builder = builder.add_extension(extension, critical=False)
    signing = issuer.key if issuer else key
    digest = None if isinstance(signing, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    return Certified(key, builder.sign(signing, digest))
