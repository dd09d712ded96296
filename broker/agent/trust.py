"""The first trust in a server: authorities from a file, as PEM or as a SPIFFE bundle."""

from pathlib import Path

from cryptography import x509

from broker.errors import BrokerError, Misconfigured
from broker.spiffe import Bundle, TrustDomain


def read_trust_bundle(path: Path, trust_domain: TrustDomain) -> Bundle:
    """Read the file of ``trust_bundle_path``; raises Misconfigured when it holds no authority."""
    hint = "write it with: broker bundle show > FILE"
    try:
        content = path.read_bytes()
    except OSError as error:
        raise Misconfigured(f"trust_bundle_path: {path} cannot be read: {error.strerror}", hint=hint) from error
    try:
        if content.lstrip().startswith(b"{"):
            bundle = Bundle.parse(trust_domain, content)
        else:
            bundle = Bundle(trust_domain, tuple(x509.load_pem_x509_certificates(content)))
    except (BrokerError, ValueError) as error:
        raise Misconfigured(f"trust_bundle_path: {path} is neither PEM nor a SPIFFE bundle", hint=hint) from error
    if not bundle.x509_authorities:
        raise Misconfigured(f"trust_bundle_path: {path} holds no X.509 authority", hint=hint)
    return bundle
