"""Revocation lists of the X.509 authorities: when one is due, what stands in it, and its signature (RFC 5280 §5).

Each authority whose key is held here signs the list of what it took back itself. What an authority signed whose key is gone
stands on an *indirect* list (§5.2.5) of the active one: few verifiers but ours read those, and who does not ignores it.
Written straight as DER, as leaves are: the library takes two seconds for the longest list that there may be.
The next update is the authority's end: its key may be gone before, and then no later list can be promised. Pure, but for
the signer: no store and no clock.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import lru_cache
from typing import Final

from cryptography import x509

from broker.keys import Signer
from broker.server.authority import leaf_der
from broker.server.authority.leaf_der import encoded_extension, encoded_time, tlv
from broker.server.authority.profile import whole_seconds
from broker.server.store.revocation_rows import CrlRow, RevokedSvid

RENEW_AFTER: Final = timedelta(minutes=10)
"""A list is never signed anew sooner than this without news: each goes to every workload."""

_INTEGER, _SEQUENCE, _EXTENSIONS = 0x02, 0x30, 0xA0
_V2: Final = bytes.fromhex("020101")
_INDIRECT: Final = x509.IssuingDistributionPoint(
    full_name=None,
    relative_name=None,
    only_contains_user_certs=False,
    only_contains_ca_certs=False,
    only_some_reasons=None,
    indirect_crl=True,
    only_contains_attribute_certs=False,
)


def _reason(flag: x509.ReasonFlags) -> bytes:
    return encoded_extension(x509.Extension(x509.CRLReason.oid, critical=False, value=x509.CRLReason(flag)))


_REASONS: Final = {
    0: b"",
    1: _reason(x509.ReasonFlags.key_compromise),
    3: _reason(x509.ReasonFlags.affiliation_changed),
    4: _reason(x509.ReasonFlags.superseded),
    5: _reason(x509.ReasonFlags.cessation_of_operation),
    9: _reason(x509.ReasonFlags.privilege_withdrawn),
}
REASONS: Final = frozenset(_REASONS)
"""The reasons that mean something for a leaf (RFC 5280 §5.3.1); 0, unspecified, is written as none."""


@dataclass(frozen=True, slots=True)
class CrlIssuer:
    """An authority that can sign lists: its id, its certificate, its key."""

    id: str
    certificate: x509.Certificate = field(repr=False)
    signer: Signer = field(repr=False)


def listed(revoked: Iterable[RevokedSvid], previous: CrlRow | None) -> tuple[RevokedSvid, ...]:
    """Give what has to stand on the next list: all but what a list after its end has shown (RFC 5280 §3.3)."""
    if previous is None:
        return tuple(revoked)
    return tuple(one for one in revoked if one.not_after >= previous.this_update)


def is_due(listed_now: Collection[RevokedSvid], previous: CrlRow | None, now: datetime) -> bool:
    """Say whether a list must be signed: the first one, one with news, or because half of the last one's time is over."""
    if previous is None or now >= renewal(previous):
        return True
    shown = _shown(previous.der)
    return any(int(one.serial, 16) not in shown for one in listed_now)


def renewal(row: CrlRow) -> datetime:
    """Tell when a list is signed anew without any news."""
    return row.this_update + max((row.next_update - row.this_update) / 2, RENEW_AFTER)


def count(row: CrlRow) -> int:
    """Count the certificates on a list."""
    return len(_shown(row.der))


def sign_crl(
    issuer: CrlIssuer,
    revoked: Sequence[RevokedSvid],
    previous: CrlRow | None,
    now: datetime,
    signers: Mapping[str, x509.Certificate] | None = None,
) -> CrlRow:
    """Sign the list that follows ``previous``. With ``signers`` it is indirect: by authority id, who signed what it names."""
    # Never older than the one before it, whatever the clock did: whoever holds both takes the newer.
    this_update = max(whole_seconds(now), previous.this_update if previous else whole_seconds(now))
    next_update = max(issuer.certificate.not_valid_after_utc, this_update)
    number = 1 if previous is None else previous.number + 1
    to_be_signed = tlv(
        _SEQUENCE,
        _V2,
        leaf_der.ECDSA_SHA256,
        issuer.certificate.subject.public_bytes(),
        encoded_time(this_update),
        encoded_time(next_update),
        _entries(revoked, signers),
        tlv(_EXTENSIONS, tlv(_SEQUENCE, *_extensions(issuer, number, is_indirect=signers is not None))),
    )
    # Around it stands what stands around a certificate.
    der = leaf_der.certificate(to_be_signed, issuer.signer.sign_der(to_be_signed))
    return CrlRow(issuer.id, signers is not None, number, this_update, next_update, der)


def _entries(revoked: Sequence[RevokedSvid], signers: Mapping[str, x509.Certificate] | None) -> bytes:
    """Write the certificates; without any there is no such part (§5.1.2.6)."""
    entries: list[bytes] = []
    said = ""
    for one in sorted(revoked, key=lambda one: (one.authority, one.revoked_at, one.serial)):
        extensions = _REASONS[one.reason]
        if signers is not None and one.authority != said:
            # §5.3.3: it holds for those that follow, until another is named.
            said = one.authority
            name = x509.CertificateIssuer([x509.DirectoryName(signers[said].subject)])
            extensions += encoded_extension(x509.Extension(name.oid, critical=True, value=name))
        serial = int(one.serial, 16)
        entries.append(
            tlv(
                _SEQUENCE,
                tlv(_INTEGER, serial.to_bytes(serial.bit_length() // 8 + 1)),
                encoded_time(whole_seconds(one.revoked_at)),
                tlv(_SEQUENCE, extensions) if extensions else b"",
            )
        )
    return tlv(_SEQUENCE, *entries) if entries else b""


def _extensions(issuer: CrlIssuer, number: int, *, is_indirect: bool) -> list[bytes]:
    ski = issuer.certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    values: list[tuple[x509.ExtensionType, bool]] = [
        (x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(ski), False),
        (x509.CRLNumber(number), False),
    ]
    if is_indirect:
        values.append((_INDIRECT, True))
    return [encoded_extension(x509.Extension(value.oid, critical, value)) for value, critical in values]


@lru_cache(maxsize=32)
def _shown(der: bytes) -> frozenset[int]:
    return frozenset(entry.serial_number for entry in x509.load_der_x509_crl(der))
