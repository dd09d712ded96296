"""From the server's messages to values: entries and bundles. What does not parse raises; nothing is guessed."""

from dataclasses import dataclass
from datetime import UTC, datetime

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import load_der_public_key

from broker._proto.broker.server.v1 import entries_pb2
from broker._proto.spire.api.types import bundle_pb2, spiffeid_pb2
from broker.errors import Invalid, InvalidBundle
from broker.registry import Entry
from broker.spiffe import Bundle, Selector, SpiffeId, TrustDomain
from broker.spiffe.jose import PublicKey


@dataclass(frozen=True, slots=True)
class ToldBundle:
    """A bundle as the server told it, and which of its authorities it no longer wants to see in use."""

    bundle: Bundle
    tainted: frozenset[x509.Certificate]
    tainted_kids: frozenset[str]


def spiffe_id(message: spiffeid_pb2.SPIFFEID) -> SpiffeId:
    """Read a SPIFFE ID; raises InvalidSpiffeId."""
    return SpiffeId.of(TrustDomain(message.trust_domain), message.path)


def entry(message: entries_pb2.RegisteredEntry, trust_domain: TrustDomain) -> Entry:
    """Read one entry; raises Invalid, also for an entry of another trust domain."""
    told = message.entry
    return Entry(
        id=told.id,
        spiffe_id=spiffe_id(told.spiffe_id),
        parent_id=spiffe_id(told.parent_id),
        selectors=frozenset(Selector.of(one.type, one.value) for one in told.selectors),
        created_at=_time(told.created_at),
        x509_svid_ttl=told.x509_svid_ttl,
        jwt_svid_ttl=told.jwt_svid_ttl,
        federates_with=frozenset(TrustDomain(name) for name in told.federates_with),
        admin=told.admin,
        downstream=told.downstream,
        expires_at=_time(told.expires_at) if told.expires_at else None,
        dns_names=tuple(told.dns_names),
        revision=told.revision_number,
        store_svid=told.store_svid,
        hint=told.hint,
        allowed_audiences=frozenset(message.allowed_audiences),
        may_start_tasks=message.may_start_tasks,
        description=message.description,
        owner=message.owner,
    ).validated(trust_domain)


def bundle(message: bundle_pb2.Bundle) -> ToldBundle:
    """Read one bundle; raises InvalidBundle or InvalidTrustDomain."""
    try:
        authorities = [(x509.load_der_x509_certificate(one.asn1), one.tainted) for one in message.x509_authorities]
        keys = {one.key_id: _public_key(one.public_key) for one in message.jwt_authorities}
    except (ValueError, TypeError) as error:
        raise InvalidBundle("the server sent an authority that cannot be read") from error
    if len(keys) != len(message.jwt_authorities):
        raise InvalidBundle("the server sent two JWT authorities with one key ID", code="bundle_key_id")
    return ToldBundle(
        Bundle(
            TrustDomain(message.trust_domain),
            x509_authorities=tuple(certificate for certificate, _ in authorities),
            jwt_authorities=keys,
            sequence=message.sequence_number,
            refresh_hint=message.refresh_hint or None,
        ),
        frozenset(certificate for certificate, is_tainted in authorities if is_tainted),
        frozenset(one.key_id for one in message.jwt_authorities if one.tainted),
    )


def _public_key(der: bytes) -> PublicKey:
    key = load_der_public_key(der)
    if not isinstance(key, ec.EllipticCurvePublicKey | rsa.RSAPublicKey):
        raise InvalidBundle("the server sent a JWT authority of an unknown kind")
    return key


def _time(seconds: int) -> datetime:
    try:
        return datetime.fromtimestamp(seconds, UTC)
    except (OverflowError, OSError, ValueError) as error:
        raise Invalid("a time of the entry is out of range") from error
