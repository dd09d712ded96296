"""The task-token keys as a JWK Set: what is written is read back, and nothing else is taken."""

import json

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from broker.errors import Invalid
from broker.spiffe.jose import jwk_from_public_key
from broker.tasks.keyset import MAX_KEYS, read_keys, write_keys

ONE, TWO = (ec.generate_private_key(ec.SECP256R1()).public_key() for _ in range(2))


def test_round_trip_in_one_order() -> None:
    assert read_keys(write_keys({"b": TWO, "a": ONE})) == {"a": ONE, "b": TWO}
    assert write_keys({"b": TWO, "a": ONE}) == write_keys({"a": ONE, "b": TWO})
    assert read_keys(write_keys({})) == {}


def jwk(**members: object) -> dict[str, object]:
    made = {**jwk_from_public_key(ONE), "kid": "a", "alg": "ES256"} | members
    return {name: value for name, value in made.items() if value is not None}


@pytest.mark.parametrize(
    "document",
    [
        "{}",
        '{"keys": {}}',
        "[]",
        json.dumps({"keys": [jwk(kid=None)]}),
        json.dumps({"keys": [jwk(kid="")]}),
        json.dumps({"keys": [jwk(alg="ES384")]}),
        json.dumps({"keys": [jwk(alg=None)]}),
        json.dumps({"keys": [jwk(), jwk()]}),
        json.dumps({"keys": [jwk(d="AAAA")]}),
        json.dumps({"keys": [jwk(x="AAAA")]}),
        json.dumps({"keys": [jwk_from_public_key(ec.generate_private_key(ec.SECP384R1()).public_key()) | {"kid": "a", "alg": "ES256"}]}),
        json.dumps({"keys": [jwk(kid=str(n)) for n in range(MAX_KEYS + 1)]}),
        json.dumps({"keys": ["a"]}),
    ],
)  # fmt: skip
def test_what_is_not_such_a_set_is_refused(document: str) -> None:
    with pytest.raises(Invalid):
        read_keys(document)
