"""A small real PKI: roots, intermediates and leaves with any defect that a test asks for."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

BOTH = (ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH)


@dataclass(frozen=True)
class Holder:
    """A certificate with its key."""

    certificate: x509.Certificate
    key: Any

    @property
    def der(self) -> bytes:
        return self.certificate.public_bytes(Encoding.DER)


def key_usage(*names: str) -> x509.KeyUsage:
    every = (
        "digital_signature",
        "content_commitment",
        "key_encipherment",
        "data_encipherment",
        "key_agreement",
        "key_cert_sign",
        "crl_sign",
        "encipher_only",
        "decipher_only",
    )
    return x509.KeyUsage(**{name: name in names for name in every})


class Pki:
    """Makes certificates around a moment. Every argument that is None is left out of the certificate."""

    def __init__(self, now: datetime) -> None:
        self.now = now

    def key(self, kind: str = "P-256") -> Any:
        curves = {"P-256": ec.SECP256R1, "P-384": ec.SECP384R1, "P-521": ec.SECP521R1, "P-192": ec.SECP192R1}
        if kind in curves:
            return ec.generate_private_key(curves[kind]())
        if kind == "Ed25519":
            return ed25519.Ed25519PrivateKey.generate()
        return rsa.generate_private_key(65537, int(kind.removeprefix("RSA-")))

    def make(
        self,
        *,
        subject: str | None,
        issuer: Holder | None,
        sans: Sequence[x509.GeneralName] = (),
        san_critical: bool = False,
        ca: bool | None = False,
        path_length: int | None = None,
        basic_critical: bool = True,
        usage: Sequence[str] | None = (),
        usage_critical: bool = True,
        purposes: Sequence[x509.ObjectIdentifier] | None = None,
        start: timedelta = timedelta(minutes=-1),
        end: timedelta = timedelta(hours=1),
        key: Any = None,
        digest: Any = None,
        extra: Sequence[tuple[x509.ExtensionType, bool]] = (),
        identifiers: bool = True,
        serial: int | None = None,
    ) -> Holder:
        key = key or self.key()
        signer = issuer.key if issuer else key
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject)] if subject else [])
        builder = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(issuer.certificate.subject if issuer else name)
            .public_key(key.public_key())
            .serial_number(serial or x509.random_serial_number())
            .not_valid_before(self.now + start)
            .not_valid_after(self.now + end)
        )
        if ca is not None:
            builder = builder.add_extension(x509.BasicConstraints(ca, path_length), critical=basic_critical)
        if usage is not None:
            builder = builder.add_extension(key_usage(*usage), critical=usage_critical)
        if purposes is not None:
            builder = builder.add_extension(x509.ExtendedKeyUsage(purposes), critical=False)
        if sans:
            builder = builder.add_extension(x509.SubjectAlternativeName(sans), critical=san_critical)
        if identifiers:
            builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            builder = builder.add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False
            )
        for extension, critical in extra:
            builder = builder.add_extension(extension, critical=critical)
        default = None if isinstance(signer, ed25519.Ed25519PrivateKey) else hashes.SHA256()
        return Holder(builder.sign(signer, digest or default), key)

    def root(self, name: str = "root", **changes: Any) -> Holder:
        return self.make(
            **{"subject": name, "issuer": None, "ca": True, "usage": ("key_cert_sign", "crl_sign")}
            | {"end": timedelta(days=1), **changes}
        )

    def intermediate(self, issuer: Holder, name: str = "intermediate", **changes: Any) -> Holder:
        return self.root(name, **{"issuer": issuer, **changes})

    def leaf(self, issuer: Holder, *uris: str, **changes: Any) -> Holder:
        names = [x509.UniformResourceIdentifier(uri) for uri in uris or ("spiffe://example.org/web",)]
        return self.make(
            **{"subject": "workload", "issuer": issuer, "sans": names, "usage": ("digital_signature",)}
            | {"purposes": BOTH, **changes}
        )
