"""The public area of a TPM 2.0 key, read strictly, and the name that a TPM gives it (TPM 2.0 Library, Parts 1 and 2).

Only attestation keys are read: what is no restricted signing key that was made in its TPM and cannot leave it is
refused. Whether there is such a TPM is not known here.
"""

import hashlib
from dataclasses import dataclass
from enum import IntFlag
from typing import Final

from broker.errors import NotAttested

MAX_PUBLIC: Final = 1024
"""Bytes of a TPM2B_PUBLIC: one of RSA-4096 has 600."""

_RSA, _ECC, _NULL = 0x0001, 0x0023, 0x0010  # TPM_ALG_ID (Part 2 §6.3)
_HASHES: Final = {0x000B: "sha256", 0x000C: "sha384", 0x000D: "sha512"}
_SCHEMES: Final = {_RSA: (0x0014, 0x0016), _ECC: (0x0018,)}  # RSASSA and RSAPSS; ECDSA
_RSA_BITS: Final = (2048, 3072, 4096)
_EXPONENTS: Final = (0, 65537)  # zero stands for the default (Part 2 §12.2.3.5)
_CURVES: Final = {0x0003: 32, 0x0004: 48, 0x0005: 66}  # P-256, P-384, P-521: bytes of a coordinate


class Attributes(IntFlag):
    """TPMA_OBJECT (Part 2 §8.3). Every bit that is not here is reserved, or none of an attestation key's."""

    FIXED_TPM = 1 << 1
    ST_CLEAR = 1 << 2
    FIXED_PARENT = 1 << 4
    SENSITIVE_DATA_ORIGIN = 1 << 5
    USER_WITH_AUTH = 1 << 6
    ADMIN_WITH_POLICY = 1 << 7
    NO_DA = 1 << 10
    RESTRICTED = 1 << 16
    SIGN = 1 << 18


REQUIRED: Final = (
    Attributes.FIXED_TPM
    | Attributes.FIXED_PARENT
    | Attributes.SENSITIVE_DATA_ORIGIN
    | Attributes.RESTRICTED
    | Attributes.SIGN
)
"""What makes it an attestation key: born in its TPM, bound to it, and signing only what the TPM itself has made."""
_FORBIDDEN: Final = 0xFFFFFFFF & ~sum(Attributes)


@dataclass(frozen=True, slots=True)
class AttestationKey:
    """A public area that can be an attestation key's, by the name that its TPM knows it by."""

    name: bytes


def read_attestation_key(octets: bytes) -> AttestationKey:
    """Read a TPM2B_PUBLIC; raises NotAttested (``evidence_malformed``, ``ak_attributes``, ``ak_algorithm``)."""
    outer = _Reader(octets)
    area = outer.sized(MAX_PUBLIC)
    outer.end()
    reader = _Reader(area)
    kind, name_algorithm = reader.u16(), reader.u16()
    if kind not in _SCHEMES or name_algorithm not in _HASHES:
        raise _algorithm("it is neither RSA nor ECC with a SHA-2 name")
    _check_attributes(reader.u32())
    digest = _HASHES[name_algorithm]
    if len(reader.sized(64)) not in (0, hashlib.new(digest).digest_size):
        raise _malformed("its policy is no digest")
    _check_scheme(reader, kind)
    (_check_rsa if kind == _RSA else _check_ecc)(reader)
    reader.end()
    # NOTE(security): of the bytes that were judged, not of a name that the node gives (Part 1 §16).
    return AttestationKey(name_algorithm.to_bytes(2) + hashlib.new(digest, area).digest())


def _check_attributes(bits: int) -> None:
    if bits & REQUIRED != REQUIRED or bits & _FORBIDDEN:
        raise NotAttested(
            "the attestation key is not restricted, signing, and bound to the TPM that made it",
            code="ak_attributes",
            hint=f"its attributes are 0x{bits:08x}",
        )


def _check_scheme(reader: "_Reader", kind: int) -> None:
    if reader.u16() != _NULL:
        raise _algorithm("a signing key has no symmetric algorithm")
    if reader.u16() not in _SCHEMES[kind] or reader.u16() not in _HASHES:
        raise _algorithm("it does not sign by RSASSA, RSAPSS or ECDSA with SHA-2")


def _check_rsa(reader: "_Reader") -> None:
    bits, exponent = reader.u16(), reader.u32()
    if bits not in _RSA_BITS or exponent not in _EXPONENTS:
        raise _algorithm("its RSA parameters are not accepted")
    modulus = reader.sized(bits // 8)
    if len(modulus) != bits // 8 or not modulus[0] & 0x80 or not modulus[-1] & 1:
        raise _malformed("its modulus does not have the size that it says")


def _check_ecc(reader: "_Reader") -> None:
    size = _CURVES.get(reader.u16())
    if size is None or reader.u16() != _NULL:
        raise _algorithm("its curve is not P-256, P-384 or P-521, or it has a key derivation")
    for _ in "xy":
        if not reader.sized(size):
            raise _malformed("it has no point")


def _malformed(why: str) -> NotAttested:
    return NotAttested(f"the attestation key: {why}", code="evidence_malformed")


def _algorithm(why: str) -> NotAttested:
    return NotAttested(f"the attestation key: {why}", code="ak_algorithm")


class _Reader:
    """Big-endian numbers and sized buffers, one after another; raises NotAttested where they end too early."""

    def __init__(self, octets: bytes) -> None:
        self._rest = memoryview(octets)

    def u16(self) -> int:
        return int.from_bytes(self._take(2))

    def u32(self) -> int:
        return int.from_bytes(self._take(4))

    def sized(self, most: int) -> bytes:
        """Read a TPM2B: two bytes of length, then as many."""
        size = self.u16()
        if size > most:
            raise _malformed("a length is out of range")
        return self._take(size)

    def end(self) -> None:
        if self._rest:
            raise _malformed("there is something after it")

    def _take(self, count: int) -> bytes:
        if count > len(self._rest):
            raise _malformed("it is cut off")
        taken, self._rest = bytes(self._rest[:count]), self._rest[count:]
        return taken
