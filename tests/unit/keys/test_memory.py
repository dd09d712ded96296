import pickle

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from broker.errors import Conflict, NotFound
from broker.keys import MemoryKeys
from broker.keys.local import generated


def test_a_key_signs_as_jose_wants_it():
    signer = generated("a")
    raw = signer.sign(b"text")
    assert len(raw) == 64
    der = encode_dss_signature(int.from_bytes(raw[:32]), int.from_bytes(raw[32:]))
    signer.public_key.verify(der, b"text", ec.ECDSA(hashes.SHA256()))
    with pytest.raises(InvalidSignature):
        signer.public_key.verify(der, b"other", ec.ECDSA(hashes.SHA256()))


def test_a_key_signs_as_x509_wants_it():
    signer = generated("a")
    signer.public_key.verify(signer.sign_der(b"text"), b"text", ec.ECDSA(hashes.SHA256()))


async def test_keys_are_found_by_name_and_forgotten():
    keys = MemoryKeys()
    one, two = await keys.generate("one"), await keys.generate("two")
    assert keys.signer("one") is one
    assert one.public_key != two.public_key
    assert set(keys.ids()) == {"one", "two"}
    with pytest.raises(Conflict):
        await keys.generate("one")
    await keys.remove("one")
    await keys.remove("one")
    with pytest.raises(NotFound):
        keys.signer("one")


async def test_nothing_shows_a_key():
    keys = MemoryKeys()
    signer = await keys.generate("one")
    for text in (repr(keys), repr(signer), f"{signer}"):
        assert "<secret>" in text
        assert str(signer.public_key.public_numbers().x) not in text
    with pytest.raises(TypeError):
        pickle.dumps(signer)
