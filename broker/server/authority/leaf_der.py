"""The leaf profile written straight as DER, because thousands are signed per second.

Says the same, byte for byte, as ``profile.leaf_certificate`` would through the library; a test holds the two together.
Only what differs between leaves is encoded here, by the few rules of DER that it takes (X.690 §8, §10); every other
part is the library's own encoding, made once.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from broker.server.authority import profile
from broker.server.authority.profile import Issuer, Leaf, PublicKey

_INTEGER, _BIT_STRING, _OCTET_STRING, _SEQUENCE = 0x02, 0x03, 0x04, 0x30
_UTC_TIME, _GENERALIZED_TIME = 0x17, 0x18
_URI, _DNS, _IP = 0x86, 0x82, 0x87  # GeneralName (RFC 5280 §4.2.1.6)
_V3: Final = bytes.fromhex("a003020102")
_TRUE: Final = bytes.fromhex("0101ff")
ECDSA_SHA256: Final = bytes.fromhex("300a06082a8648ce3d040302")
"""AlgorithmIdentifier of ecdsa-with-SHA256 (RFC 5758 §3.2)."""
_P256_SPKI: Final = bytes.fromhex("3059301306072a8648ce3d020106082a8648ce3d030107034200")
"""What a SubjectPublicKeyInfo on P-256 starts with; the point follows."""
_SKI_OID: Final = bytes.fromhex("0603551d0e")
_SAN_OID: Final = bytes.fromhex("0603551d11")


def tlv(tag: int, *parts: bytes) -> bytes:
    """Write one element: tag, the shortest length, contents."""
    size = sum(map(len, parts))
    if size < 0x80:
        return b"".join((bytes((tag, size)), *parts))
    length = size.to_bytes((size.bit_length() + 7) // 8)
    return b"".join((bytes((tag, 0x80 | len(length))), length, *parts))


def certificate(tbs: bytes, signature: bytes) -> bytes:
    """Join what was signed with its ECDSA signature, itself in DER."""
    return tlv(_SEQUENCE, tbs, ECDSA_SHA256, tlv(_BIT_STRING, b"\x00", signature))


@dataclass(frozen=True, slots=True)
class LeafForm:
    """What all leaves of one authority have in common, encoded."""

    issuer_name: bytes
    fixed_extensions: bytes
    key_identifier: bytes

    @classmethod
    def of(cls, issuer: Issuer) -> "LeafForm":
        """Encode an issuer's part, by the library."""
        fixed = b"".join(map(encoded_extension, profile.LEAF_EXTENSIONS))
        return cls(issuer.name.public_bytes(), fixed, encoded_extension(issuer.key_identifier))

    def to_be_signed(self, leaf: Leaf, key: PublicKey) -> bytes:
        """Encode a leaf's TBSCertificate (RFC 5280 §4.1.2)."""
        spki = key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        subject = profile.leaf_subject(leaf)
        is_named = len(subject) > 0
        extensions = tlv(
            _SEQUENCE,
            self.fixed_extensions,
            _ski(spki, key),
            self.key_identifier,
            _san(leaf, critical=not is_named),
        )
        return tlv(
            _SEQUENCE,
            _V3,
            tlv(_INTEGER, leaf.serial.to_bytes(leaf.serial.bit_length() // 8 + 1)),
            ECDSA_SHA256,
            self.issuer_name,
            tlv(_SEQUENCE, encoded_time(leaf.validity.not_before), encoded_time(leaf.validity.not_after)),
            subject.public_bytes() if is_named else b"\x30\x00",
            spki,
            tlv(0xA3, extensions),
        )


def encoded_extension(extension: x509.Extension[x509.ExtensionType]) -> bytes:
    """Write one extension below id-ce (RFC 5280 §4.1)."""
    oid = _oid(extension.oid)
    value = tlv(_OCTET_STRING, extension.value.public_bytes())
    return tlv(_SEQUENCE, oid, _TRUE if extension.critical else b"", value)


def _oid(oid: x509.ObjectIdentifier) -> bytes:
    # id-ce: 2.5.29.n. No extension of the profile lies elsewhere.
    prefix, _, last = oid.dotted_string.rpartition(".")
    if prefix != "2.5.29" or int(last) > 127:
        raise ValueError(oid.dotted_string)
    return bytes((0x06, 3, 0x55, 0x1D, int(last)))


def _ski(spki: bytes, key: PublicKey) -> bytes:
    if isinstance(key, ec.EllipticCurvePublicKey) and spki.startswith(_P256_SPKI):
        digest = hashlib.sha1(spki[len(_P256_SPKI) :], usedforsecurity=False).digest()  # RFC 5280 §4.2.1.2 (1)
    else:
        digest = x509.SubjectKeyIdentifier.from_public_key(key).digest
    return tlv(_SEQUENCE, _SKI_OID, tlv(_OCTET_STRING, tlv(_OCTET_STRING, digest)))


def _san(leaf: Leaf, *, critical: bool) -> bytes:
    names: Sequence[bytes] = (
        tlv(_URI, str(leaf.spiffe_id).encode("ascii")),
        *(tlv(_DNS, name.encode("ascii")) for name in leaf.dns_names),
        *(tlv(_IP, address.packed) for address in leaf.ip_addresses),
    )
    return tlv(_SEQUENCE, _SAN_OID, _TRUE if critical else b"", tlv(_OCTET_STRING, tlv(_SEQUENCE, *names)))


@lru_cache(maxsize=64)  # the leaves of one batch begin and end together
def encoded_time(moment: datetime) -> bytes:
    """Write a time in whole seconds."""
    # RFC 5280 §4.1.2.5: two digits of the year up to 2049, then four.
    year = moment.year % 100 if moment.year < 2050 else moment.year
    tag, width = (_UTC_TIME, 2) if moment.year < 2050 else (_GENERALIZED_TIME, 4)
    text = f"{year:0{width}d}{moment.month:02d}{moment.day:02d}{moment.hour:02d}{moment.minute:02d}{moment.second:02d}Z"
    return tlv(tag, text.encode("ascii"))
