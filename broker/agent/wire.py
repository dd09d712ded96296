"""Entries and bundles, from the server's messages to values and back. What does not parse raises; nothing is guessed."""

from dataclasses import dataclass
from datetime import UTC, datetime

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_der_public_key

from broker._proto.broker.server.v1 import entries_pb2
from broker._proto.spire.api.types import bundle_pb2, entry_pb2, selector_pb2, spiffeid_pb2
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
        disable_x509_svid_prefetch=told.additional_attributes.disable_x509_svid_prefetch,
        jwt_svid_include_jti=told.additional_attributes.jwt_svid_include_jti,
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


def entry_message(entry: Entry) -> entries_pb2.RegisteredEntry:
    """Write one entry, so that :func:`entry` reads the same."""
    told = entry_pb2.Entry(
        id=entry.id,
        spiffe_id=_id_message(entry.spiffe_id),
        parent_id=_id_message(entry.parent_id),
        selectors=[selector_pb2.Selector(type=one.type, value=one.value) for one in entry.selectors],
        created_at=int(entry.created_at.timestamp()),
        x509_svid_ttl=entry.x509_svid_ttl,
        jwt_svid_ttl=entry.jwt_svid_ttl,
        federates_with=map(str, entry.federates_with),
        admin=entry.admin,
        downstream=entry.downstream,
        expires_at=int(entry.expires_at.timestamp()) if entry.expires_at is not None else 0,
        dns_names=entry.dns_names,
        revision_number=entry.revision,
        store_svid=entry.store_svid,
        hint=entry.hint,
    )
    if entry.disable_x509_svid_prefetch or entry.jwt_svid_include_jti:
        told.additional_attributes.disable_x509_svid_prefetch = entry.disable_x509_svid_prefetch
        told.additional_attributes.jwt_svid_include_jti = entry.jwt_svid_include_jti
    return entries_pb2.RegisteredEntry(
        entry=told,
        allowed_audiences=entry.allowed_audiences,
        may_start_tasks=entry.may_start_tasks,
        description=entry.description,
        owner=entry.owner,
    )


def bundle_message(told: ToldBundle) -> bundle_pb2.Bundle:
    """Write one bundle, so that :func:`bundle` reads the same."""
    known = told.bundle
    return bundle_pb2.Bundle(
        trust_domain=str(known.trust_domain),
        x509_authorities=[
            bundle_pb2.X509Certificate(asn1=one.public_bytes(Encoding.DER), tainted=one in told.tainted)
            for one in known.x509_authorities
        ],
        jwt_authorities=[
            bundle_pb2.JWTKey(
                public_key=key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo),
                key_id=kid,
                tainted=kid in told.tainted_kids,
            )
            for kid, key in known.jwt_authorities.items()
        ],
        sequence_number=known.sequence or 0,
        refresh_hint=known.refresh_hint or 0,
    )


def _id_message(spiffe_id: SpiffeId) -> spiffeid_pb2.SPIFFEID:
    return spiffeid_pb2.SPIFFEID(trust_domain=str(spiffe_id.trust_domain), path=spiffe_id.path)


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
