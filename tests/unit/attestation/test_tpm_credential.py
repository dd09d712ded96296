"""MakeCredential, against a TPM that derives and decrypts by other means."""

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed25519, rsa
from cryptography.hazmat.primitives.kdf.concatkdf import ConcatKDFHash
from hypothesis import given
from hypothesis import strategies as st

from broker.attestation import tpm_credential
from broker.attestation.contract import AttestorFailed
from broker.attestation.tpm_credential import EndorsementKey, kdfa, kdfe, make_credential
from broker.errors import NotAttested
from tests.fakes.software_tpm import SoftwareTpm, derived, unsized

KEYS = {
    "RSA-2048": rsa.generate_private_key(65537, 2048),
    "RSA-3072": rsa.generate_private_key(65537, 3072),
    "P-256": ec.generate_private_key(ec.SECP256R1()),
    "P-384": ec.generate_private_key(ec.SECP384R1()),
}
NAME, SECRET = b"\x00\x0b" + b"n" * 32, bytes(range(32))


@pytest.mark.parametrize("key", KEYS.values(), ids=KEYS)
def test_the_tpm_opens_it(key) -> None:
    made = make_credential(EndorsementKey.of(key.public_key()), NAME, SECRET)
    assert SoftwareTpm(key).open(NAME, made.blob, made.encrypted_seed) == SECRET
    assert SECRET not in made.blob and "SECRET" not in repr(made)


@pytest.mark.parametrize("key", KEYS.values(), ids=KEYS)
def test_another_key_another_name_a_changed_octet(key) -> None:
    made = make_credential(EndorsementKey.of(key.public_key()), NAME, SECRET)
    tpm = SoftwareTpm(key)
    with pytest.raises(AttestorFailed):
        tpm.open(NAME[:-1] + b"m", made.blob, made.encrypted_seed)
    changed = made.blob[:-1] + bytes([made.blob[-1] ^ 1])
    with pytest.raises(AttestorFailed):
        tpm.open(NAME, changed, made.encrypted_seed)
    other = make_credential(EndorsementKey.of(key.public_key()), NAME, SECRET)
    assert {made.blob, made.encrypted_seed}.isdisjoint({other.blob, other.encrypted_seed})
    with pytest.raises(AttestorFailed):
        tpm.open(NAME, made.blob, other.encrypted_seed)


@pytest.mark.parametrize("key", [KEYS["P-256"], KEYS["P-384"]], ids=["P-256", "P-384"])
@pytest.mark.parametrize("of", ["point", "shared"])
def test_coordinates_keep_their_leading_zeros(key, of) -> None:
    ek = EndorsementKey.of(key.public_key())
    width = key.curve.key_size // 8

    def leads(own) -> bool:
        x = own.public_key().public_numbers().x.to_bytes(width)
        return (x if of == "point" else own.exchange(ec.ECDH(), key.public_key()))[0] == 0

    own = next(one for _ in range(20_000) if leads(one := ec.generate_private_key(key.curve)))
    seed, sent = tpm_credential._ecc_seed(ek.key, own, ek.suite)
    assert SoftwareTpm(key)._seed(ek.suite.hash, sent) == seed
    assert len(sent) == 2 * (2 + width)


@pytest.mark.parametrize(
    "key",
    [
        pytest.param(lambda: rsa.generate_private_key(65537, 1024), id="RSA-1024"),
        pytest.param(lambda: rsa.generate_private_key(65537, 2056), id="RSA-2056"),
        pytest.param(lambda: rsa.generate_private_key(3, 2048), id="exponent 3"),
        pytest.param(lambda: ec.generate_private_key(ec.SECP521R1()), id="P-521"),
        pytest.param(lambda: ec.generate_private_key(ec.SECP256K1()), id="secp256k1"),
        pytest.param(ed25519.Ed25519PrivateKey.generate, id="Ed25519"),
        pytest.param(lambda: dsa.generate_private_key(1024), id="DSA"),
    ],
)
def test_other_kinds_of_key(key) -> None:
    with pytest.raises(NotAttested) as why:
        EndorsementKey.of(key().public_key())
    assert why.value.reason == "ek_key"


@pytest.mark.bears("I12")
@pytest.mark.parametrize("bits", [1024, 4096, 16384])
def test_rsa_numbers_of_another_size(bits) -> None:
    key = rsa.RSAPublicNumbers(65537, (1 << bits) - 1).public_key()
    with pytest.raises(NotAttested) as why:
        EndorsementKey.of(key)
    assert why.value.reason == "ek_key"


@given(key=st.binary(min_size=16, max_size=48), context=st.binary(max_size=64), size=st.integers(1, 100))
def test_kdfa_is_sp_800_108(key, context, size) -> None:
    for digest in (hashes.SHA256(), hashes.SHA384()):
        assert kdfa(digest, key, b"STORAGE", context, size * 8) == derived(digest, key, b"STORAGE", context, size)


@given(shared=st.binary(min_size=1, max_size=66), parties=st.binary(max_size=132))
def test_kdfe_is_sp_800_56a(shared, parties) -> None:
    digest = hashes.SHA384()
    wanted = ConcatKDFHash(digest, 48, b"IDENTITY\0" + parties).derive(shared)
    assert kdfe(digest, shared, b"IDENTITY", parties) == wanted


def test_the_blob_is_two_sized_parts() -> None:
    made = make_credential(EndorsementKey.of(KEYS["P-256"].public_key()), NAME, SECRET)
    assert len(unsized(made.blob)) == 2 + 32 + 2 + 32
