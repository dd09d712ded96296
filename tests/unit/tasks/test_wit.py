"""A workload identity token and its proof: both, for this address, by the key that the token names."""

import hashlib
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec

from broker.errors import Invalid, InvalidToken
from broker.sdk.dpop import ProofKey
from broker.spiffe import TrustDomain, jose
from broker.spiffe.jose import b64url_encode
from broker.tasks import Resource
from broker.tasks.dpop import PROOF_LEEWAY
from broker.tasks.wit import ProvenWit, read_wit_keys, verify_wit
from tests.unit.tasks.world import NOW, TokenKey

SIGNER = TokenKey("wit-1")
KEYS = {TrustDomain("example.org"): SIGNER.public}
HOLDER = ProofKey()
ENDPOINT = Resource("https://broker.example.org:8443/token")
AT = int(NOW.timestamp())


def wit(*, typ: str = "wit+jwt", signer: TokenKey = SIGNER, jwk: Any = None, **changes: Any) -> str:
    claims = {
        "sub": "spiffe://example.org/agent",
        "exp": AT + 60,
        "cnf": {"jwk": jwk or {**HOLDER._jwk, "alg": "ES256"}},
    }
    return signer.token({k: v for k, v in (claims | changes).items() if v is not None}, typ=typ)


def wpt(of: str, *, typ: str = "wpt+jwt", alg: str = "ES256", holder: ProofKey = HOLDER, **changes: Any) -> str:
    hashed = b64url_encode(hashlib.sha256(of.encode()).digest())
    claims = {"aud": ENDPOINT.text, "exp": AT + 30, "jti": "j1", "wth": hashed}
    claims = {k: v for k, v in (claims | changes).items() if v is not None}
    return jose.sign_compact({"alg": alg, "typ": typ}, claims, holder._sign)


def shown(of: str, proof: str | None = None) -> ProvenWit:
    return verify_wit(of, wpt(of) if proof is None else proof, KEYS, address=ENDPOINT, now=NOW)


def refused(of: str, proof: str | None = None) -> str:
    with pytest.raises(InvalidToken) as caught:
        shown(of, proof)
    return caught.value.reason


def test_a_workload_with_its_proof() -> None:
    found = shown(wit())
    assert str(found.id) == "spiffe://example.org/agent"
    assert found.proof.jkt == HOLDER.jkt
    # Remembered for longer than any replica takes it, whose clock may be behind by as much as ours is ahead.
    assert int(found.proof.expires_at.timestamp()) == AT + 30 + 2 * PROOF_LEEWAY
    with pytest.raises(TypeError):
        ProvenWit(found.id, NOW, found.proof, object())


@pytest.mark.bears("SP03", "JW07")
@pytest.mark.parametrize(
    "changes",
    [
        {"typ": "JWT"},
        {"typ": "at+jwt"},
        {"signer": TokenKey("wit-1")},
        {"signer": TokenKey("wit-2")},
        {"sub": "spiffe://other.example/agent"},
        {"sub": "spiffe://example.org"},
        {"sub": None},
        {"exp": AT - 31},
        {"exp": None},
        {"nbf": AT + 31},
        {"iat": AT + 31},
        {"cnf": None},
        {"cnf": {}},
        {"cnf": {"jwk": HOLDER._jwk}},
        {"jwk": {**HOLDER._jwk, "alg": "ES384"}},
        {"jwk": {**HOLDER._jwk, "alg": "ES256", "d": "x"}},
    ],
)
def test_another_wit_is_refused(changes: dict[str, Any]) -> None:
    assert refused(wit(**changes)) == "invalid_wit"


@pytest.mark.bears("PB16")
@pytest.mark.parametrize(
    "changes",
    [
        {"typ": "dpop+jwt"},
        {"alg": "ES384"},
        {"holder": ProofKey()},
        {"aud": "https://other.example/token"},
        {"aud": ENDPOINT.text + "?q=1"},
        {"aud": [ENDPOINT.text]},
        {"exp": AT - 31},
        {"exp": AT + 3600},
        {"jti": None},
        {"jti": "x" * 200},
        {"wth": None},
        {"wth": b64url_encode(bytes(32))},
        {"ath": b64url_encode(bytes(32))},
        {"tth": b64url_encode(bytes(32))},
        {"oth": {"x-other": "hash"}},
        {"oth": {}},
    ],
)
def test_another_proof_is_refused(changes: dict[str, Any]) -> None:
    good = wit()
    assert refused(good, wpt(good, **changes)) == "invalid_wpt"


@pytest.mark.bears("PB16")
def test_a_wit_is_no_bearer_token() -> None:
    assert refused(wit(), "") == "invalid_wpt"
    assert refused(wit(), wit()) == "invalid_wpt"
    assert refused(wit(), wpt(wit(sub="spiffe://example.org/other"))) == "invalid_wpt"


def test_the_keys_that_sign_wits_are_read_from_their_own_set() -> None:
    jwk = {**jose.jwk_from_public_key(ec.generate_private_key(ec.SECP256R1()).public_key()), "kid": "k1"}
    assert set(read_wit_keys({"keys": [{**jwk, "use": "wit-svid"}, {**jwk, "use": "jwt-svid"}]})) == {"k1"}
    for wrong in (
        {},
        {"keys": []},
        {"keys": [{**jwk, "kid": ""}]},
        {"keys": [jwk, jwk]},
        {"keys": [{**jwk, "use": "jwt-svid"}]},
    ):
        with pytest.raises(Invalid):
            read_wit_keys(wrong)
