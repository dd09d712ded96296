"""Bundles as texts: PEM certificates or a SPIFFE document, to and from the API's message. Knows no server."""

from typing import Any, Final

import click

from broker.errors import BrokerError, Invalid

PEM: Final = "pem"
SPIFFE: Final = "spiffe"
FORMAT = click.Choice([PEM, SPIFFE])


def write_bundle(message: Any, form: str) -> str:
    """Write a bundle's message: all its X.509 authorities as PEM, or the whole as a SPIFFE document."""
    import json  # noqa: PLC0415 - the command line starts fast

    from cryptography.hazmat.primitives.serialization import Encoding  # noqa: PLC0415

    bundle = _bundle(message)
    if form == PEM:
        return "".join(one.public_bytes(Encoding.PEM).decode() for one in bundle.x509_authorities)
    return json.dumps(json.loads(bundle.to_json()), indent=2)


def read_bundle(text: str, form: str | None, trust_domain: str) -> Any:
    """Read PEM or a SPIFFE document, told apart by the text where no form is given, into a message; raises Invalid."""
    from cryptography import x509  # noqa: PLC0415
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat  # noqa: PLC0415

    from broker._proto.spire.api.types import bundle_pb2  # noqa: PLC0415
    from broker.spiffe import Bundle, TrustDomain  # noqa: PLC0415

    domain = TrustDomain(trust_domain)
    if (form or (SPIFFE if text.lstrip().startswith("{") else PEM)) == SPIFFE:
        bundle = Bundle.parse(domain, text)
    else:
        try:
            bundle = Bundle(domain, tuple(x509.load_pem_x509_certificates(text.encode())))
        except ValueError:
            raise Invalid(
                "the bundle holds no PEM certificate",
                code="bundle_malformed",
                hint="a SPIFFE document: --format spiffe",
            ) from None
    return bundle_pb2.Bundle(
        trust_domain=domain.name,
        x509_authorities=[
            bundle_pb2.X509Certificate(asn1=one.public_bytes(Encoding.DER)) for one in bundle.x509_authorities
        ],
        jwt_authorities=[
            bundle_pb2.JWTKey(key_id=kid, public_key=key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo))
            for kid, key in sorted(bundle.jwt_authorities.items())
        ],
        refresh_hint=bundle.refresh_hint or 0,
        sequence_number=bundle.sequence or 0,
    )


def bundle_row(message: Any) -> dict[str, Any]:
    """Give a bundle's members, by SPIRE's names."""
    from cryptography.hazmat.primitives.hashes import SHA256  # noqa: PLC0415

    from broker.cli.output import moment  # noqa: PLC0415

    tainted = [one.tainted for one in message.x509_authorities]
    return {
        "trust_domain": message.trust_domain,
        "x509_authorities": [
            {
                "sha256": certificate.fingerprint(SHA256()).hex(),
                "expires_at": certificate.not_valid_after_utc,
                "tainted": is_tainted,
            }
            for certificate, is_tainted in zip(_bundle(message).x509_authorities, tainted, strict=True)
        ],
        "jwt_authorities": [
            {"key_id": one.key_id, "expires_at": moment(one.expires_at), "tainted": one.tainted}
            for one in message.jwt_authorities
        ],
        "x509_count": len(message.x509_authorities),
        "jwt_count": len(message.jwt_authorities),
        "refresh_hint": message.refresh_hint,
        "sequence_number": message.sequence_number,
    }


def _bundle(message: Any) -> Any:
    from cryptography import x509  # noqa: PLC0415
    from cryptography.hazmat.primitives.serialization import load_der_public_key  # noqa: PLC0415

    from broker.spiffe import Bundle, TrustDomain  # noqa: PLC0415

    try:
        return Bundle(
            TrustDomain(message.trust_domain),
            tuple(x509.load_der_x509_certificate(one.asn1) for one in message.x509_authorities),
            {one.key_id: load_der_public_key(one.public_key) for one in message.jwt_authorities},  # type: ignore[misc]
            sequence=message.sequence_number or None,
            refresh_hint=message.refresh_hint or None,
        )
    except ValueError:
        raise BrokerError("the server sent an authority that cannot be read", code="bundle_malformed") from None
