"""Attestation keys as real TPMs write them, and what is none."""

import base64
import hashlib
import json
from pathlib import Path

import pytest

from broker.attestation.tpm_public import MAX_PUBLIC, REQUIRED, Attributes, read_attestation_key
from broker.errors import NotAttested
from tests.fakes.software_tpm import GOOD, ak_area, rsa_area, sized, u16

VECTORS = json.loads((Path(__file__).parent / "tpm_vectors.json").read_text())


def vector(name: str, member: str) -> bytes:
    return base64.b64decode(VECTORS[name][member])


def refusal(octets: bytes) -> str:
    with pytest.raises(NotAttested) as why:
        read_attestation_key(octets)
    return why.value.reason


@pytest.mark.parametrize("name", [name for name in VECTORS if name.startswith("ak ")])
def test_the_name_is_the_one_that_the_tpm_says(name) -> None:
    assert read_attestation_key(vector(name, "public")).name == vector(name, "name")


@pytest.mark.parametrize("name", [name for name in VECTORS if name.startswith("other ")])
def test_a_tpms_other_keys_attest_nothing(name) -> None:
    assert refusal(vector(name, "public")) == "ak_attributes"


@pytest.mark.bears("I10")
def test_every_octet_of_the_area_is_named() -> None:
    area = ak_area(policy=b"\x07" * 32)
    assert read_attestation_key(sized(area)).name == u16(0x000B) + hashlib.sha256(area).digest()
    names = {read_attestation_key(sized(ak_area(policy=bytes([n]) * 32))).name for n in range(8)}
    assert len(names) == 8


@pytest.mark.parametrize("missing", list(REQUIRED))
def test_each_required_attribute(missing) -> None:
    assert refusal(sized(ak_area(attributes=GOOD & ~missing))) == "ak_attributes"


@pytest.mark.parametrize("bit", range(32))
def test_no_other_attribute_than_an_attestation_keys(bit) -> None:
    octets = sized(ak_area(attributes=GOOD | 1 << bit))
    if 1 << bit in list(Attributes):
        read_attestation_key(octets)
    else:
        # decrypt (17), encryptedDuplication (11), x509sign (19), and what is reserved
        assert refusal(octets) == "ak_attributes"


@pytest.mark.parametrize(
    "area",
    [
        pytest.param(ak_area(kind=0x0008), id="HMAC key"),
        pytest.param(ak_area(kind=0x0025), id="symmetric key"),
        pytest.param(ak_area(name=0x0004), id="SHA-1 name"),
        pytest.param(ak_area(name=0x0010), id="no name"),
        pytest.param(ak_area(symmetric=u16(0x0006) + u16(128) + u16(0x0043)), id="symmetric algorithm"),
        pytest.param(ak_area(scheme=u16(0x0010)), id="no scheme"),
        pytest.param(ak_area(scheme=u16(0x0014) + u16(0x000B)), id="RSA's scheme"),
        pytest.param(ak_area(scheme=u16(0x001A) + u16(0x000B)), id="ECDAA"),
        pytest.param(ak_area(scheme=u16(0x0018) + u16(0x0004)), id="signs SHA-1"),
        pytest.param(ak_area(details=u16(0x0001) + u16(0x0010)), id="P-192"),
        pytest.param(ak_area(details=u16(0x0010) + u16(0x0010)), id="BN-256"),
        pytest.param(ak_area(details=u16(0x0003) + u16(0x0020)), id="a key derivation"),
        pytest.param(rsa_area(1024), id="RSA-1024"),
        pytest.param(rsa_area(8192, modulus=b"\xc3" * 256), id="RSA-8192"),
        pytest.param(rsa_area(exponent=3), id="exponent 3"),
    ],
)
def test_algorithms(area) -> None:
    assert refusal(sized(area)) == "ak_algorithm"


@pytest.mark.parametrize(
    "octets",
    [
        pytest.param(b"", id="nothing"),
        pytest.param(b"\x00", id="half a length"),
        pytest.param(b"\x00\x00", id="empty"),
        pytest.param(ak_area(), id="not sized"),
        pytest.param(u16(len(ak_area()) + 1) + ak_area(), id="longer than it is"),
        pytest.param(u16(len(ak_area()) - 1) + ak_area(), id="shorter than it is"),
        pytest.param(sized(ak_area()) + b"\x00", id="something after it"),
        pytest.param(sized(ak_area() + b"\x00"), id="something after the area"),
        pytest.param(sized(ak_area(policy=b"\x01" * 31)), id="policy of another size"),
        pytest.param(sized(ak_area(policy=b"\x01" * 65)), id="policy beyond all digests"),
        pytest.param(sized(ak_area(unique=sized(b"") + sized(b"\x22" * 32))), id="no x"),
        pytest.param(sized(ak_area(unique=sized(b"\x11" * 33) + sized(b"\x22" * 32))), id="x too long"),
        pytest.param(sized(ak_area(unique=sized(b"\x11" * 32))), id="no y"),
        pytest.param(sized(rsa_area(modulus=b"\xc3" * 255)), id="modulus too short"),
        pytest.param(sized(rsa_area(modulus=b"\xc3" * 257)), id="modulus too long"),
        pytest.param(sized(rsa_area(modulus=b"\x43" + b"\xc3" * 255)), id="modulus of 2047 bits"),
        pytest.param(sized(rsa_area(modulus=b"\xc3" * 255 + b"\xc2")), id="modulus even"),
        pytest.param(b"\xff" * (MAX_PUBLIC + 1), id="too large"),
    ],
)
def test_malformed(octets) -> None:
    assert refusal(octets) == "evidence_malformed"


def test_cut_off_anywhere() -> None:
    whole = vector("ak rsassa", "public")
    for end in range(0, len(whole), 7):
        assert refusal(whole[:end]) == "evidence_malformed"
        # A length that fits what is left does not help.
        assert refusal(sized(whole[2:end])) in {"evidence_malformed", "ak_algorithm"}
