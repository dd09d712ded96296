"""What stands in a certificate that a library would let through, and we do not (RFC 5280 §4.1.2.2, RFC 5480 §2.1.1)."""

from typing import Any

import pytest
from cryptography import x509

from broker.errors import InvalidSvid
from broker.spiffe.certificates import MAX_CERTIFICATE, load, read

P256 = bytes.fromhex("06082a8648ce3d030107")
PRIME = bytes.fromhex("ffffffff00000001000000000000000000000000ffffffffffffffffffffffff")
A = PRIME[:-1] + b"\xfc"
B = bytes.fromhex("5ac635d8aa3a93e7b3ebbd55769886bc651d06b0cc53b0f63bce3c3e27d2604b")
ORDER = bytes.fromhex("ffffffff00000000ffffffffffffffffbce6faada7179e84f3b9cac2fc632551")
POINT = bytes.fromhex(
    "046b17d1f2e12c4247f8bce6e563a440f277037d812deb33a0f4a13945d898c296"
    "4fe342e2fe1a7f9b8ee7eb4a7c0f9e162bce33576b315ececbb6406837bf51f5"
)


def tlv(tag: int, *content: bytes) -> bytes:
    body = b"".join(content)
    size = len(body)
    head = bytes([size]) if size < 128 else bytes([0x81, size]) if size < 256 else b"\x82" + size.to_bytes(2)
    return bytes([tag]) + head + body


def within(der: bytes) -> tuple[bytes, bytes]:
    """Cut a value into its content and what follows it."""
    width = der[1] & 0x7F if der[1] & 0x80 else 0
    size = int.from_bytes(der[2 : 2 + width]) if width else der[1]
    return der[2 + width : 2 + width + size], der[2 + width + size :]


def respelled(der: bytes, change: Any) -> bytes:
    """Write a certificate anew with other fields to be signed: each is one DER value. Nobody has signed it so."""
    signed, rest = within(within(der)[0])
    fields = []
    while signed:
        after = within(signed)[1]
        fields.append(signed[: len(signed) - len(after)])
        signed = after
    change(fields)
    return tlv(0x30, tlv(0x30, *fields), rest)


def code_of(der: bytes) -> str:
    with pytest.raises(InvalidSvid) as caught:
        read(load(der))
    return caught.value.reason


def test_a_serial_number_has_at_most_twenty_octets(pki: Any) -> None:
    der = pki.leaf(pki.root(), serial=(1 << 159) - 1).der
    assert read(load(der)).certificate.serial_number == (1 << 159) - 1

    def longer(fields: list[bytes]) -> None:
        fields[1] = tlv(0x02, b"\x00\x80" + bytes(19))

    assert code_of(respelled(der, longer)) == "svid_malformed"


def test_it_is_of_version_3_and_not_too_large(pki: Any) -> None:
    der = pki.leaf(pki.root()).der
    for version in (0, 1):

        def older(fields: list[bytes], version: int = version) -> None:
            fields[0] = tlv(0xA0, tlv(0x02, bytes([version])))

        assert code_of(respelled(der, older)) == "svid_malformed"
    # Before it is parsed.
    assert code_of(bytes(MAX_CERTIFICATE + 1)) == "svid_too_large"


def test_a_curve_is_named_and_not_spelled_out(pki: Any) -> None:
    der = pki.leaf(pki.root()).der
    field = tlv(0x30, bytes.fromhex("06072a8648ce3d0101"), tlv(0x02, b"\x00" + PRIME))
    curve = tlv(0x30, tlv(0x04, A), tlv(0x04, B))
    spelled = tlv(
        0x30, tlv(0x02, b"\x01"), field, curve, tlv(0x04, POINT), tlv(0x02, b"\x00" + ORDER), tlv(0x02, b"\x01")
    )

    def spell(fields: list[bytes]) -> None:
        algorithm, key = within(within(fields[6])[0])
        fields[6] = tlv(0x30, tlv(0x30, algorithm.replace(P256, spelled)), key)

    assert respelled(der, lambda _: None) == der
    assert code_of(respelled(der, spell)) == "svid_weak_key"


def test_policy_constraints_are_refused_also_where_they_are_not_critical(pki: Any) -> None:
    constraints = x509.PolicyConstraints(0, None)
    for critical in (False, True):
        der = pki.leaf(pki.root(), extra=[(constraints, critical)]).der
        assert code_of(der) == "svid_critical_extension"
