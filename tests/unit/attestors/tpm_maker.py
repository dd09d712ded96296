"""A maker of TPMs: its authorities, two endorsement keys, and the certificates that it gives them."""

from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import rsa

from tests.fakes.node_pki import Certified, ec_key, root, rsa_key

MAKER = root("TPM Maker Root")
ISSUER = MAKER.authority("TPM Maker Issuing 3")
KEY, ECC_KEY = rsa_key(), ec_key()
EK = x509.ExtendedKeyUsage([x509.ObjectIdentifier("2.23.133.8.1")])


def ek_certificate(key=KEY, issuer: Certified = ISSUER, **more: Any) -> Certified:
    usage = "key_encipherment" if isinstance(key, rsa.RSAPrivateKey) else "key_agreement"
    return issuer.node("unknown", key=key, **({"usage": usage, "extra": (EK,)} | more))
