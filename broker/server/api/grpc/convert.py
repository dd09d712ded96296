"""Between SPIRE's messages and our values. What a message may not say is Invalid here; nothing is decided."""

from collections.abc import Callable, Iterable, Mapping
from datetime import UTC, datetime
from typing import Any, Final

from broker._proto.broker.server.v1.entries_pb2 import RegisteredEntry, RegisteredEntryMask
from broker._proto.spire.api.types import (
    agent_pb2,
    bundle_pb2,
    entry_pb2,
    federateswith_pb2,
    jwtsvid_pb2,
    selector_pb2,
    spiffeid_pb2,
    status_pb2,
    x509svid_pb2,
)
from broker.errors import BrokerError, Invalid, InvalidBundle
from broker.registry.entry import Entry
from broker.server.api.grpc import identities
from broker.server.api.grpc.identities import id_in, reading
from broker.server.identity.filters import SetFilter, SetMatch
from broker.server.identity.signing import SignedJwt, SignedX509
from broker.server.store.bundle_rows import PublishedBundle, PublishedKey, jwt_public_key, x509_key
from broker.server.store.rows import Node
from broker.spiffe import Selector, SpiffeId, TrustDomain
from broker.transport.grpc_status import status_code

MAX_TIME: Final = 253402300799
"""The last second of the year 9999: datetime ends there."""
ENTRY_FIELDS: Final = tuple(field.name for field in entry_pb2.EntryMask.DESCRIPTOR.fields)
spiffe_id_of: Final = identities.spiffe_id_of
_MATCHES: Final = {0: SetMatch.EXACT, 1: SetMatch.SUBSET, 2: SetMatch.SUPERSET, 3: SetMatch.ANY}


# ---- small things


def spiffe_id_message(spiffe_id: SpiffeId) -> spiffeid_pb2.SPIFFEID:
    """Write a SPIFFE ID."""
    return spiffeid_pb2.SPIFFEID(trust_domain=spiffe_id.trust_domain.name, path=spiffe_id.path)


def selectors_of(messages: Iterable[selector_pb2.Selector]) -> frozenset[Selector]:
    """Read selectors; raises InvalidSelector."""
    return frozenset(Selector.of(message.type, message.value) for message in messages)


def selector_messages(selectors: Iterable[Selector]) -> list[selector_pb2.Selector]:
    """Write selectors, sorted."""
    return [selector_pb2.Selector(type=one.type, value=one.value) for one in sorted(selectors)]


def moment_of(seconds: int) -> datetime | None:
    """Read seconds since 1970, 0 meaning none; raises Invalid."""
    if not 0 <= seconds <= MAX_TIME:
        raise Invalid("a time is before 1970 or after the year 9999", code="invalid_time")
    return datetime.fromtimestamp(seconds, UTC) if seconds else None


def seconds(moment: datetime | None) -> int:
    """Write seconds since 1970, 0 meaning none."""
    return 0 if moment is None else int(moment.timestamp())


def ok_status() -> status_pb2.Status:
    """Write success of one item."""
    return status_pb2.Status(code=0, message="OK")


def error_status(error: BrokerError) -> status_pb2.Status:
    """Write the failure of one item, by the same table as a failed call."""
    return status_pb2.Status(code=status_code(error).value[0], message=error.message)


def selector_filter(message: selector_pb2.SelectorMatch) -> SetFilter[Selector]:
    """Read a filter over selectors; raises Invalid."""
    wanted = selectors_of(message.selectors)
    if not wanted:
        raise Invalid("empty selector set", code="invalid_filter")
    return SetFilter(wanted, _match(message.match))


def federation_filter(message: federateswith_pb2.FederatesWithMatch) -> SetFilter[TrustDomain]:
    """Read a filter over federated trust domains; raises Invalid."""
    if not message.trust_domains:
        raise Invalid("empty trust domain set", code="invalid_filter")
    return SetFilter(frozenset(map(TrustDomain, message.trust_domains)), _match(message.match))


def _match(number: int) -> SetMatch:
    if number not in _MATCHES:
        raise Invalid("a filter compares in a way that is not known", code="invalid_filter")
    return _MATCHES[number]


def apply_mask(message: Any, mask: Any) -> Any:
    """Clear the fields that a mask leaves out; the identity of the thing always stays."""
    for field in mask.DESCRIPTOR.fields:
        if not getattr(mask, field.name):
            message.ClearField(field.name)
    return message


# ---- entries


def entry_of(message: entry_pb2.Entry, entry_id: str, now: datetime, home: TrustDomain) -> Entry:
    """Read a new entry; raises Invalid. Its id is the message's own, or the given one."""
    return Entry(
        id=message.id or entry_id,
        created_at=now.replace(microsecond=0),
        **entry_edits(message, None, home),
    )


def registered_entry_of(message: RegisteredEntry, entry_id: str, now: datetime, home: TrustDomain) -> Entry:
    """Read a new entry with the fields that SPIRE's message lacks; raises Invalid."""
    return Entry(
        id=message.entry.id or entry_id,
        created_at=now.replace(microsecond=0),
        **registered_entry_edits(message, None, home),
    )


def entry_edits(message: entry_pb2.Entry, mask: entry_pb2.EntryMask | None, home: TrustDomain) -> dict[str, Any]:
    """Give the fields of an entry that an update names, or all without a mask; raises Invalid, also for IDs not of this home."""
    edits = {
        name: read(message)
        for name, read in _ENTRY_READERS.items()
        if mask is None or getattr(mask, _MASKED_BY.get(name, name))
    }
    for name, judged, what in _PLACES:
        if name in edits:
            with reading(what):
                judged(edits[name], home)
    return edits


def registered_entry_edits(
    message: RegisteredEntry, mask: RegisteredEntryMask | None, home: TrustDomain
) -> dict[str, Any]:
    """Give the same of an entry with our fields; raises Invalid."""
    ours = {name: read(message) for name, read in _OUR_READERS.items() if mask is None or getattr(mask, name)}
    return entry_edits(message.entry, None if mask is None else mask.entry, home) | ours


def entry_message(entry: Entry) -> entry_pb2.Entry:
    """Write an entry in SPIRE's message."""
    return entry_pb2.Entry(
        id=entry.id,
        spiffe_id=spiffe_id_message(entry.spiffe_id),
        parent_id=spiffe_id_message(entry.parent_id),
        selectors=selector_messages(entry.selectors),
        x509_svid_ttl=entry.x509_svid_ttl,
        federates_with=sorted(domain.name for domain in entry.federates_with),
        admin=entry.admin,
        downstream=entry.downstream,
        expires_at=seconds(entry.expires_at),
        dns_names=entry.dns_names,
        revision_number=entry.revision,
        store_svid=entry.store_svid,
        jwt_svid_ttl=entry.jwt_svid_ttl,
        hint=entry.hint,
        created_at=seconds(entry.created_at),
        additional_attributes=_attributes_message(entry),
    )


def _attributes_message(entry: Entry) -> entry_pb2.Entry.AdditionalAttributes | None:
    if not entry.disable_x509_svid_prefetch and not entry.jwt_svid_include_jti:
        return None
    return entry_pb2.Entry.AdditionalAttributes(
        disable_x509_svid_prefetch=entry.disable_x509_svid_prefetch, jwt_svid_include_jti=entry.jwt_svid_include_jti
    )


def registered_entry_message(entry: Entry) -> RegisteredEntry:
    """Write an entry with the fields that SPIRE's message lacks."""
    return RegisteredEntry(
        entry=entry_message(entry),
        allowed_audiences=sorted(entry.allowed_audiences),
        may_start_tasks=entry.may_start_tasks,
        description=entry.description,
        owner=entry.owner,
    )


def _id(message: entry_pb2.Entry, field: str, what: str) -> SpiffeId:
    with reading(what):
        return id_in(message, field)


def _entry_selectors(message: entry_pb2.Entry) -> frozenset[Selector]:
    if not message.selectors:
        # The empty set is part of every set: such an entry would match every process.
        raise Invalid("selector list is empty", code="invalid_entry", hint="an entry has at least one selector")
    return selectors_of(message.selectors)


def _federates_with(message: entry_pb2.Entry) -> frozenset[TrustDomain]:
    with reading("invalid federated trust domain"):
        return frozenset(map(TrustDomain, message.federates_with))


_PARENT, _OWN = "invalid parent ID", "invalid spiffe ID"
_PLACES: Final = (("parent_id", identities.member, _PARENT), ("spiffe_id", identities.workload, _OWN))
_ENTRY_READERS: Final[Mapping[str, Callable[[entry_pb2.Entry], Any]]] = {
    "parent_id": lambda message: _id(message, "parent_id", _PARENT),
    "spiffe_id": lambda message: _id(message, "spiffe_id", _OWN),
    "selectors": _entry_selectors,
    "x509_svid_ttl": lambda message: message.x509_svid_ttl,
    "jwt_svid_ttl": lambda message: message.jwt_svid_ttl,
    "federates_with": _federates_with,
    "admin": lambda message: message.admin,
    "downstream": lambda message: message.downstream,
    "expires_at": lambda message: moment_of(message.expires_at),
    "dns_names": lambda message: tuple(message.dns_names),
    "store_svid": lambda message: message.store_svid,
    "hint": lambda message: message.hint,
    "disable_x509_svid_prefetch": lambda message: message.additional_attributes.disable_x509_svid_prefetch,
    "jwt_svid_include_jti": lambda message: message.additional_attributes.jwt_svid_include_jti,
}
_MASKED_BY: Final = dict.fromkeys(("disable_x509_svid_prefetch", "jwt_svid_include_jti"), "additional_attributes")
_OUR_READERS: Final[Mapping[str, Callable[[RegisteredEntry], Any]]] = {
    "allowed_audiences": lambda message: frozenset(message.allowed_audiences),
    "may_start_tasks": lambda message: message.may_start_tasks,
    "description": lambda message: message.description,
    "owner": lambda message: message.owner,
}


# ---- nodes, SVIDs, bundles


def agent_message(node: Node) -> agent_pb2.Agent:
    """Write a node."""
    return agent_pb2.Agent(
        id=spiffe_id_message(node.id),
        attestation_type=node.attestation_type,
        x509svid_serial_number=node.serial,
        x509svid_expires_at=seconds(node.expires_at),
        selectors=selector_messages(node.selectors),
        banned=node.banned,
        can_reattest=node.reattestable,
        agent_version=node.agent_version,
    )


def x509_message(svid: SignedX509) -> x509svid_pb2.X509SVID:
    """Write a signed X.509-SVID."""
    return x509svid_pb2.X509SVID(
        cert_chain=svid.chain_der,
        id=spiffe_id_message(svid.spiffe_id),
        expires_at=seconds(svid.expires_at),
        hint=svid.hint,
    )


def jwt_message(svid: SignedJwt) -> jwtsvid_pb2.JWTSVID:
    """Write a signed JWT-SVID."""
    return jwtsvid_pb2.JWTSVID(
        token=svid.token,
        id=spiffe_id_message(svid.spiffe_id),
        expires_at=seconds(svid.expires_at),
        issued_at=seconds(svid.issued_at),
        hint=svid.hint,
    )


def bundle_message(bundle: PublishedBundle) -> bundle_pb2.Bundle:
    """Write a bundle."""
    return bundle_pb2.Bundle(
        trust_domain=bundle.trust_domain.name,
        x509_authorities=[bundle_pb2.X509Certificate(asn1=key.public, tainted=key.tainted) for key in bundle.x509],
        jwt_authorities=[
            bundle_pb2.JWTKey(
                public_key=key.public, key_id=key.id, expires_at=seconds(key.not_after), tainted=key.tainted
            )
            for key in bundle.jwt
        ],
        refresh_hint=bundle.refresh_hint,
        sequence_number=bundle.sequence,
    )


def published_bundle_of(message: bundle_pb2.Bundle) -> PublishedBundle:
    """Read another trust domain's bundle; raises Invalid."""
    with reading("invalid trust domain"):
        trust_domain = TrustDomain(message.trust_domain)
    if message.refresh_hint < 0:
        raise InvalidBundle("the bundle's refresh hint is out of range", code="bundle_number")
    with reading("unable to parse X.509 authority"):
        x509 = tuple(x509_keys_of(message.x509_authorities))
    with reading("unable to parse JWT authority"):
        jwt = tuple(jwt_keys_of(message.jwt_authorities))
    bundle = PublishedBundle(trust_domain, x509, jwt, message.sequence_number, message.refresh_hint)
    bundle.checked()
    return bundle


def x509_keys_of(messages: Iterable[bundle_pb2.X509Certificate]) -> list[PublishedKey]:
    """Read X.509 authorities, one certificate each; raises InvalidBundle."""
    return [x509_key(message.asn1, tainted=message.tainted) for message in messages]


def jwt_keys_of(messages: Iterable[bundle_pb2.JWTKey]) -> list[PublishedKey]:
    """Read JWT authorities; raises Invalid."""
    keys = []
    for message in messages:
        jwt_public_key(message.public_key)
        if not message.key_id:
            raise InvalidBundle("missing key ID", code="bundle_key_id")
        keys.append(PublishedKey(message.key_id, message.public_key, moment_of(message.expires_at), message.tainted))
    return keys
