import json
from datetime import datetime, timedelta
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from hypothesis import given
from hypothesis import strategies as st

from broker.errors import BrokerError, Invalid, InvalidToken
from broker.spiffe.jose import b64url_decode, b64url_encode
from broker.tasks import LEEWAY, VerifiedToken, verify_task_token
from broker.tasks.verify import BEARER_SECONDS, unverified_confirmation
from tests.unit.tasks.test_lineage import agent, family
from tests.unit.tasks.world import AGENT, ISSUER, NOW, TICKETS, X5T, TokenKey, claims, task

KEY = TokenKey()
PAYLOAD = claims(task()).to_payload()


def verify(token: str, *, now: datetime = NOW, **changes: Any) -> VerifiedToken:
    return verify_task_token(token, **{"keys": KEY.public, "issuer": ISSUER, "audience": TICKETS, "now": now} | changes)


def refusal(token: str, **changes: Any) -> str:
    with pytest.raises(InvalidToken) as refused:
        verify(token, **changes)
    return refused.value.reason


def test_a_token_of_ours_says_who_acts_for_whom() -> None:
    chain = family(2)
    verified = verify(KEY.token(claims(chain[0], chain[1:]).to_payload()))
    assert (verified.user, verified.agent, verified.task_id, verified.root, verified.epoch, verified.jti) == (
        "usr_1",
        agent(1),
        "tsk_2",
        "tsk_1",
        0,
        "jti_1",
    )
    assert verified.claims.act == (agent(1), AGENT)
    assert "eyJ" not in repr(verified)


def test_the_verdict_comes_from_verification_only() -> None:
    with pytest.raises(TypeError):
        VerifiedToken(claims(task()), object())


@pytest.mark.bears("JW08")
@pytest.mark.parametrize("typ", ["at+jwt", "AT+JWT", "At+Jwt", "application/at+jwt", "APPLICATION/AT+JWT"])
def test_the_media_type_is_read_without_case(typ: str) -> None:
    verify(KEY.token(PAYLOAD, typ=typ))


@pytest.mark.bears("JW07", "JW08", "RV20")
@pytest.mark.parametrize(
    "typ",
    [
        "JWT",
        "jwt",
        "JOSE",
        "secevent+jwt",
        "logout+jwt",
        "txntoken+jwt",
        "dpop+jwt",
        "wit+jwt",
        "wpt+jwt",
        "statuslist+jwt",
        "oauth-id-jag+jwt",
        "application/jwt",
        "at+jwt ",
        " at+jwt",
        "at+jwt\n",
        "at+jwt;v=1",
        "application/application/at+jwt",
        "/at+jwt",
        "text/at+jwt",
        "at+\u212awt",
        "\uff41t+jwt",
    ],
)
def test_any_other_type_is_another_token(typ: str) -> None:
    assert refusal(KEY.token(PAYLOAD, typ=typ)) == "token_type"


@pytest.mark.bears("JW07")
def test_a_type_must_be_said() -> None:
    assert refusal(KEY.token(PAYLOAD, typ=None)) == "token_type"


@pytest.mark.bears("JW05")
@pytest.mark.parametrize("kid", [None, "k2", "K1", "../../dev/null", "' or 1=1"])
def test_the_key_is_one_of_the_issuers(kid: str | None) -> None:
    assert refusal(KEY.token(PAYLOAD, kid=kid)) == "token_key_unknown"


@pytest.mark.bears("JW04", "JW06")
@pytest.mark.parametrize(
    "header",
    [
        {"jku": "https://169.254.169.254/"},
        {"x5u": "https://e.example"},
        {"x5c": ["AA"]},
        {"jwk": {}},
        {"crit": ["x"]},
        {"b64": False},
    ],
)
def test_a_token_does_not_choose_its_key_or_meaning(header: dict[str, Any]) -> None:
    assert refusal(KEY.token(PAYLOAD, **header)) == "token_header"


@pytest.mark.parametrize("alg", ["none", "HS256", "ES384", "RS256", "PS256", "EdDSA", "es256", ""])
def test_one_algorithm_is_accepted(alg: str) -> None:
    assert refusal(KEY.token(PAYLOAD, alg=alg)) == "token_algorithm"


@pytest.mark.bears("JW15")
def test_a_key_of_another_kind_verifies_nothing() -> None:
    token = KEY.token(PAYLOAD)
    for other in (
        rsa.generate_private_key(public_exponent=65537, key_size=2048).public_key(),
        ec.generate_private_key(ec.SECP384R1()).public_key(),
        TokenKey().public["k1"],
    ):
        with pytest.raises(InvalidToken):
            verify(token, keys={"k1": other})


@pytest.mark.bears("JW12")
@pytest.mark.parametrize(
    "issuer",
    [
        ISSUER + "/",
        ISSUER + ".evil",
        ISSUER[:-1],
        ISSUER.upper(),
        "https://BROKER.example.org:8443",
        "https://broker.example.org",
        "https://broker.example.org:8443 ",
        "",
    ],
)
def test_the_issuer_is_compared_byte_by_byte(issuer: str) -> None:
    assert refusal(KEY.token(PAYLOAD | {"iss": issuer})) == "token_issuer"
    assert refusal(KEY.token(PAYLOAD), issuer=issuer) == "token_issuer"


@pytest.mark.bears("JW11", "TX12", "SV10")
def test_the_audience_is_compared_as_a_resource() -> None:
    verify(KEY.token(PAYLOAD), audience="https://Tickets.example.org:443/")
    verify(KEY.token(PAYLOAD | {"aud": "https://TICKETS.example.org/"}))
    for other in (
        "https://tickets.example.org/a",
        "https://tickets.example.org.evil",
        "https://tickets.example.org:8443",
    ):
        assert refusal(KEY.token(PAYLOAD), audience=other) == "token_audience"
        assert refusal(KEY.token(PAYLOAD | {"aud": other})) == "token_audience"
    with pytest.raises(Invalid) as ours:
        verify(KEY.token(PAYLOAD), audience="http://tickets.example.org")
    assert ours.value.reason == "invalid_target"


@pytest.mark.bears("JW20")
def test_clocks_may_differ_by_thirty_seconds_and_no_more() -> None:
    token = KEY.token(PAYLOAD)
    start, end = NOW, NOW + timedelta(seconds=180)
    leeway = timedelta(seconds=LEEWAY)
    assert LEEWAY == 30
    for now in (start, end, start - leeway, end + leeway):
        verify(token, now=now)
    assert refusal(token, now=end + leeway + timedelta(seconds=1)) == "token_expired"
    assert refusal(token, now=end + leeway + timedelta(milliseconds=1)) == "token_expired"
    assert refusal(token, now=start - leeway - timedelta(seconds=1)) == "token_not_yet_valid"
    early = KEY.token(PAYLOAD | {"nbf": int(NOW.timestamp()) + 60})
    assert refusal(early) == "token_not_yet_valid"
    verify(early, now=NOW + timedelta(seconds=30))


def test_a_time_without_a_zone_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="aware"):
        verify(KEY.token(PAYLOAD), now=datetime(2026, 11, 22))  # noqa: DTZ001


@pytest.mark.bears("JW09", "JW10")
@pytest.mark.parametrize(
    "text",
    [
        '{"aud":"https://tickets.example.org","aud":"https://tickets.example.org"}',
        '{"exp":1e400}',
        '{"exp":NaN}',
        "[]",
        "7",
        '{"a":' * 20 + "1" + "}" * 20,
        "",
    ],
)
def test_a_payload_that_is_not_strict_json_is_refused(text: str) -> None:
    head = KEY.token({}).split(".")[0]
    signing_input = f"{head}.{b64url_encode(text.encode())}"
    token = f"{signing_input}.{b64url_encode(KEY.sign(signing_input.encode()))}"
    assert refusal(token) == "token_malformed"


@pytest.mark.bears("JW13", "JW14", "JW16")
def test_a_changed_token_is_refused() -> None:
    token = KEY.token(PAYLOAD)
    head, body, signature = token.split(".")
    raw = b64url_decode(signature)
    widened = json.loads(b64url_decode(body)) | {"sub": "usr_2"}
    for changed in (
        token[:-1],
        token + "A",
        token + "=",
        token + "\n",
        f"{head}.{body}.",
        f"{head}.{body}",
        f"{head}.{body}.{signature}.{signature}",
        f"{head}.{b64url_encode(json.dumps(widened).encode())}.{signature}",
        f"{head}.{body}.{b64url_encode(bytes(64))}",
        f"{head}.{body}.{b64url_encode(raw[:63])}",
        f"{head}.{body}.{b64url_encode(raw[32:] + raw[:32])}",
        token + "A" * 8192,
    ):
        with pytest.raises(InvalidToken):
            verify(changed)


@given(st.text(max_size=60) | st.binary(max_size=60).map(b64url_encode))
def test_noise_is_refused_and_nothing_else_happens(text: str) -> None:
    with pytest.raises(InvalidToken):
        verify(text)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


@given(st.sampled_from(sorted(PAYLOAD)), JSON)
def test_any_value_of_any_claim_is_accepted_or_refused_in_our_words(name: str, value: Any) -> None:
    try:
        verified = verify(KEY.token(PAYLOAD | {name: value}))
    except BrokerError as error:
        kind = type(error)
    else:
        assert verified.claims.to_payload()[name] == value
        return
    assert kind is InvalidToken


def test_the_holder_reads_its_own_binding_without_a_verdict() -> None:
    assert unverified_confirmation(KEY.token(PAYLOAD)).x5t == X5T
    for wrong in ("", "a.b.c", KEY.token({"cnf": {}})):
        with pytest.raises(InvalidToken):
            unverified_confirmation(wrong)


def test_a_token_that_is_bound_to_nobody_is_one_where_it_was_published_and_for_a_minute() -> None:
    minute = claims(task(), cnf=None, ttl=timedelta(seconds=BEARER_SECONDS)).to_payload()
    assert refusal(KEY.token(minute)) == "token_claim_missing"
    assert verify(KEY.token(minute), bearer=True).claims.cnf is None
    assert refusal(KEY.token(minute | {"exp": minute["exp"] + 1}), bearer=True) == "token_cnf"
    assert verify(KEY.token(PAYLOAD), bearer=True).claims.cnf is not None, "a binding is none the less one"
