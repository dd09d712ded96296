"""Compact JWS and JWK, with the attacks of RFC 8725 on both."""

import base64
import hashlib
import hmac
import json
from collections.abc import Callable
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given
from hypothesis import strategies as st
from jwt.algorithms import ECAlgorithm, RSAAlgorithm, RSAPSSAlgorithm

from broker.errors import InvalidToken
from broker.spiffe import jose

ES256 = ECAlgorithm(ECAlgorithm.SHA256)
KEY = ec.generate_private_key(ec.SECP256R1())
RSA_KEY = rsa.generate_private_key(65537, 2048)
ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551


def sign(data: bytes) -> bytes:
    return ES256.sign(data, KEY)


def token(header: object, payload: object = None, signer: Callable[[bytes], bytes] = sign) -> str:
    def part(value: object) -> str:
        return jose.b64url_encode(value if isinstance(value, bytes) else json.dumps(value).encode())

    signing_input = f"{part(header)}.{part({'sub': 'x'} if payload is None else payload)}"
    return f"{signing_input}.{jose.b64url_encode(signer(signing_input.encode()))}"


def code_of(act: Callable[[], object]) -> str:
    with pytest.raises(InvalidToken) as caught:
        act()
    return caught.value.reason


def parse_code(text: Any, **options: Any) -> str:
    return code_of(lambda: jose.parse_compact(text, **options))


def test_a_token_is_cut_checked_and_written_again() -> None:
    text = jose.sign_compact({"alg": "ES256", "kid": "k", "typ": "JWT"}, {"sub": "ü", "n": 1}, sign)
    jws = jose.parse_compact(text)
    jose.verify_signature(jws, KEY.public_key(), "ES256")
    assert (jws.alg, jws.kid, jws.typ, jws.payload) == ("ES256", "k", "JWT", {"sub": "ü", "n": 1})
    assert b" " not in base64.urlsafe_b64decode(text.split(".")[1] + "==")
    assert text.split(".")[2] not in repr(jws)
    assert "sub" not in repr(jws)


def test_text_is_signed_to_the_character_under_each_header() -> None:
    body = '{"sub":"\\u00fc","n" : 1}'
    for kid in ("k", "l", "k"):
        header = {"alg": "ES256", "kid": kid, "typ": "at+jwt"}
        text = jose.sign_text(header, body, sign)
        jws = jose.parse_compact(text)
        jose.verify_signature(jws, KEY.public_key(), "ES256")
        assert (jws.kid, jws.typ, jws.payload) == (kid, "at+jwt", {"sub": "ü", "n": 1})
        head, written, _ = text.split(".")
        assert jose.b64url_decode(written).decode() == body
        assert head == jose.sign_compact(header, {}, sign).split(".")[0]


@pytest.mark.bears("JW13")
@pytest.mark.parametrize(
    "text", ["AB", "A", "AA==", "AA=", "AA\n", " AA", "A+", "A/", "A.", "é", "AA\x00", "AAA\n=", "AAAAA"]
)
def test_base64url_has_one_form(text: str) -> None:
    assert code_of(lambda: jose.b64url_decode(text)) == "token_encoding"


@given(st.binary(max_size=100))
def test_base64url_is_a_bijection(data: bytes) -> None:
    text = jose.b64url_encode(data)
    assert jose.b64url_decode(text) == data
    assert text == base64.urlsafe_b64encode(data).rstrip(b"=").decode()


@given(st.text("AQZaz09-_+/=.\n", max_size=12))
def test_whatever_decodes_encodes_back(text: str) -> None:
    try:
        data = jose.b64url_decode(text)
    except InvalidToken:
        return
    assert jose.b64url_encode(data) == text


@pytest.mark.bears("JW16", "JW17", "JW-01")
@pytest.mark.parametrize(
    "text",
    [
        "",
        ".",
        "..",
        "a.b",
        "a.b.c.d",
        "a.b.c.d.e",
        "." * 8000,
        '{"payload":"e30","signatures":[]}',
        '{"protected":"e30","payload":"e30","signature":"AA"}',
        "Bearer e30.e30.AA",
    ],
)
def test_only_three_parts_are_a_token(text: str) -> None:
    assert parse_code(text) in {"token_malformed", "token_encoding"}


def test_a_jwe_is_not_a_token() -> None:
    assert parse_code(".".join(["e30"] * 5)) == "token_malformed"


@pytest.mark.bears("JW16")
def test_sizes_are_bounded() -> None:
    assert parse_code("a" * 10_000_000) == "token_too_large"
    assert parse_code(token({"alg": "ES256", "kid": "k" * 2500})) == "token_malformed"
    assert parse_code(token({"alg": "ES256"}, b"[" * 1000 + b"]" * 1000)) == "token_malformed"
    assert jose.parse_compact(token({"alg": "ES256"}, {"a": "b" * 8000}), max_token=20_000).alg == "ES256"


@pytest.mark.bears("JW-02", "JW04", "JW06")
@pytest.mark.parametrize(
    "extra",
    [
        {"crit": ["x"]},
        {"crit": []},
        {"crit": ["b64"], "b64": False},
        {"jku": "https://169.254.169.254/"},
        {"x5u": "https://evil.example/"},
        {"x5c": ["MII"]},
        {"jwk": {"kty": "EC"}},
        {"zip": "DEF"},
        {"cty": "JWT"},
        {"x5t": "a"},
        {"ALG": "none"},
    ],
)
def test_other_header_parameters_are_refused(extra: dict[str, object]) -> None:
    assert parse_code(token({"alg": "ES256", "kid": "k"} | extra)) == "token_header"


@pytest.mark.bears("JW04", "JW06")
@pytest.mark.parametrize("name", ["crit", "b64", "jku", "x5u", "x5c", "zip", "enc"])
def test_some_parameters_cannot_even_be_allowed(name: str) -> None:
    allowed = jose.DEFAULT_HEADERS | {name}
    assert parse_code(token({"alg": "ES256", name: "x"}), allowed_headers=allowed) == "token_header"


def test_a_dpop_proof_may_carry_its_key() -> None:
    jwk = jose.jwk_from_public_key(KEY.public_key())
    text = token({"alg": "ES256", "typ": "dpop+jwt", "jwk": jwk})
    assert jose.parse_compact(text, allowed_headers=frozenset({"alg", "typ", "jwk"})).header["jwk"] == jwk


@pytest.mark.bears("JW-03", "JW14")
@pytest.mark.parametrize(
    "alg", ["none", "None", "", "HS256", "HS512", "EdDSA", "ES256K", "es256", "RS1", 5, None, ["ES256"]]
)
def test_other_algorithms_are_refused_before_anything_else(alg: object) -> None:
    assert parse_code(token({"alg": alg, "kid": "k"})) == "token_algorithm"
    assert parse_code(token({"kid": "k"})) == "token_algorithm"


@pytest.mark.bears("JW05")
@pytest.mark.parametrize("kid", ["", "k" * 257, "a\x00b", "a\nb", "ü", 5, None, ["k"], True])
def test_key_ids_are_short_printable_text(kid: object) -> None:
    assert parse_code(token({"alg": "ES256", "kid": kid})) == "token_header"


@pytest.mark.parametrize("typ", ["", 5, None, ["JWT"]])
def test_types_are_text(typ: object) -> None:
    assert parse_code(token({"alg": "ES256", "typ": typ})) == "token_header"


@pytest.mark.bears("JW09", "JW18")
@pytest.mark.parametrize(
    "payload",
    [
        b'{"aud":"a","aud":"b"}',
        b'{"sub":"a","s\\u0075b":"b"}',
        b"[]",
        b'"x"',
        b"5",
        b"",
        b"{} ",
        '{"sub":"x"}'.encode("utf-16"),
        b'{"sub":"\xff"}',
        b'{"sub":"\\ud800"}',
        b'{"exp":1e400}',
        b'{"exp":NaN}',
    ],
)
def test_payloads_are_one_strict_json_object(payload: bytes) -> None:
    if payload == b"{} ":
        assert jose.parse_compact(token({"alg": "ES256"}, payload)).payload == {}
        return
    assert parse_code(token({"alg": "ES256"}, payload)) == "token_malformed"


@pytest.mark.bears("JW09")
def test_headers_are_one_strict_json_object() -> None:
    assert parse_code(token(b'{"alg":"none","alg":"ES256"}')) == "token_malformed"
    assert parse_code(token(b"[]")) == "token_malformed"


def test_what_is_not_text_is_refused() -> None:
    for value in (None, b"a.b.c", 5):
        assert parse_code(value) == "token_malformed"


def family(alg: str) -> tuple[Any, Any]:
    if alg.startswith("ES"):
        curve = {"ES256": ec.SECP256R1, "ES384": ec.SECP384R1, "ES512": ec.SECP521R1}[alg]
        return ec.generate_private_key(curve()), ECAlgorithm(getattr(hashes, "SHA" + alg[2:]))
    return RSA_KEY, (RSAAlgorithm if alg.startswith("RS") else RSAPSSAlgorithm)(getattr(hashes, "SHA" + alg[2:]))


@pytest.mark.bears("JW-03")
@pytest.mark.parametrize("alg", sorted(jose.ALGORITHMS))
def test_each_of_the_nine_works_and_fits_its_own_key_only(alg: str) -> None:
    key, algorithm = family(alg)
    jws = jose.parse_compact(token({"alg": alg}, signer=lambda data: algorithm.sign(data, key)))
    jose.verify_signature(jws, key.public_key(), alg)
    for other in sorted(jose.ALGORITHMS - {alg}):
        stranger = family(other)[0]
        assert code_of(lambda: jose.verify_signature(jws, key.public_key(), other)) == "token_algorithm"  # noqa: B023
        if stranger is not key:
            assert code_of(lambda: jose.verify_signature(jws, stranger.public_key(), alg)) in {  # noqa: B023
                "token_algorithm",
                "token_signature",
            }


@pytest.mark.bears("JW15")
def test_the_curve_is_bound_to_the_algorithm() -> None:
    wide = ec.generate_private_key(ec.SECP384R1())
    # An ES384 signature with an ES256 label, and the other way round.
    mislabelled = token({"alg": "ES256"}, signer=lambda data: ECAlgorithm(ECAlgorithm.SHA256).sign(data, wide))
    assert code_of(lambda: jose.verify_signature(jose.parse_compact(mislabelled), wide.public_key(), "ES256")) == (
        "token_signature"
    )
    narrow = token({"alg": "ES384"}, signer=lambda data: ECAlgorithm(ECAlgorithm.SHA384).sign(data, KEY))
    assert code_of(lambda: jose.verify_signature(jose.parse_compact(narrow), KEY.public_key(), "ES384")) == (
        "token_signature"
    )


@pytest.mark.bears("JW15")
@pytest.mark.parametrize("curve", [ec.SECP256K1, ec.BrainpoolP256R1])
def test_another_curve_of_the_same_size_does_not_fit(curve: type[ec.EllipticCurve]) -> None:
    key = ec.generate_private_key(curve())
    jws = jose.parse_compact(token({"alg": "ES256"}, signer=lambda data: ES256.sign(data, key)))
    assert code_of(lambda: jose.verify_signature(jws, key.public_key(), "ES256")) == "token_signature"
    assert code_of(lambda: jose.jwk_from_public_key(key.public_key())) == "jwk_curve"


@pytest.mark.bears("JW-03")
def test_a_public_key_is_never_a_shared_secret() -> None:
    pem = KEY.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    forged = token({"alg": "HS256"}, signer=lambda data: hmac.digest(pem, data, "sha256"))
    assert parse_code(forged) == "token_algorithm"
    relabelled = token({"alg": "ES256"}, signer=lambda data: hmac.digest(pem, data, "sha256"))
    jws = jose.parse_compact(relabelled)
    assert code_of(lambda: jose.verify_signature(jws, KEY.public_key(), "ES256")) == "token_signature"


@pytest.mark.bears("JW14", "JW15")
@pytest.mark.parametrize("kind", ["der", "zero", "r-zero", "s-zero", "order", "empty", "short", "long", "flipped"])
def test_bad_signatures_are_refused(kind: str) -> None:
    def bad(data: bytes) -> bytes:
        good = sign(data)
        return {
            "der": KEY.sign(data, ec.ECDSA(hashes.SHA256())),
            "zero": bytes(64),
            "r-zero": bytes(32) + good[32:],
            "s-zero": good[:32] + bytes(32),
            "order": ORDER.to_bytes(32) * 2,
            "empty": b"",
            "short": good[:63],
            "long": good + b"\x00",
            "flipped": bytes([good[0] ^ 1]) + good[1:],
        }[kind]

    jws = jose.parse_compact(token({"alg": "ES256"}, signer=bad))
    assert code_of(lambda: jose.verify_signature(jws, KEY.public_key(), "ES256")) == "token_signature"


@pytest.mark.bears("JW14")
def test_a_mirrored_signature_is_another_text_of_the_same_token() -> None:
    # ECDSA allows n-s. It verifies, so a replay cache must know a token by what was signed, not by its text.
    def mirrored(data: bytes) -> bytes:
        r, s = decode_dss_signature(KEY.sign(data, ec.ECDSA(hashes.SHA256())))
        return r.to_bytes(32) + (ORDER - s).to_bytes(32)

    jws = jose.parse_compact(token({"alg": "ES256"}, signer=mirrored))
    jose.verify_signature(jws, KEY.public_key(), "ES256")


@pytest.mark.bears("JW14")
def test_a_changed_part_breaks_the_signature() -> None:
    header, payload, signature = token({"alg": "ES256"}, {"sub": "a"}).split(".")
    other = jose.b64url_encode(b'{"sub":"b"}')
    spaced = jose.b64url_encode(b'{"alg" :"ES256"}')
    for text in (f"{header}.{other}.{signature}", f"{spaced}.{payload}.{signature}"):
        jws = jose.parse_compact(text)
        assert code_of(lambda: jose.verify_signature(jws, KEY.public_key(), "ES256")) == "token_signature"  # noqa: B023


def test_weak_and_foreign_keys_are_refused() -> None:
    weak = rsa.generate_private_key(65537, 1024)
    algorithm = RSAAlgorithm(RSAAlgorithm.SHA256)
    jws = jose.parse_compact(token({"alg": "RS256"}, signer=lambda data: algorithm.sign(data, weak)))
    assert code_of(lambda: jose.verify_signature(jws, weak.public_key(), "RS256")) == "token_signature"
    edwards: Any = ed25519.Ed25519PrivateKey.generate().public_key()
    assert code_of(lambda: jose.verify_signature(jws, edwards, "RS256")) == "token_algorithm"


@pytest.mark.bears("JW10", "JW-08")
@pytest.mark.parametrize(
    "value", ["1", 1.0, 1.5, True, False, None, -1, 253402300800, 2**63, [], {}, "2026-01-01T00:00:00Z"]
)
def test_dates_are_whole_seconds(value: Any) -> None:
    for required in (True, False):
        assert code_of(lambda: jose.numeric_date({"exp": value}, "exp", required=required)) == "token_claim_invalid"  # noqa: B023


def test_dates_may_be_missing_only_where_optional() -> None:
    assert code_of(lambda: jose.numeric_date({}, "exp", required=True)) == "token_claim_missing"
    assert jose.numeric_date({}, "iat", required=False) is None
    assert jose.numeric_date({"exp": 0}, "exp", required=True) == 0
    assert jose.numeric_date({"exp": 253402300799}, "exp", required=True) == 253402300799


@pytest.mark.parametrize("curve", [ec.SECP256R1, ec.SECP384R1, ec.SECP521R1])
def test_ec_keys_survive_the_round_trip(curve: type[ec.EllipticCurve]) -> None:
    for _ in range(8):  # some coordinate begins with zeros now and then
        key = ec.generate_private_key(curve()).public_key()
        assert jose.public_key_from_jwk(dict(jose.jwk_from_public_key(key))) == key


def test_rsa_keys_survive_the_round_trip() -> None:
    jwk = jose.jwk_from_public_key(RSA_KEY.public_key())
    assert jose.public_key_from_jwk(dict(jwk)) == RSA_KEY.public_key()
    assert jwk["e"] == "AQAB"


def test_thumbprints_are_those_of_rfc_7638() -> None:
    # The example of RFC 7638 §3.1.
    modulus = (
        "0vx7agoebGcQSuuPiLJXZptN9nndrQmbXEps2aiAFbWhM78LhWx4cbbfAAtVT86zwu1RK7aPFFxuhDR1L6tSoc_BJECPebWKRXjBZCiFV4n3oknjhMst"
        "n64tZ_2W-5JsGY4Hc5n9yBXArwl93lqt7_RN5w6Cf0h4QyQ5v-65YGjQR0_FDW2QvzqY368QQMicAtaSqzs8KJZgnYb9c7d0zgdAZHzu6qMQvRL5hajrn"
        "1n91CbOpbISD08qNLyrdkt-bFTWhAI4vMQFh6WeZu0fM4lFd2NcRwr3XPksINHaQ-G_xBniIqbw0Ls1jF44-csFCur-kEgU8awapJzKnqDKgw"
    )
    key = jose.public_key_from_jwk({"kty": "RSA", "n": modulus, "e": "AQAB", "alg": "RS256", "kid": "2011-04-29"})
    assert jose.thumbprint(key) == "NzbLsXh8uDCcd-6MNwXF4W_7noWXFZAfHkxZsRGC9Xs"


def test_thumbprints_of_ec_keys_cover_the_required_members() -> None:
    jwk = jose.jwk_from_public_key(KEY.public_key())
    text = f'{{"crv":"P-256","kty":"EC","x":"{jwk["x"]}","y":"{jwk["y"]}"}}'
    assert jose.thumbprint(KEY.public_key()) == jose.b64url_encode(hashlib.sha256(text.encode()).digest())


def _ec_jwk(**changes: object) -> dict[str, Any]:
    return {**jose.jwk_from_public_key(KEY.public_key()), **changes}


def _rsa_jwk(**changes: object) -> dict[str, Any]:
    return {**jose.jwk_from_public_key(RSA_KEY.public_key()), **changes}


@pytest.mark.parametrize(
    ("jwk", "code"),
    [
        ({}, "jwk_key_type"),
        ({"kty": "oct", "x": "AA"}, "jwk_key_type"),
        ({"kty": "OKP", "crv": "Ed25519", "x": "AA"}, "jwk_key_type"),
        ({"kty": ["EC"]}, "jwk_key_type"),
        (_ec_jwk(use="enc"), "jwk_use"),
        (_ec_jwk(key_ops=["sign"]), "jwk_use"),
        (_ec_jwk(key_ops="verify"), "jwk_use"),
        (_ec_jwk(d="AA"), "jwk_private"),
        (_ec_jwk(k="AA"), "jwk_private"),
        (_rsa_jwk(p="AA"), "jwk_private"),
        (_ec_jwk(crv="secp256k1"), "jwk_curve"),
        (_ec_jwk(crv="P-384"), "jwk_malformed"),
        (_ec_jwk(crv=5), "jwk_malformed"),
        (_ec_jwk(x=None), "jwk_malformed"),
        (_ec_jwk(x="AA"), "jwk_malformed"),
        (_ec_jwk(x=jose.b64url_encode(bytes(32)), y=jose.b64url_encode(bytes(32))), "jwk_malformed"),
        (_ec_jwk(x=jose.b64url_encode(b"\x00" * 33)), "jwk_malformed"),
        (_ec_jwk(y=_ec_jwk()["y"] + "="), "token_encoding"),
        (_rsa_jwk(e="AQ"), "jwk_weak"),
        (_rsa_jwk(e="Ag"), "jwk_weak"),
        (_rsa_jwk(e=jose.b64url_encode(b"\x01" + bytes(5) + b"\x01")), "jwk_weak"),
        (_rsa_jwk(e="AAEAAQ"), "jwk_malformed"),
        (_rsa_jwk(n=jose.b64url_encode(b"\x80" + bytes(126) + b"\x01")), "jwk_weak"),
        (_rsa_jwk(n=jose.b64url_encode(b"\x80" + bytes(1100) + b"\x01")), "jwk_weak"),
        (_rsa_jwk(n=jose.b64url_encode(b"\x80" + bytes(255))), "jwk_weak"),
        (_rsa_jwk(n=5), "jwk_malformed"),
    ],
)
def test_bad_jwks_are_refused(jwk: dict[str, Any], code: str) -> None:
    assert code_of(lambda: jose.public_key_from_jwk(jwk)) == code


@pytest.mark.bears("I01")
@given(st.text(max_size=80) | st.text("abcEyJ0-_.=", max_size=80))
def test_any_text_is_a_token_or_a_typed_refusal(text: str) -> None:
    try:
        jose.parse_compact(text)
    except InvalidToken as error:
        assert text not in error.message or len(text) < 4  # noqa: PT017 - the refusal's own text is the subject
