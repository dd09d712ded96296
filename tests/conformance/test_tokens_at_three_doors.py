"""One token, three judges: the agent's ValidateJWTSVID, the library, and the exchange's actor_token always agree."""

import contextlib
import json
import os
import socket
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

from broker.clock import SystemClock
from broker.errors import InvalidSvid
from broker.spiffe import jose, verify_jwt_svid
from broker.spiffe.jose import b64url_decode, b64url_encode
from tests.conformance.house import ONE, House, Replica
from tests.conformance.token_doors import TokenDoors, Verdicts

ORDER = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551  # of P-256
GENEROUS = 20.0  # seconds for the three of them, where each takes a millisecond: it bounds blow-ups, not speed


@pytest.fixture
def doors(house: House) -> Iterator[TokenDoors]:
    with closing(TokenDoors(house)) as one:
        yield one


class Forge:
    """Tokens that differ from a good one in one thing."""

    def __init__(self, replica: Replica, audience: str) -> None:
        self.replica, self.audience = replica, audience

    def good(self, **claims: Any) -> str:
        return self.replica.token(**{"aud": [self.audience], **claims})

    def texts(self) -> tuple[str, str]:
        return json.dumps(self.replica.header()), json.dumps(self.replica.claims(aud=[self.audience]))

    def payload(self, change: Callable[[str], str | bytes]) -> str:
        header, claims = self.texts()
        return self.replica.raw(header, change(claims))

    def header(self, change: Callable[[str], str | bytes]) -> str:
        header, claims = self.texts()
        return self.replica.raw(change(header), claims)

    def signature(self, change: Callable[[bytes], bytes]) -> str:
        signed, _, signature = self.good().rpartition(".")
        return f"{signed}.{b64url_encode(change(b64url_decode(signature)))}"

    def text(self, change: Callable[[str], str]) -> str:
        return change(self.good())


def halves(signature: bytes) -> tuple[int, int]:
    return int.from_bytes(signature[:32]), int.from_bytes(signature[32:])


def joined(r: int, s: int) -> bytes:
    return r.to_bytes(32) + s.to_bytes(32)


def spare_bits(token: str) -> str:
    """The same bytes, by another last character: 64 bytes leave four bits that mean nothing."""
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    return token[:-1] + alphabet[alphabet.index(token[-1]) ^ 1]


FORGED: dict[str, Callable[[Forge], str]] = {
    # one meaning for one text
    "name twice in the payload": lambda f: f.payload(lambda p: p[:-1] + f', "sub": "{ONE}x"}}'),
    "the same name twice with one value": lambda f: f.payload(lambda p: p[:-1] + f', "sub": "{ONE}"}}'),
    "name twice in the header": lambda f: f.header(lambda h: h[:-1] + ', "alg": "ES256"}'),
    "NaN": lambda f: f.payload(lambda p: p[:-1] + ', "x": NaN}'),
    "Infinity": lambda f: f.payload(lambda p: p[:-1] + ', "x": 1e999}'),
    "UTF-16": lambda f: f.payload(lambda p: p.encode("utf-16")),
    "byte order mark": lambda f: f.payload(lambda p: b"\xef\xbb\xbf" + p.encode()),
    "not UTF-8": lambda f: f.payload(lambda p: p.encode()[:-1] + b', "x": "\xff"}'),
    "lone surrogate": lambda f: f.payload(lambda p: p[:-1] + ', "x": "\\ud800"}'),
    "deep": lambda f: f.payload(lambda p: p[:-1] + ', "x": ' + "[" * 2000 + "]" * 2000 + "}"),
    "long number": lambda f: f.payload(lambda p: p[:-1] + ', "x": ' + "9" * 5000 + "}"),
    "more after the payload": lambda f: f.payload(lambda p: p + "{}"),
    "comment": lambda f: f.payload(lambda p: p + "/* x */"),
    "payload is a list": lambda f: f.payload(lambda p: f"[{p}]"),
    "payload is text": lambda f: f.payload(json.dumps),
    "payload is empty": lambda f: f.payload(lambda _: ""),
    "payload is null": lambda f: f.payload(lambda _: "null"),
    "header is a list": lambda f: f.header(lambda h: f"[{h}]"),
    "header is empty": lambda f: f.header(lambda _: ""),
    # one text for one meaning
    "padding": lambda f: f.text(lambda t: t + "=="),
    "spare bits": lambda f: f.text(spare_bits),
    "space before": lambda f: f.text(lambda t: " " + t),
    "line feed after": lambda f: f.text(lambda t: t + "\n"),
    "line feed within": lambda f: f.text(lambda t: t.replace(".", "\n.", 1)),
    "Bearer before it": lambda f: f.text(lambda t: f"Bearer {t}"),
    "percent-encoded": lambda f: f.text(lambda t: t.replace(".", "%2E")),
    "standard alphabet": lambda f: f.text(lambda t: t[:-2] + "+/"),
    "not ASCII": lambda f: f.text(lambda t: t[:-1] + "\u212a"),
    "NUL": lambda f: f.text(lambda t: t + "\x00"),
    "two parts": lambda f: f.text(lambda t: t.rpartition(".")[0]),
    "four parts": lambda f: f.text(lambda t: t + ".AA"),
    "five parts": lambda f: f.text(lambda t: t + ".AA.AA"),
    "nothing but dots": lambda f: f.text(lambda _: ".."),
    "a token within a token": lambda f: f.replica.raw(json.dumps(f.replica.header(cty="JWT")), f.good()),
    # signatures
    "no signature": lambda f: f.signature(lambda _: b""),
    "zeros": lambda f: f.signature(lambda _: bytes(64)),
    "r is the order": lambda f: f.signature(lambda s: joined(ORDER, halves(s)[1])),
    "s is the order": lambda f: f.signature(lambda s: joined(halves(s)[0], ORDER)),
    "r is zero": lambda f: f.signature(lambda s: joined(0, halves(s)[1])),
    "s is zero": lambda f: f.signature(lambda s: joined(halves(s)[0], 0)),
    "r and s swapped": lambda f: f.signature(lambda s: s[32:] + s[:32]),
    "DER": lambda f: f.signature(lambda s: encode_dss_signature(*halves(s))),
    "one byte short": lambda f: f.signature(lambda s: s[:-1]),
    "one byte long": lambda f: f.signature(lambda s: s + b"\x00"),
    "zeros before": lambda f: f.signature(lambda s: bytes(2) + s),
    "one bit": lambda f: f.signature(lambda s: s[:-1] + bytes([s[-1] ^ 1])),
    "of other claims": lambda f: f.good().rpartition(".")[0] + "." + f.good(jti="2").rpartition(".")[2],
    "of another key": lambda f: f.signature(lambda s: joined(1, 1)),
    # keys that the token brings, and names of keys that are more than names
    "its own key": lambda f: f.header(lambda h: h[:-1] + f', "jwk": {json.dumps(jose.jwk_from_public_key(f.replica.jwt_key.public_key()))}}}'),
    "kid is a path": lambda f: f.header(lambda h: h.replace(f.replica.kid, "../../dev/null")),
    "kid is a query": lambda f: f.header(lambda h: h.replace(f.replica.kid, "x' OR '1'='1")),
    "kid with a space": lambda f: f.header(lambda h: h.replace(f.replica.kid, f.replica.kid + " ")),
    "kid in upper case": lambda f: f.header(lambda h: h.replace(f.replica.kid, f.replica.kid.upper())),
    "kid with NUL": lambda f: f.header(lambda h: h.replace(f.replica.kid, f.replica.kid + "\\u0000")),
    "alg with a space": lambda f: f.header(lambda h: h.replace("ES256", "ES256 ")),
    "Alg": lambda f: f.header(lambda h: h.replace('"alg"', '"Alg"')),
    # sizes
    "a long header": lambda f: f.header(lambda h: h[:-1] + " " * 3000 + "}"),
    "a long payload": lambda f: f.payload(lambda p: p[:-1] + f', "x": "{"x" * 9000}"}}'),
    "a megabyte": lambda f: f.text(lambda t: t + "A" * (1 << 20)),
    "a megabyte of dots": lambda f: f.text(lambda _: "." * (1 << 20)),
    "many audiences": lambda f: f.good(aud=[f"a{number}" for number in range(70)] + [f.audience]),
}  # fmt: skip
SOUND: dict[str, Callable[[Forge], str]] = {
    "good": lambda f: f.good(),
    "white space between members": lambda f: f.payload(lambda p: p.replace(", ", " ,\n\t")),
    "members in another order": lambda f: f.header(lambda h: json.dumps(dict(reversed(json.loads(h).items())))),
    "escaped characters": lambda f: f.payload(lambda p: p.replace("conformance", "\\u0063onformance")),
    # ECDSA has two signatures for one text; whoever tracks tokens does so by their jti, never by their bytes.
    "the other s": lambda f: f.signature(lambda s: joined(halves(s)[0], ORDER - halves(s)[1])),
}


@pytest.mark.bears("I01")
@pytest.mark.parametrize("name", FORGED)
def test_what_all_three_refuse(house: House, doors: TokenDoors, name: str) -> None:
    token = FORGED[name](Forge(house.replica, doors.audience))
    began = time.monotonic()
    assert not doors.ask(token).accepted
    assert time.monotonic() - began < GENEROUS


@pytest.mark.bears("I01")
@pytest.mark.parametrize("name", SOUND)
def test_what_all_three_accept(house: House, doors: TokenDoors, name: str) -> None:
    assert doors.ask(SOUND[name](Forge(house.replica, doors.audience))).accepted


@pytest.mark.bears("I01")
def test_sixty_audiences_are_read_and_are_too_many_to_be_the_callers_own(house: House, doors: TokenDoors) -> None:
    token = Forge(house.replica, doors.audience).good(aud=[f"a{number}" for number in range(60)] + [doors.audience])
    assert doors.ask(token) == Verdicts("", "", "actor_token")


@pytest.mark.bears("I01", "I15")
@pytest.mark.parametrize("member", ["jku", "x5u", "jwk", "x5c"])
def test_nobody_asks_where_a_token_says(house: House, doors: TokenDoors, member: str) -> None:
    # Keys that would make the signature good wait at an address of the token's own.
    with socket.create_server(("127.0.0.1", 0)) as attacker:
        attacker.setblocking(False)
        address = f"https://127.0.0.1:{attacker.getsockname()[1]}/keys"
        value = {"jwk": {"kty": "EC", "x5u": address, "jku": address}, "x5c": [address]}.get(member, address)
        assert not doors.ask(house.replica.token({member: value}, aud=[doors.audience])).accepted
        with pytest.raises(BlockingIOError):
            attacker.accept()
        # A control: whoever asks is seen.
        with socket.create_connection(attacker.getsockname()):
            attacker.accept()[0].close()


# --- sizes ---------------------------------------------------------------------------------------------------------

SIZES = [name for name in FORGED if name in {"a long header", "a long payload", "a megabyte", "a megabyte of dots", "many audiences", "deep"}]  # fmt: skip
AT_MOST = 0.05  # seconds of this thread, the quickest of several attempts: a busy machine does not count


@pytest.mark.bears("I01")
@pytest.mark.parametrize("name", [*SIZES, *SOUND])
def test_what_a_token_costs_before_it_is_judged(house: House, name: str) -> None:
    token = {**FORGED, **SOUND}[name](Forge(house.replica, "tests"))
    bundles, now = house.bundles, SystemClock().now()

    def judged() -> float:
        began = time.thread_time()
        with contextlib.suppress(InvalidSvid):
            verify_jwt_svid(token, bundles, audience="tests", now=now)
        return time.thread_time() - began

    assert min(judged() for _ in range(5)) < AT_MOST
    tracemalloc.start()
    try:
        judged()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < max(3 * len(token), 256 * 1024)  # below that it is the interpreter's own


# --- Wycheproof ---------------------------------------------------------------------------------------------------

VECTORS = Path(os.environ.get("BROKER_VECTORS", "/nonexistent")) / "wycheproof"
with_vectors = pytest.mark.skipif(
    not VECTORS.is_dir(), reason="BROKER_VECTORS does not name the folder of public vectors"
)


def cases(name: str) -> list[dict[str, Any]]:
    groups = json.loads((VECTORS / name).read_bytes())["testGroups"]
    return [case | {"group": group} for group in groups for case in group["tests"]]


@with_vectors
@pytest.mark.bears("I01")
@pytest.mark.parametrize("file", ["json_web_signature_test.json", "json_web_key_test.json"])
def test_no_token_of_wycheproof_is_a_jwt_svid(doors: TokenDoors, file: str) -> None:
    # Their keys are nobody's here, their payloads no claims: whatever their own verdict, all three refuse in one way.
    for case in cases(file):
        if isinstance(case["jws"], str):
            assert not doors.ask(case["jws"]).accepted, case["tcId"]


@with_vectors
@pytest.mark.bears("I01")
def test_signatures_of_wycheproof_on_a_token_of_ours(house: House, doors: TokenDoors) -> None:
    signed = Forge(house.replica, doors.audience).good().rpartition(".")[0]
    every = {case["sig"]: case for case in cases("ecdsa_secp256r1_sha256_p1363_test.json")}
    # One of each shape is enough here; the signature rule itself is shown all of them elsewhere.
    shapes = {(case["result"], case["comment"], len(case["sig"])): case for case in every.values()}
    assert len(shapes) > 50
    for case in shapes.values():
        token = f"{signed}.{b64url_encode(bytes.fromhex(case['sig']))}"
        assert not doors.ask(token).accepted, case["tcId"]


def test_the_harness_can_tell(house: House) -> None:
    # A control: the other signature verifies by any implementation, and the forged ones by none.
    key, text = house.replica.jwt_key, b"text"
    r, s = halves(house.replica.sign(text))
    for number in (s, ORDER - s):
        key.public_key().verify(encode_dss_signature(r, number), text, ec.ECDSA(hashes.SHA256()))
