"""Users, agents, tasks and keys to test with: short words for what matters, defaults for the rest."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from broker.spiffe import SpiffeId, TrustDomain
from broker.spiffe.bundles import Bundle, BundleSet
from broker.spiffe.jose import sign_compact
from broker.spiffe.x509svid import X509Svid, verify_x509_svid
from broker.tasks import Authority, Confirmation, Delegation, Resource, Task, TaskClaims, issue_claims, start_task

NOW = datetime(2026, 11, 22, 12, 0, tzinfo=UTC)
HOUR = timedelta(hours=1)
HASH = "sha-256:" + "A" * 43
X5T = "A" * 42 + "w"
ISSUER = "https://broker.example.org:8443"
TICKETS = Resource("https://tickets.example.org")
AGENT = SpiffeId("spiffe://example.org/agent")


def detail(**members: Any) -> dict[str, Any]:
    return {"type": "api", "locations": ["https://tickets.example.org"], "actions": ["ticket.read"]} | members


def authority(*details: dict[str, Any]) -> Authority:
    return Authority.parse(list(details or (detail(),)))


def delegation(**fields: Any) -> Delegation:
    return Delegation(
        **{"issuer": "https://idp.example.org", "user": "usr_1", "expires_at": NOW + HOUR, "token_hash": HASH} | fields
    )


def task(**fields: Any) -> Task:
    return start_task(
        **{
            "id": "tsk_1",
            "agent": AGENT,
            "session": "ws_1",
            "purpose": "triage ticket 4711",
            "authority": authority(),
            "delegation": delegation(),
            "now": NOW,
            "ttl": timedelta(minutes=30),
        }
        | fields
    )


def claims(of: Task, ancestors: Sequence[Task] = (), **fields: Any) -> TaskClaims:
    return issue_claims(
        of,
        ancestors=ancestors,
        **{
            "issuer": ISSUER,
            "resource": TICKETS,
            "authority": of.authority,
            "cnf": Confirmation(X5T, "ws_1"),
            "jti": "jti_1",
            "txn": "txn_1",
            "now": NOW,
            "ttl": timedelta(seconds=180),
        }
        | fields,
    )


class TokenKey:
    """A P-256 key that signs tokens as ``kid``, with whatever header and payload a test wants."""

    def __init__(self, kid: str = "k1") -> None:
        self.kid = kid
        self._key = ec.generate_private_key(ec.SECP256R1())

    @property
    def public(self) -> dict[str, ec.EllipticCurvePublicKey]:
        return {self.kid: self._key.public_key()}

    def sign(self, data: bytes) -> bytes:
        r, s = decode_dss_signature(self._key.sign(data, ec.ECDSA(hashes.SHA256())))
        return r.to_bytes(32) + s.to_bytes(32)

    def token(self, payload: Mapping[str, Any], **header: Any) -> str:
        members = {"alg": "ES256", "typ": "at+jwt", "kid": self.kid} | header
        return sign_compact({k: v for k, v in members.items() if v is not None}, payload, self.sign)


def svid(spiffe_id: SpiffeId = AGENT) -> X509Svid:
    """A new, verified SVID of this ID under a new authority of its trust domain."""
    root, leaf = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "an authority")])
    top = (
        _certificate(name, root.public_key(), f"spiffe://{spiffe_id.trust_domain}")
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .sign(root, hashes.SHA256())
    )
    end = (
        _certificate(name, leaf.public_key(), str(spiffe_id))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .sign(root, hashes.SHA256())
    )
    bundles = BundleSet.of(Bundle(TrustDomain(spiffe_id.trust_domain.name), (top,)))
    return verify_x509_svid([end.public_bytes(Encoding.DER)], bundles, now=NOW)


def _certificate(name: x509.Name, key: ec.EllipticCurvePublicKey, uri: str) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(NOW - HOUR)
        .not_valid_after(NOW + HOUR)
        .add_extension(x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri)]), critical=True)
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
