"""Transaction tokens, as pure rules: what is read back, and what a replacement may never do."""

import json
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.errors import Invalid, InvalidToken, PolicyDenied, Refused
from broker.keys.local import generated
from broker.spiffe import SpiffeId, TrustDomain, jose
from broker.spiffe.strictjson import JsonValue
from broker.tasks import Authority
from broker.tasks.context import MAX_MEMBERS, extend, read_context
from broker.tasks.transactions import MAX_PATH, TransactionClaims, replace_transaction, verify_transaction

NOW = datetime(2026, 6, 1, 12, tzinfo=UTC)
ISSUER = "https://broker.example.org"
AGENT, GATEWAY, BILLING = (SpiffeId(f"spiffe://example.org/{name}") for name in ("triage", "gateway", "billing"))
DETAIL = {"type": "api", "locations": ["https://tickets.example.org"], "actions": ["ticket.read", "ticket.write"]}
SIGNER = generated("one")
PUBLIC = {"one": SIGNER.public_key}
DOMAIN = TrustDomain("example.org")


def claims(**fields: Any) -> TransactionClaims:
    at = int(NOW.timestamp())
    return TransactionClaims(
        **{
            "iss": ISSUER, "aud": DOMAIN, "iat": at, "exp": at + 30, "jti": "jti_1", "txn": "txn_1", "sub": "alice", "scope": "ticket.read ticket.write",
            "act": (AGENT,), "authorization_details": Authority.parse([DETAIL]), "task": "tsk_1", "root": "tsk_1", "epoch": 0, "txn_path": (GATEWAY,),
            "tctx": read_context({"ticket": "4711"}), "rctx": read_context({"ip": "::1"}),
        } | fields
    )  # fmt: skip


def signed(payload: Mapping[str, JsonValue], **header: Any) -> str:
    return jose.sign_compact({"alg": "ES256", "kid": "one", "typ": "txntoken+jwt"} | header, payload, SIGNER.sign)


def verified(token: str, *, after: float = 0, domain: TrustDomain = DOMAIN, issuer: str = ISSUER) -> TransactionClaims:
    now = NOW + timedelta(seconds=after)
    return verify_transaction(token, PUBLIC, issuer=issuer, trust_domain=domain, now=now).claims


def replaced(earlier: TransactionClaims, who: SpiffeId = BILLING, **fields: Any) -> TransactionClaims:
    wanted = {"authority": None, "scope": "ticket.read", "tctx": {}, "rctx": {}, "jti": "jti_2", "now": NOW}
    return replace_transaction(earlier, who, **wanted | fields)


def test_what_is_written_is_read_back() -> None:
    for typ in ("txntoken+jwt", "application/txntoken+jwt", "TXNTOKEN+JWT"):
        assert verified(signed(claims().to_payload(), typ=typ)) == claims()


@pytest.mark.bears("JW07", "JW08")
@pytest.mark.parametrize("typ", ["at+jwt", "JWT", "oauth-id-jag+jwt", "token-introspection+jwt", "dpop+jwt", None])
def test_another_type_is_refused(typ: str | None) -> None:
    header = {} if typ is None else {"typ": typ}
    token = jose.sign_compact({"alg": "ES256", "kid": "one"} | header, claims().to_payload(), SIGNER.sign)
    with pytest.raises(InvalidToken) as caught:
        verified(token)
    assert caught.value.reason == "token_type"


@pytest.mark.bears("JW10", "JW11", "JW12")
@pytest.mark.parametrize(
    "change",
    [
        {"aud": "example.com"}, {"aud": ["example.org"]}, {"aud": "https://tickets.example.org"}, {"iss": ISSUER + "/"}, {"exp": "1"}, {"exp": True}, {"iat": 1.5}, {"sub": ""},
        {"sub": 7}, {"txn": "a b"}, {"jti": None}, {"scope": "ticket.read"}, {"scope": 1}, {"req_wl": str(AGENT)}, {"req_wl": "gateway"}, {"act": {"sub": str(AGENT), "exp": 1}},
        {"task": {"id": "tsk_1", "root": "tsk_1"}}, {"task": {"id": "tsk_1", "root": "tsk_1", "epoch": -1}}, {"task": "tsk_1"}, {"authorization_details": []}, {"authorization_details": "[]"},
        {"authorization_details": json.dumps([DETAIL])}, {"task": {"id": "tsk_1", "root": "tsk_1", "epoch": 0, "parent": "tsk_0"}}, {"exp": int(NOW.timestamp())},
        {"chain_metadata": {"hop_count": 3, "txn_path": [str(GATEWAY), str(BILLING), str(GATEWAY)]}},
        {"chain_metadata": {"hop_count": 2, "txn_path": [str(GATEWAY)]}}, {"chain_metadata": {"hop_count": 1, "txn_path": [1]}}, {"chain_metadata": {"hop_count": 1, "txn_path": ["x"]}}, {"chain_metadata": []},
        {"tctx": []}, {"tctx": {"a": {"b": 1}}}, {"rctx": {"a": None}},
    ],
)  # fmt: skip
def test_a_claim_that_is_not_as_declared(change: dict[str, Any]) -> None:
    payload = {**claims().to_payload(), **change}
    with pytest.raises(InvalidToken):
        verified(signed(payload))


def test_every_claim_is_needed() -> None:
    payload = claims().to_payload()
    for name in set(payload) - {"tctx", "rctx"}:
        with pytest.raises(InvalidToken):
            verified(signed({key: value for key, value in payload.items() if key != name}))


@pytest.mark.bears("JW20")
def test_its_time_and_the_leeway() -> None:
    token = signed(claims().to_payload())
    verified(token, after=60)
    verified(token, after=-30)
    for after in (61, -31):
        with pytest.raises(InvalidToken):
            verified(token, after=after)
    with pytest.raises(ValueError, match="aware"):
        verify_transaction(token, PUBLIC, issuer=ISSUER, trust_domain=DOMAIN, now=datetime(2026, 6, 1))  # noqa: DTZ001


def test_a_replacement_keeps_what_must_stay_and_narrows() -> None:
    after = replaced(claims(), tctx={"step": 2}, now=NOW + timedelta(seconds=10))
    assert (after.txn, after.sub, after.aud, after.act, after.exp) == ("txn_1", "alice", DOMAIN, (AGENT,), claims().exp)
    assert (after.scope, after.req_wl, after.txn_path) == ("ticket.read", BILLING, (GATEWAY, BILLING))
    assert dict(after.tctx) == {"step": 2, "ticket": "4711"}
    assert verified(signed(after.to_payload())) == after
    ends = (NOW + timedelta(seconds=5),)
    assert replaced(claims(), ends=ends).exp == int(NOW.timestamp()) + 5


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"scope": "ticket.delete"}, "invalid_scope"),
        ({"authority": Authority.parse([DETAIL | {"actions": ["ticket.delete"]}])}, "invalid_authorization_details"),
        ({"authority": Authority.parse([DETAIL | {"locations": ["https://b.example"]}])}, "invalid_authorization_details"),
        ({"who": GATEWAY}, "txn_path_cycle"),
        ({"tctx": {"ticket": "1"}}, "txn_context_changed"),
        ({"rctx": {"ip": "::2"}}, "txn_context_changed"),
    ],
)  # fmt: skip
def test_what_a_replacement_may_not(changes: dict[str, Any], code: str) -> None:
    with pytest.raises(PolicyDenied) as caught:
        replaced(claims(), **changes)
    assert caught.value.reason == code


def test_an_expired_one_is_not_replaced_within_the_leeway_either() -> None:
    with pytest.raises(Refused) as caught:
        replaced(claims(), now=NOW + timedelta(seconds=30))
    assert caught.value.reason == "txn_expired"
    with pytest.raises(Refused):
        replaced(claims(), now=NOW + timedelta(seconds=29.5), ends=(NOW + timedelta(seconds=29.7),))


def test_a_path_ends() -> None:
    path = tuple(SpiffeId(f"spiffe://example.org/s{number}") for number in range(MAX_PATH))
    with pytest.raises(PolicyDenied) as caught:
        replaced(claims(txn_path=path))
    assert caught.value.reason == "txn_path_depth"


def test_a_truth_is_not_a_number_in_a_context() -> None:
    with pytest.raises(PolicyDenied):
        extend(read_context({"a": True}), {"a": 1})
    assert dict(extend(read_context({"a": True}), {"a": True, "b": 0})) == {"a": True, "b": 0}


def test_a_context_stays_small_also_by_small_steps() -> None:
    full = read_context({f"m{number}": number for number in range(MAX_MEMBERS)})
    assert len(extend(full, {"m0": 0})) == MAX_MEMBERS
    for grown in (lambda: extend(full, {"more": 1}), lambda: read_context({**full, "more": 1})):
        with pytest.raises(Invalid):
            grown()


ACTIONS = ["ticket.read", "ticket.write", "ticket.close"]
PLACES = ["https://tickets.example.org", "https://tickets.example.org/a", "https://tickets.example.org/ab"]
WANTED = st.builds(
    lambda actions, places, identifier: Authority.parse(
        [
            {"type": "api", "locations": sorted(places), "actions": sorted(actions)}
            | ({} if identifier is None else {"identifier": identifier})
        ]
    ),
    st.sets(st.sampled_from(ACTIONS), min_size=1),
    st.sets(st.sampled_from(PLACES), min_size=1),
    st.sampled_from([None, "1", "2"]),
)
STEP = st.tuples(st.sampled_from(range(6)), st.none() | WANTED, st.sets(st.sampled_from(ACTIONS)), st.integers(0, 9))


@pytest.mark.bears("X02")
@given(st.lists(STEP, max_size=8))
def test_no_chain_of_replacements_ever_widens(steps: list[tuple[int, Authority | None, set[str], int]]) -> None:
    start = Authority.parse([{"type": "api", "locations": PLACES[:1], "actions": ACTIONS}])
    held = claims(authorization_details=start, scope=start.scope(), tctx={}, rctx={})
    now = NOW
    for who, authority, scope, seconds in steps:
        now += timedelta(seconds=seconds)
        requester = SpiffeId(f"spiffe://example.org/w{who}")
        wanted = {"authority": authority, "scope": " ".join(sorted(scope)), "now": now, "tctx": {f"s{who}": who}}
        try:
            after = replaced(held, requester, **wanted)
        except (PolicyDenied, Refused):
            continue
        assert held.authorization_details.narrow(after.authorization_details) == after.authorization_details
        assert set(after.scope.split()) <= set(held.scope.split())
        assert after.exp == held.exp
        assert after.txn_path == (*held.txn_path, requester)
        assert after.tctx.items() >= held.tctx.items()
        assert (after.sub, after.act, after.txn, after.aud) == (held.sub, held.act, held.txn, held.aud)
        held = after
