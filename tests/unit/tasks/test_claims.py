from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.errors import Invalid, InvalidToken, PolicyDenied, Refused
from broker.spiffe import SpiffeId, strictjson
from broker.tasks import MAX_ACT_DEPTH, Cause, Resource, State, TaskClaims, end
from broker.tasks.actors import read_act
from broker.tasks.claims import FATES, MAX_TTL, purpose_hash
from tests.unit.tasks.test_lineage import agent, family
from tests.unit.tasks.world import (
    AGENT,
    HOUR,
    ISSUER,
    NOW,
    TICKETS,
    X5T,
    authority,
    claims,
    delegation,
    detail,
    task,
)

EPOCH_SECONDS = int(NOW.timestamp())


def payload(**changes: Any) -> dict[str, Any]:
    made: dict[str, Any] = claims(
        task(delegation=delegation(session="sid 1", acr="urn:mfa", auth_time=NOW - HOUR))
    ).to_payload()
    return {name: value for name, value in (made | changes).items() if value is not ...}


def test_the_payload_is_as_the_design_shows_it() -> None:
    assert payload() == {
        "iss": ISSUER,
        "sub": "usr_1",
        "client_id": str(AGENT),
        "aud": "https://tickets.example.org",
        "exp": EPOCH_SECONDS + 180,
        "iat": EPOCH_SECONDS,
        "jti": "jti_1",
        "txn": "txn_1",
        "sid": "sid 1",
        "scope": "ticket.read",
        "act": {"sub": str(AGENT)},
        "cnf": {"x5t#S256": X5T, "spiffe_session": "ws_1"},
        "authorization_details": [detail()],
        "task": {
            "id": "tsk_1",
            "root": "tsk_1",
            "epoch": 0,
            "hop": 1,
            "purpose": purpose_hash("triage ticket 4711"),
            "authority_hash": authority().digest,
        },
        "acr": "urn:mfa",
        "auth_time": EPOCH_SECONDS - 3600,
    }
    assert "4711" not in str(payload())


@pytest.mark.bears("AC01", "AC05")
@pytest.mark.parametrize("length", [1, 2, 3, 8])
def test_the_chain_nests_and_the_agent_is_always_its_head(length: int) -> None:
    chain = family(length)
    made = claims(chain[0], chain[1:])
    assert made.client_id == made.act[0] == chain[0].agent
    assert made.task.hop == length
    value: Any = made.to_payload()["act"]
    met = []
    while value:
        met.append(value["sub"])
        assert value.keys() <= {"sub", "act"}
        value = value.get("act")
    assert met == [str(each.agent) for each in chain]
    assert TaskClaims.parse(made.to_payload()) == made


@given(st.integers(1, 8), st.integers(1, 10**6), st.integers(0, 9))
def test_what_is_minted_always_reads_as_itself(length: int, lifetime: int, epoch: int) -> None:
    chain = [replace(each, epoch=epoch) for each in family(length)]
    made = claims(chain[0], chain[1:], ttl=timedelta(seconds=lifetime))
    assert str(made.client_id) == made.to_payload()["client_id"] == made.to_payload()["act"]["sub"]  # type: ignore[index,call-overload]
    again = strictjson.loads(strictjson.canonical(made.to_payload()))
    assert isinstance(again, dict)
    assert TaskClaims.parse(again) == made


@pytest.mark.bears("TX19", "TX21")
@pytest.mark.parametrize(
    ("of", "fields", "seconds"),
    [
        (task(), {}, 180),
        (task(), {"ttl": timedelta(hours=9)}, int(MAX_TTL.total_seconds())),
        (task(ttl=timedelta(seconds=100)), {}, 100),
        (task(delegation=delegation(expires_at=NOW + timedelta(seconds=70))), {}, 70),
        (task(), {"not_after": [NOW + HOUR, NOW + timedelta(seconds=50), NOW + timedelta(seconds=60)]}, 50),
        (task(), {"not_after": [NOW + timedelta(seconds=50, microseconds=999_999)]}, 50),
        (task(), {"ttl": timedelta(seconds=1)}, 1),
    ],
)
def test_a_token_outlives_none_of_its_sources(of: Any, fields: dict[str, Any], seconds: int) -> None:
    assert claims(of, **fields).exp == EPOCH_SECONDS + seconds


@pytest.mark.bears("TX21")
def test_a_token_does_not_outlive_an_ancestor() -> None:
    root = task(ttl=timedelta(seconds=90))
    low = replace(family(2)[0], expires_at=NOW + timedelta(minutes=10))
    assert claims(low, [root]).exp == EPOCH_SECONDS + 90


@pytest.mark.bears("TX19")
def test_without_a_second_left_there_is_no_token() -> None:
    for fields in (
        {"ttl": timedelta(0)},
        {"ttl": timedelta(seconds=-5)},
        {"not_after": [NOW]},
        {"not_after": [NOW + timedelta(microseconds=999_999)]},
    ):
        with pytest.raises(Refused) as refused:
            claims(task(), **fields)
        assert refused.value.reason == "no_lifetime_left"


@pytest.mark.bears("RV03")
def test_an_ended_task_or_ancestor_gets_no_token() -> None:
    chain = family(3)
    for place in range(3):
        broken = [*chain[:place], end(chain[place], State.REVOKED, Cause.OPERATOR, NOW), *chain[place + 1 :]]
        with pytest.raises(Refused) as refused:
            claims(broken[0], broken[1:])
        assert refused.value.reason == "task_ended"
    with pytest.raises(Refused):
        claims(task(), now=NOW + HOUR)


@pytest.mark.bears("TX09", "TX12")
def test_a_token_says_no_more_than_its_task_and_resource() -> None:
    wide = task(authority=authority(detail(), detail(locations=["https://other.example.org"], actions=["o.read"])))
    made = claims(wide)
    assert made.scope == "ticket.read"
    assert [each.text for each in made.authorization_details.resources()] == [TICKETS.text]
    assert made.task.authority_hash == wide.authority.digest
    with pytest.raises(PolicyDenied) as widened:
        claims(wide, authority=authority(detail(actions=["ticket.write"])))
    assert widened.value.reason == "invalid_authorization_details"
    with pytest.raises(PolicyDenied) as elsewhere:
        claims(wide, resource=Resource("https://tickets.example.org.evil"))
    assert elsewhere.value.reason == "invalid_target"


def test_the_highest_epoch_of_the_chain_is_written() -> None:
    # A suspension of any of them raises it from one counter for the tree: a token of before is below, one of after is not.
    chain = family(2)
    assert claims(replace(chain[0], epoch=3), [replace(chain[1], epoch=4)]).task.epoch == 4
    assert claims(replace(chain[0], epoch=4), [replace(chain[1], epoch=3)]).task.epoch == 4


@pytest.mark.parametrize("fields", [{"jti": ""}, {"jti": "a b"}, {"txn": "x" * 129}, {"issuer": "http://b.example"}])
def test_ids_and_issuer_of_ours_are_well_formed(fields: dict[str, Any]) -> None:
    with pytest.raises(Invalid):
        claims(task(), **fields)


def test_every_claim_has_a_fate_and_every_fate_a_claim() -> None:
    everything = claims(task(delegation=delegation(session="s", acr="a", auth_time=NOW))).to_payload() | {"nbf": 1}
    assert everything.keys() == FATES.keys()


@pytest.mark.parametrize("name", sorted(FATES))
def test_each_claim_is_required_unless_it_is_declared_optional(name: str) -> None:
    without = payload(**{name: ...})
    if FATES[name].value.startswith("required"):
        with pytest.raises(InvalidToken) as refused:
            TaskClaims.parse(without)
        assert refused.value.reason == "token_claim_missing"
    else:
        TaskClaims.parse(without)


@pytest.mark.parametrize("name", ["email", "groups", "may_act", "status", "mission", "azp", "Sub", ""])
def test_a_claim_that_nobody_declared_is_named_and_means_nothing(name: str) -> None:
    known = TaskClaims.parse(payload())
    read = TaskClaims.parse(payload(**{name: "x"}))
    assert read.unknown == (name,)
    assert replace(read, unknown=()) == known
    assert name not in read.to_payload()


NOT_A_DATE = ["1793000000", 1.5, 1793000000.0, True, False, None, -1, 253402300800, 2**63, [], {}]


@pytest.mark.bears("JW10")
@pytest.mark.parametrize("name", ["exp", "iat", "nbf", "auth_time"])
@pytest.mark.parametrize("value", NOT_A_DATE)
def test_a_time_is_a_whole_number_of_seconds(name: str, value: Any) -> None:
    with pytest.raises(InvalidToken):
        TaskClaims.parse(payload(**{name: value}))


@pytest.mark.bears("JW11")
@pytest.mark.parametrize(
    "value",
    [
        [TICKETS.text],
        [TICKETS.text, "https://other.example"],
        [],
        "",
        None,
        {},
        {"aud": TICKETS.text},
        7,
        "tickets",
        "https://tickets.example.org#x",
    ],
)
def test_the_audience_is_one_resource_in_one_string(value: Any) -> None:
    with pytest.raises(InvalidToken):
        TaskClaims.parse(payload(aud=value))


def nested(*ids: str) -> dict[str, Any]:
    value: dict[str, Any] = {"sub": ids[-1]}
    for each in reversed(ids[:-1]):
        value = {"sub": each, "act": value}
    return value


@pytest.mark.bears("AC02", "AC03", "AC04")
@pytest.mark.parametrize(
    "act",
    [
        None,
        [],
        {},
        "x",
        {"sub": "usr_1"},
        {"sub": 7},
        {"sub": None},
        {"sub": str(AGENT), "act": None},
        {"sub": str(AGENT), "act": {}},
        {"sub": str(AGENT), "act": []},
        {"sub": str(AGENT), "aud": TICKETS.text},
        {"sub": str(AGENT), "exp": 1},
        {"sub": str(AGENT), "scope": "all"},
        {"sub": str(AGENT), "sub_profile": "admin"},
        {"sub": str(AGENT) + "/x"},
        {"sub": "spiffe://EXAMPLE.org/agent"},
        nested(str(AGENT), str(agent(1))),
        nested(str(AGENT), str(agent(1)), str(AGENT)),
        nested(str(AGENT), *(str(agent(n)) for n in range(8))),
    ],
)
def test_a_chain_that_we_would_not_mint_is_refused(act: Any) -> None:
    with pytest.raises(InvalidToken):
        TaskClaims.parse(payload(act=act))


def reference(**changes: Any) -> dict[str, Any]:
    made: dict[str, Any] = payload()["task"]
    return {name: value for name, value in (made | changes).items() if value is not ...}


@pytest.mark.parametrize(
    "value",
    [
        None,
        [],
        "tsk_1",
        {},
        reference(id=...),
        reference(root=...),
        reference(epoch=...),
        reference(hop=...),
        reference(purpose=...),
        reference(authority_hash=...),
        reference(id="a b"),
        reference(id=7),
        reference(parent=None),
        reference(parent="tsk_0"),
        reference(epoch=-1),
        reference(epoch=True),
        reference(epoch=1.0),
        reference(epoch=2**53),
        reference(hop=0),
        reference(hop=2),
        reference(hop=9),
        reference(purpose="triage ticket 4711"),
        reference(authority_hash="sha-256:x"),
        reference(use="twice"),
        reference(use=None),
        reference(state="active"),
    ],
)
def test_the_task_is_read_strictly(value: Any) -> None:
    with pytest.raises(InvalidToken):
        TaskClaims.parse(payload(task=value))


@pytest.mark.parametrize(
    "changes",
    [
        {"client_id": str(agent(1))},
        {"client_id": "invoice-bot"},
        {"client_id": None},
        {"sub": ""},
        {"sub": None},
        {"sub": "é"},
        {"sub": ["usr_1"]},
        {"sid": ""},
        {"acr": 1},
        {"iss": None},
        {"jti": ""},
        {"jti": 7},
        {"txn": "a b"},
        {"scope": "ticket.read ticket.write"},
        {"scope": ""},
        {"scope": ["ticket.read"]},
        {"cnf": None},
        {"cnf": {}},
        {"authorization_details": []},
        {"authorization_details": "[]"},
        {"authorization_details": authority().text()},
        {"authorization_details": [detail(type="other")]},
        {"authorization_details": None},
        {"exp": EPOCH_SECONDS},
        {"exp": EPOCH_SECONDS - 1},
    ],
)
def test_claims_that_do_not_agree_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidToken):
        TaskClaims.parse(payload(**changes))


def test_single_use_is_written_and_read() -> None:
    made = claims(task(), use="once")
    assert made.to_payload()["task"]["use"] == "once"  # type: ignore[index,call-overload]
    assert TaskClaims.parse(made.to_payload()).task.use == "once"


def test_claims_that_contradict_each_other_cannot_be_made() -> None:
    made = claims(task())
    for changes in ({"client_id": agent(1)}, {"act": ()}, {"exp": made.iat}, {"scope": "x"}, {"act": (AGENT, AGENT)}):
        with pytest.raises(InvalidToken):
            replace(made, **changes)


@pytest.mark.bears("AC02", "AC03")
@pytest.mark.parametrize("act", [[AGENT, agent(1), AGENT], [AGENT, *map(agent, range(MAX_ACT_DEPTH))]])
def test_a_chain_that_its_hop_agrees_with_is_judged_all_the_same(act: list[SpiffeId]) -> None:
    leaf, root = family(2)
    made = claims(leaf, [root])
    with pytest.raises(InvalidToken):
        replace(made, act=tuple(act), client_id=AGENT, task=replace(made.task, hop=len(act)))
    with pytest.raises(InvalidToken):
        TaskClaims.parse(payload(act=nested(*map(str, act)), task=reference(hop=len(act), parent="tsk_0")))


def test_a_chain_is_read_no_deeper_than_it_can_be() -> None:
    assert len(read_act(nested(*(str(agent(n)) for n in range(MAX_ACT_DEPTH))))) == MAX_ACT_DEPTH
    with pytest.raises(InvalidToken):
        read_act(nested(*(str(agent(n)) for n in range(MAX_ACT_DEPTH + 1))))
