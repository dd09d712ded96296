"""User tokens: what a trusted issuer signed for us is accepted, everything else is refused."""

import base64
import hashlib
import hmac
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from broker.errors import BrokerError, Invalid, InvalidToken, Misconfigured, PolicyDenied, Unavailable
from broker.server.tasks.config import SubjectIssuer, check_issuers
from broker.server.tasks.subjects import Subject, SubjectKind, Subjects
from tests.fakes.oidc import OidcIssuer, SigningKey, b64
from tests.unit.server.tasks.estate import ManualClock, authority, detail


@pytest.fixture
def issuer(tmp_path: Path) -> Iterator[OidcIssuer]:
    with OidcIssuer.start(tmp_path) as running:
        yield running


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
async def subjects(issuer: OidcIssuer, clock: ManualClock) -> AsyncIterator[Subjects]:
    trusted = Subjects([trust(issuer)], clock)
    yield trusted
    await trusted.aclose()


def trust(issuer: OidcIssuer, **fields: Any) -> SubjectIssuer:
    return SubjectIssuer(
        **{"issuer": issuer.issuer, "audiences": frozenset({"broker"}), "ca_path": issuer.ca_path} | fields
    )


def token(issuer: OidcIssuer, clock: ManualClock, sub: Any = "alice", **fields: Any) -> str:
    return issuer.token(sub, now=clock.now().timestamp(), **fields)


async def refusal(subjects: Subjects, text: str, kind: SubjectKind = SubjectKind.ANY) -> BrokerError:
    with pytest.raises(BrokerError) as caught:
        await subjects.verify(text, kind)
    assert text not in str(caught.value)
    return caught.value


async def test_a_users_token_gives_the_user(issuer: OidcIssuer, clock: ManualClock, subjects: Subjects) -> None:
    text = token(issuer, clock, sid="s-1", acr="mfa", auth_time=1_000_000, nonce="n", email="a@example.org")
    subject = await subjects.verify(text)
    assert (subject.user, subject.issuer, subject.session, subject.acr) == ("alice", issuer.issuer, "s-1", "mfa")
    assert subject.client is None
    assert subject.expires_at.timestamp() == int(clock.now().timestamp()) + 600
    assert subject.token_hash.startswith("sha-256:")
    delegation = subject.delegation()
    assert (delegation.user, delegation.session, delegation.token_hash) == ("alice", "s-1", subject.token_hash)


def test_nobody_else_makes_a_subject(clock: ManualClock) -> None:
    with pytest.raises(TypeError):
        Subject("root", "https://x", None, None, None, None, clock.now(), "sha-256:x", None, object())


async def test_the_namespace_stands_before_the_user(issuer: OidcIssuer, clock: ManualClock) -> None:
    subjects = Subjects([trust(issuer, namespace="staff:")], clock)
    try:
        assert (await subjects.verify(token(issuer, clock))).user == "staff:alice"
    finally:
        await subjects.aclose()


@pytest.mark.bears("AC07", "X04")
def test_two_issuers_can_never_name_the_same_user() -> None:
    one = SubjectIssuer("https://a.example", frozenset({"b"}), namespace="x")
    for namespace in ("", "x", "xy"):
        other = SubjectIssuer("https://b.example", frozenset({"b"}), namespace=namespace)
        with pytest.raises(Misconfigured):
            check_issuers([one, other])
    check_issuers([one, SubjectIssuer("https://b.example", frozenset({"b"}), namespace="y:")])


@pytest.mark.parametrize(
    "issuer_url",
    [
        "http://idp.example",
        "https://",
        "https://u@idp.example",
        "https://idp.example?x=1",
        "https://idp.example#f",
        "x",
    ],
)
def test_an_issuer_is_an_https_address(issuer_url: str) -> None:
    with pytest.raises(Misconfigured):
        SubjectIssuer(issuer_url, frozenset({"broker"}))


def test_an_issuer_without_audience_is_no_issuer() -> None:
    with pytest.raises(Misconfigured):
        SubjectIssuer("https://idp.example", frozenset())


# ---- claims


WRONG_CLAIMS: list[tuple[str, dict[str, Any], str]] = [
    ("other issuer", {"iss": "https://evil.example"}, "subject_issuer"),
    ("issuer with a suffix", {"iss": "SUFFIX"}, "subject_issuer"),
    ("issuer with a slash", {"iss": "SLASH"}, "subject_issuer"),
    ("issuer missing", {"iss": None}, "token_claim_invalid"),
    ("issuer not text", {"iss": ["https://idp.example"]}, "token_claim_invalid"),
    ("other audience", {"aud": "tickets"}, "subject_audience"),
    ("audience missing", {"aud": None}, "subject_audience"),
    ("audience empty list", {"aud": []}, "subject_audience"),
    ("audience an object", {"aud": {"broker": 1}}, "subject_audience"),
    ("audience prefix", {"aud": "brokerx"}, "subject_audience"),
    ("several audiences and no client", {"aud": ["broker", "tickets"]}, "subject_client"),
    ("several audiences and a foreign client", {"aud": ["broker", "tickets"], "azp": "tickets"}, "subject_client"),
    ("foreign client", {"azp": "someone"}, "subject_client"),
    ("foreign client_id", {"client_id": "someone"}, "subject_client"),
    ("two clients", {"azp": "broker", "client_id": "other"}, "subject_client"),
    ("exp missing", {"exp": None}, "token_claim_missing"),
    ("exp text", {"exp": "1900000000"}, "token_claim_invalid"),
    ("exp fraction", {"exp": 1900000000.5}, "token_claim_invalid"),
    ("exp true", {"exp": True}, "token_claim_invalid"),
    ("exp negative", {"exp": -1}, "token_claim_invalid"),
    ("exp beyond year 9999", {"exp": 253402300800}, "token_claim_invalid"),
    ("iat missing", {"iat": None}, "token_claim_missing"),
    ("sub missing", {"sub": None}, "token_claim_invalid"),
    ("sub a number", {"sub": 7}, "token_claim_invalid"),
    ("sub empty", {"sub": ""}, "token_claim_invalid"),
    ("sub with a line end", {"sub": "alice\n"}, "token_claim_invalid"),
    ("sub not ASCII", {"sub": "al\u0131ce"}, "token_claim_invalid"),
    ("sub too long", {"sub": "a" * 256}, "token_claim_invalid"),
    ("sub a workload", {"sub": "spiffe://example.org/web"}, "subject_not_user"),
    ("bound to a key", {"cnf": {"jkt": "x"}}, "subject_bound"),
    ("a security event", {"events": {}}, "token_type"),
    ("sid not text", {"sid": 7}, "token_claim_invalid"),
]


@pytest.mark.bears("TX15", "TX17", "JW10", "JW11", "JW12", "JW18", "X04", "PB02")
@pytest.mark.parametrize(("claims", "code"), [pytest.param(c, k, id=n) for n, c, k in WRONG_CLAIMS])
async def test_a_claim_that_is_not_as_it_must_be(
    issuer: OidcIssuer, clock: ManualClock, subjects: Subjects, claims: dict[str, Any], code: str
) -> None:
    spelled = {"SUFFIX": issuer.issuer + ".evil", "SLASH": issuer.issuer + "/"}
    claims = {name: spelled.get(value, value) if isinstance(value, str) else value for name, value in claims.items()}
    error = await refusal(subjects, token(issuer, clock, **claims))
    assert isinstance(error, InvalidToken)
    assert error.reason == code


def delegated(issuer: OidcIssuer, clock: ManualClock, claim: str, value: Any) -> str:
    header = {"alg": "RS256", "kid": "key-1", "typ": "JWT"}
    at = int(clock.now().timestamp())
    payload = {"iss": issuer.issuer, "sub": "alice", "aud": "broker", "iat": at, "exp": at + 60, claim: value}
    return issuer.raw_token(header, payload)


@pytest.mark.bears("TX04", "AC01")
@pytest.mark.parametrize("value", [{"sub": "spiffe://example.org/agent"}, {}, None])
async def test_a_delegated_token_is_never_taken_for_the_users_own(
    issuer: OidcIssuer, clock: ManualClock, subjects: Subjects, value: Any
) -> None:
    error = await refusal(subjects, delegated(issuer, clock, "act", value))
    assert type(error) is Invalid
    assert error.reason == "subject_delegated"


@pytest.mark.bears("TX05")
async def test_whom_the_user_named_as_the_actor_is_read(
    issuer: OidcIssuer, clock: ManualClock, subjects: Subjects
) -> None:
    subject = await subjects.verify(delegated(issuer, clock, "may_act", {"sub": "spiffe://example.org/agent"}))
    assert str(subject.may_act) == "spiffe://example.org/agent"
    assert (await subjects.verify(issuer.token(now=clock.now().timestamp()))).may_act is None
    for value in ({}, None, [], "spiffe://example.org/agent", {"sub": 1}, {"sub": "agent"}, {"sub": "spiffe://A/b"},
                  {"sub": "spiffe://example.org/agent", "iss": "https://x.example"}, {"client_id": "a"}):  # fmt: skip
        error = await refusal(subjects, delegated(issuer, clock, "may_act", value))
        assert type(error) is Invalid
        assert error.reason == "may_act_unknown"


@pytest.mark.bears("JW20")
@pytest.mark.parametrize(
    ("claims", "is_accepted"),
    [
        ({"iat": -100, "exp": -30}, True),
        ({"iat": -100, "exp": -31}, False),
        ({"iat": 30}, True),
        ({"iat": 31}, False),
        ({"nbf": 30}, True),
        ({"nbf": 31}, False),
        ({"iat": 10, "exp": 10}, False),
    ],
)
async def test_clocks_may_differ_by_thirty_seconds(
    issuer: OidcIssuer, clock: ManualClock, subjects: Subjects, claims: dict[str, int], is_accepted: bool
) -> None:
    at = int(clock.now().timestamp())
    text = token(issuer, clock, **{name: at + offset for name, offset in claims.items()})
    if is_accepted:
        await subjects.verify(text)
    else:
        assert isinstance(await refusal(subjects, text), InvalidToken)


async def test_known_clients_and_several_audiences(issuer: OidcIssuer, clock: ManualClock) -> None:
    subjects = Subjects([trust(issuer, clients=frozenset({"portal"}))], clock)
    try:
        several = token(issuer, clock, aud=["tickets", "broker"], azp="portal")
        assert (await subjects.verify(several)).client == "portal"
        assert (await subjects.verify(token(issuer, clock, azp="broker"))).client == "broker"
        access = token(issuer, clock, client_id="portal", header={"typ": "at+jwt"})
        assert (await subjects.verify(access)).client == "portal"
    finally:
        await subjects.aclose()


@pytest.mark.bears("TX18")
async def test_a_required_tenant(issuer: OidcIssuer, clock: ManualClock) -> None:
    subjects = Subjects([trust(issuer, required_claims=(("tid", "t1"),))], clock)
    try:
        await subjects.verify(token(issuer, clock, tid="t1"))
        for other in ({}, {"tid": "t2"}, {"tid": ["t1"]}):
            assert (await refusal(subjects, token(issuer, clock, **other))).reason == "subject_claim"
    finally:
        await subjects.aclose()


async def test_the_users_own_limits_are_the_ceiling(issuer: OidcIssuer, clock: ManualClock, subjects: Subjects) -> None:
    detail = {"type": "api", "locations": ["https://tickets.example.org"], "actions": ["ticket.read"]}
    subject = await subjects.verify(token(issuer, clock, authorization_details=[detail]))
    assert subject.ceiling is not None
    assert subject.ceiling.scope() == "ticket.read"
    unknown = token(issuer, clock, authorization_details=[{"type": "payment"}])
    assert (await refusal(subjects, unknown)).reason == "invalid_authorization_details"


@pytest.mark.bears("TX09")
async def test_scopes_limit_the_families_that_they_name(
    issuer: OidcIssuer, clock: ManualClock, subjects: Subjects
) -> None:
    read, write = authority(detail(actions=["ticket.read"])), authority(detail(actions=["ticket.write"]))
    wide, family = authority(detail(actions=["ticket.read", "ticket.write"])), authority(detail(actions=["ticket.*"]))
    for scope in ("openid ticket.read", ["openid", "ticket.read"]):
        subject = await subjects.verify(token(issuer, clock, scope=scope))
        assert subject.narrow(read) is read
        for wanted in (wide, family, write):
            with pytest.raises(PolicyDenied) as denied:
                subject.narrow(wanted)
            assert denied.value.reason == "invalid_scope"
    for scope in (None, "", "openid profile", "ticket.*", "mail.send", "tickets.read"):
        subject = await subjects.verify(token(issuer, clock, scope=scope))
        assert subject.narrow(wide) is wide
    for scope in (5, True, {}, ["ticket.read", 5]):
        assert (await refusal(subjects, token(issuer, clock, scope=scope))).reason == "token_claim_invalid"


# ---- form and header


@pytest.mark.bears("JW07", "JW08", "X07", "RV20")
@pytest.mark.parametrize(
    "typ",
    [
        "logout+jwt",
        "secevent+jwt",
        "dpop+jwt",
        "kb+jwt",
        "txntoken+jwt",
        "wit+jwt",
        "wpt+jwt",
        "statuslist+jwt",
        "oauth-id-jag+jwt",
        "token-introspection+jwt",
        "application/at+jwt+x",
        "JOSE",
        "at\u212awt",
        "",
    ],
)
async def test_a_token_of_another_type_is_no_user_token(
    issuer: OidcIssuer, clock: ManualClock, subjects: Subjects, typ: str
) -> None:
    assert isinstance(await refusal(subjects, token(issuer, clock, header={"typ": typ})), InvalidToken)


@pytest.mark.bears("JW08")
@pytest.mark.parametrize("typ", ["JWT", "jwt", None, "at+jwt", "AT+JWT", "application/at+jwt", "application/jwt"])
async def test_types_of_user_tokens(
    issuer: OidcIssuer, clock: ManualClock, subjects: Subjects, typ: str | None
) -> None:
    assert (await subjects.verify(token(issuer, clock, header={"typ": typ}))).user == "alice"


async def test_an_access_token_is_no_id_token(issuer: OidcIssuer, clock: ManualClock, subjects: Subjects) -> None:
    access = token(issuer, clock, header={"typ": "at+jwt"})
    assert (await refusal(subjects, access, SubjectKind.ID)).reason == "token_type"
    await subjects.verify(access, SubjectKind.ACCESS)
    await subjects.verify(token(issuer, clock), SubjectKind.ID)


@pytest.mark.bears("JW04", "JW05", "JW06")
@pytest.mark.parametrize(
    "header",
    [
        {"jku": "https://evil.example/jwks"},
        {"x5u": "http://169.254.169.254/"},
        {"x5c": ["MIIB"]},
        {"jwk": {"kty": "EC"}},
        {"crit": ["x"]},
        {"crit": []},
        {"b64": False},
        {"cty": "JWT"},
        {"zip": "DEF"},
        {"kid": "k" * 2000},
        {"kid": "../../dev/null\x00"},
        {"kid": 7},
    ],
)
async def test_headers_that_choose_their_own_key_or_meaning(
    issuer: OidcIssuer, clock: ManualClock, subjects: Subjects, header: dict[str, Any]
) -> None:
    assert isinstance(await refusal(subjects, token(issuer, clock, header=header)), InvalidToken)
    assert issuer.fetched == {}


async def test_no_algorithm_and_a_shared_secret_are_refused_before_anything_is_fetched(
    issuer: OidcIssuer, clock: ManualClock, subjects: Subjects
) -> None:
    at = int(clock.now().timestamp())
    payload = b64(
        json.dumps({"iss": issuer.issuer, "sub": "alice", "aud": "broker", "iat": at, "exp": at + 60}).encode()
    )
    for alg in ("none", "None", "HS256", "EdDSA", "RS1"):
        head = b64(json.dumps({"alg": alg, "kid": "key-1", "typ": "JWT"}).encode())
        mac = hmac.new(b"key-1", f"{head}.{payload}".encode(), hashlib.sha256).digest()
        for signature in ("", b64(mac)):
            await refusal(subjects, f"{head}.{payload}.{signature}")
    assert issuer.fetched == {}


@pytest.mark.bears("JW13", "JW16", "JW17", "JW09")
async def test_texts_that_are_no_compact_token(issuer: OidcIssuer, clock: ManualClock, subjects: Subjects) -> None:
    good = token(issuer, clock)
    head, body, signature = good.split(".")
    twice = base64.urlsafe_b64encode(b'{"alg":"RS256","alg":"RS256","kid":"key-1"}').rstrip(b"=").decode()
    for bad in (
        "",
        "x",
        good + ".x",
        good + "=",
        good + "\n",
        " " + good,
        f"{head}.{body}",
        f"{head}.{body}.",
        f"{twice}.{body}.{signature}",
        json.dumps({"payload": body, "signature": signature, "protected": head}),
        "a" * 20_000,
        good[:-4],
    ):
        with pytest.raises(InvalidToken):
            await subjects.verify(bad)


async def test_a_forged_signature(issuer: OidcIssuer, clock: ManualClock, subjects: Subjects) -> None:
    forged = token(issuer, clock, key=SigningKey("key-1", is_strangers=True))
    assert (await refusal(subjects, forged)).reason == "token_signature"


@pytest.mark.bears("JW15")
async def test_a_key_is_bound_to_one_algorithm(issuer: OidcIssuer, clock: ManualClock, subjects: Subjects) -> None:
    for alg in ("RS384", "PS256", "ES256"):
        assert (await refusal(subjects, token(issuer, clock, header={"alg": alg}))).reason == "token_algorithm"


async def test_elliptic_keys_work_too(issuer: OidcIssuer, clock: ManualClock, subjects: Subjects) -> None:
    issuer.rotate("ES256")
    assert (await subjects.verify(token(issuer, clock))).user == "alice"


# ---- keys


async def test_a_rotated_key_is_found_and_fetches_are_bounded(
    issuer: OidcIssuer, clock: ManualClock, subjects: Subjects
) -> None:
    old = token(issuer, clock)
    await subjects.verify(old)
    issuer.rotate()
    assert (await refusal(subjects, token(issuer, clock))).reason == "subject_key_unknown"
    assert issuer.fetched["/jwks"] == 1
    clock.advance(10)
    await subjects.verify(token(issuer, clock))
    assert issuer.fetched["/jwks"] == 2
    for _ in range(5):
        await refusal(subjects, token(issuer, clock, header={"kid": "unknown"}))
    assert issuer.fetched["/jwks"] == 2


@pytest.mark.bears("SV03", "SV08")
@pytest.mark.parametrize("fault", ["redirect", "status", "huge", "garbage", "http", "empty"])
async def test_a_bad_answer_gives_no_keys_and_takes_none_away(
    issuer: OidcIssuer, clock: ManualClock, subjects: Subjects, fault: str
) -> None:
    issuer.fault = fault
    with pytest.raises(Unavailable):
        await subjects.verify(token(issuer, clock))
    issuer.fault = ""
    clock.advance(1)
    await subjects.verify(token(issuer, clock))
    issuer.fault = fault
    clock.advance(11)
    with pytest.raises(InvalidToken):
        await subjects.verify(token(issuer, clock, header={"kid": "unknown"}))
    await subjects.verify(token(issuer, clock))


async def test_another_issuers_document_is_not_taken(
    issuer: OidcIssuer, clock: ManualClock, subjects: Subjects
) -> None:
    issuer.claimed_issuer = issuer.issuer + "/"
    with pytest.raises(Unavailable):
        await subjects.verify(token(issuer, clock))


@pytest.mark.bears("SV03")
async def test_a_dripping_issuer_is_given_up(
    issuer: OidcIssuer, clock: ManualClock, subjects: Subjects, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("broker.server.tasks.issuer_keys.FETCH_SECONDS", 0.3)
    issuer.fault = "slow"
    with pytest.raises(Unavailable):
        await subjects.verify(token(issuer, clock))


async def test_an_issuer_under_another_ca_is_not_believed(
    issuer: OidcIssuer, clock: ManualClock, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    with OidcIssuer.start(other) as stranger:
        subjects = Subjects([trust(issuer, ca_path=stranger.ca_path)], clock)
        try:
            with pytest.raises(Unavailable):
                await subjects.verify(token(issuer, clock))
        finally:
            await subjects.aclose()


async def test_keys_of_other_kinds_are_passed_over(issuer: OidcIssuer, clock: ManualClock, subjects: Subjects) -> None:
    issuer.extra_jwks = [
        {"kty": "oct", "k": "AAAA", "kid": "key-1"},
        {"kty": "RSA", "use": "enc", "kid": "key-1"},
        SigningKey("other").jwk() | {"use": "enc"},
        SigningKey("es", "ES256").jwk() | {"alg": "ES384"},
        {"kid": 7},
    ]
    await subjects.verify(token(issuer, clock))


async def test_an_id_that_two_keys_bear_names_none(issuer: OidcIssuer, clock: ManualClock, subjects: Subjects) -> None:
    issuer.extra_jwks = [SigningKey("key-1").jwk(), SigningKey("key-2").jwk()]
    assert (await refusal(subjects, token(issuer, clock))).reason == "subject_key_unknown"


async def test_a_token_without_key_id_needs_an_issuer_with_one_key(
    issuer: OidcIssuer, clock: ManualClock, subjects: Subjects
) -> None:
    await subjects.verify(token(issuer, clock, header={"kid": None}))
    issuer.extra_jwks = [SigningKey("key-2").jwk()]
    clock.advance(11)
    await refusal(subjects, token(issuer, clock, header={"kid": "unknown"}))
    assert (await refusal(subjects, token(issuer, clock, header={"kid": None}))).reason == "subject_key_unknown"


async def test_keys_that_cannot_be_fetched_again_are_not_believed_for_ever(
    issuer: OidcIssuer, clock: ManualClock, subjects: Subjects
) -> None:
    await subjects.verify(token(issuer, clock))
    issuer.fault = "status"
    clock.advance(86_401)
    with pytest.raises(Unavailable):
        await subjects.verify(token(issuer, clock))
