"""The exchange: who gets a task and a token, what they say, and that a repeated request gets no more than the first."""

import dataclasses
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from broker.errors import BrokerError, Invalid, InvalidToken, NotFound, PolicyDenied, Refused
from broker.server.identity.changes import NODE_KIND, node_text
from broker.server.tasks.config import TaskDefaults
from broker.server.tasks.records import sha256
from broker.server.tasks.requests import IssueRequest, StartRequest
from broker.spiffe import SpiffeId
from broker.spiffe.jose import b64url_decode
from broker.tasks import Resource, State, Supervision
from tests.fakes.oidc import OidcIssuer
from tests.unit.server.tasks.estate import (
    AGENT,
    ISSUER,
    NEIGHBOUR,
    NODE,
    OTHER_NODE,
    TICKETS,
    WIKI,
    X5T,
    X5T_2,
    Estate,
    authority,
    detail,
    entry,
    node,
    running,
)


async def test_a_task_and_a_token(estate: Estate) -> None:
    task = await estate.start(user_token=estate.user_token(sid="s-1", acr="mfa", auth_time=1_700_000_000))
    assert (task.user, task.agent, task.session, task.state) == ("alice", AGENT, "ws_1", State.ACTIVE)
    assert task.supervision is Supervision.ATTACHED
    issued = await estate.issue(task, scope="ticket.read")
    verified = estate.verify(issued)
    claims = verified.claims
    assert (verified.user, verified.agent, verified.task_id, verified.root) == ("alice", AGENT, task.id, task.id)
    assert (claims.cnf.x5t, claims.cnf.session) == (X5T, "ws_1")
    assert (claims.scope, claims.sid, claims.acr, claims.auth_time) == ("ticket.read", "s-1", "mfa", 1_700_000_000)
    assert claims.exp - claims.iat == 180
    assert claims.iss == ISSUER
    assert issued.scope == "ticket.read"
    assert estate.counted == [("issued", "")]


async def test_every_grant_is_recorded_without_the_token(estate: Estate) -> None:
    task = await estate.start()
    issued = await estate.issue(task)
    started, granted = await estate.records("task_started", "token_issued")
    assert (started.subject, started.actor, started.fields["user"]) == (task.id, str(AGENT), "alice")
    assert granted.subject == task.id
    assert granted.fields["scope"] == "ticket.read ticket.write"
    stored = await estate.store.read(lambda reader: reader.token(issued.jti))
    assert stored is not None
    assert stored.hash == granted.fields["token_hash"]
    # Of the very bytes that were signed: whoever holds the token can compare.
    assert stored.hash == sha256(b64url_decode(issued.access_token.split(".")[1]))
    for record in await estate.records():
        assert issued.access_token.split(".")[2] not in record.body().decode()


async def test_a_new_task_is_a_change(estate: Estate) -> None:
    seen: list[tuple[str, str]] = []
    estate.store.subscribe(lambda changes: seen.extend((change.kind, change.key) for change in changes))
    task = await estate.start()
    assert seen == [("task", task.id)]


# ---- who


async def changed(estate: Estate, what: str) -> None:
    match what:
        case "entry gone":
            await estate.remove_entry("entry-1")
        case "entry expired":
            await estate.put_entry(entry(revision=1, expires_at=estate.clock.now()))
        case "entry says no":
            await estate.put_entry(entry(revision=1, may_start_tasks=False))
        case "entry moved to another node":
            await estate.put_entry(entry(revision=1, parent_id=OTHER_NODE))
        case "entry is for another id":
            await estate.put_entry(entry(revision=1, spiffe_id=SpiffeId("spiffe://example.org/other")))
        case "node banned":
            banned = node(NODE, banned=True)

            def act(writer: Any) -> None:
                writer.put_node(banned)
                writer.change(NODE_KIND, str(NODE), node_text(banned))

            await estate.store.write(act)


@pytest.mark.bears("X05")
@pytest.mark.parametrize(
    "what",
    [
        "entry gone",
        "entry expired",
        "entry says no",
        "entry moved to another node",
        "entry is for another id",
        "node banned",
    ],
)
async def test_what_ends_the_right_to_act_ends_it_at_every_door_alike(estate: Estate, what: str) -> None:
    task = await estate.start()
    issued = await estate.issue(task)
    await changed(estate, what)
    with pytest.raises(Refused):
        await estate.start()
    with pytest.raises(Refused):
        await estate.issue(task)
    if what != "entry moved to another node":
        for attempt in (
            estate.exchange.issue(estate.caller(), IssueRequest(TICKETS, task.id)),
            estate.exchange.start_and_issue(estate.caller(), estate.start_request(), IssueRequest(TICKETS)),
        ):
            with pytest.raises(Refused):
                await attempt
    if what not in ("entry moved to another node", "entry is for another id"):
        assert await estate.tokens.introspect(issued.access_token, AGENT) is None


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"agent": OTHER_NODE}, "agent_not_authorized"),
        ({"entry_id": "entry-2"}, "agent_not_authorized"),
        ({"entry_id": "nothing"}, "agent_not_authorized"),
        ({"spiffe_id": NEIGHBOUR}, "tasks_not_allowed"),
        ({"entry_id": "entry-3", "spiffe_id": SpiffeId("spiffe://example.org/quiet")}, "tasks_not_allowed"),
        ({"session": None}, "workload_missing"),
        ({"agent": None}, "workload_missing"),
    ],
)
async def test_a_node_agent_speaks_for_its_own_entries_only(estate: Estate, fields: dict[str, Any], code: str) -> None:
    with pytest.raises(Refused) as caught:
        await estate.start(estate.actor(**fields))
    assert caught.value.reason == code
    refused = await estate.records("task_refused")
    assert [record.fields["reason"] for record in refused] == [code]


async def test_a_certificate_that_is_over_grants_nothing(estate: Estate) -> None:
    with pytest.raises(Refused):
        await estate.start(estate.actor(not_after=estate.clock.now()))


async def test_a_session_of_another_node_is_not_taken_over(estate: Estate) -> None:
    await estate.report("ws_1", X5T_2, node=OTHER_NODE, spiffe_id=NEIGHBOUR, entry_id="entry-2")
    with pytest.raises(Refused) as caught:
        await estate.start()
    assert caught.value.reason == "session_taken"


@pytest.mark.bears("SP09", "RV14", "X04")
async def test_a_task_belongs_to_the_process_that_started_it(estate: Estate) -> None:
    task = await estate.start()
    replica = estate.actor(session="ws_2", x5t=X5T_2)
    with pytest.raises(Refused) as caught:
        await estate.issue(task, replica)
    assert caught.value.reason == "session_mismatch"
    with pytest.raises(NotFound):
        await estate.issue(
            task,
            estate.actor(spiffe_id=NEIGHBOUR, entry_id="entry-2", agent=OTHER_NODE, session="ws_9", x5t=X5T_2),
        )
    with pytest.raises(NotFound):
        await estate.exchange.issue(estate.actor(), IssueRequest(TICKETS, "tsk_unknown"))


@pytest.mark.bears("PB11")
async def test_a_rotated_certificate_goes_on_with_its_task(estate: Estate) -> None:
    task = await estate.start()
    issued = await estate.issue(task, estate.actor(x5t=X5T_2))
    assert estate.verify(issued).claims.cnf.x5t == X5T_2
    session = await estate.store.read(lambda reader: reader.session("ws_1"))
    assert session is not None
    assert session.x5t == X5T_2


async def test_the_https_door_knows_the_session_by_the_certificate(estate: Estate) -> None:
    await estate.report("ws_1", X5T)
    task = await estate.start(estate.caller())
    assert (task.session, task.supervision) == ("ws_1", Supervision.ATTACHED)
    assert estate.verify(await estate.issue(task, estate.caller())).claims.cnf.session == "ws_1"
    await estate.sessions.report(NODE, [], ["ws_1"])
    with pytest.raises(Refused):
        await estate.start(estate.caller())


async def test_without_a_known_session_the_certificate_bounds_everything(estate: Estate) -> None:
    caller = estate.caller(not_after=estate.clock.now() + timedelta(seconds=90))
    task = await estate.start(caller)
    assert (task.session, task.supervision) == (None, Supervision.NONE)
    assert task.expires_at <= caller.not_after
    claims = estate.verify(await estate.issue(task, caller)).claims
    assert claims.cnf.session is None
    assert claims.exp <= caller.not_after.timestamp()
    with pytest.raises(Refused) as caught:
        await estate.start(caller, supervision=Supervision.ATTACHED)
    assert caught.value.reason == "session_unknown"


async def test_an_audience_without_session_binding_ends_with_the_certificate(estate: Estate) -> None:
    task = await estate.start(authority=authority(detail(locations=[WIKI.text])))
    actor = estate.actor(not_after=estate.clock.now() + timedelta(seconds=30))
    issued = await estate.issue(task, actor, resource=WIKI)
    claims = estate.verify(issued, WIKI).claims
    assert claims.cnf.session is None
    assert 28 <= claims.exp - claims.iat <= 30


async def test_supervision_none_only_where_it_is_allowed(estate: Estate, tmp_path: Path, oidc: OidcIssuer) -> None:
    with pytest.raises(PolicyDenied) as caught:
        await estate.start(supervision=Supervision.NONE)
    assert caught.value.reason == "unsupervised_not_allowed"
    other = tmp_path / "other"
    other.mkdir()
    async with running(other, oidc, defaults=TaskDefaults(allow_unsupervised=True)) as lenient:
        assert (await lenient.start(supervision=Supervision.NONE)).supervision is Supervision.NONE


# ---- how much


@pytest.mark.bears("TX09", "BG06", "X02")
@pytest.mark.parametrize(
    ("asked", "code"),
    [
        ({"scope": "ticket.delete"}, "invalid_scope"),
        ({"scope": "ticket.read ticket.delete"}, "invalid_scope"),
        ({"authority": authority(detail(actions=["ticket.delete"]))}, "invalid_authorization_details"),
        ({"authority": authority(detail(locations=[WIKI.text]))}, "invalid_authorization_details"),
        ({"resource": WIKI}, "invalid_target"),
        ({"resource": Resource("https://tickets.example.org/a")}, "invalid_target"),
        ({"resource": Resource("https://tickets.example.org.evil")}, "invalid_target"),
        ({"resource": Resource("https://unknown.example")}, "invalid_target"),
    ],
)
async def test_a_token_never_goes_beyond_its_task(estate: Estate, asked: dict[str, Any], code: str) -> None:
    task = await estate.start()
    with pytest.raises(PolicyDenied) as caught:
        await estate.issue(task, **asked)
    assert caught.value.reason == code
    assert estate.counted == [("refused", code)]
    assert [record.fields["reason"] for record in await estate.records("token_refused")] == [code]


async def test_a_token_can_ask_for_less(estate: Estate) -> None:
    task = await estate.start()
    narrow = authority(detail(actions=["ticket.read"], identifier="4711"))
    claims = estate.verify(await estate.issue(task, authority=narrow)).claims
    assert claims.authorization_details == narrow


async def test_a_task_never_goes_beyond_the_users_own_limits(estate: Estate) -> None:
    limited = estate.user_token(authorization_details=[detail(actions=["ticket.read"])])
    with pytest.raises(PolicyDenied) as caught:
        await estate.start(user_token=limited)
    assert caught.value.reason == "invalid_authorization_details"
    task = await estate.start(user_token=limited, authority=authority(detail(actions=["ticket.read"])))
    assert task.authority.scope() == "ticket.read"


@pytest.mark.bears("TX12", "TX13")
async def test_a_location_in_no_registered_audience_starts_no_task(estate: Estate) -> None:
    for location in ("https://unknown.example", "https://tickets.example.org:444", "https://example.org"):
        with pytest.raises(PolicyDenied) as caught:
            await estate.start(authority=authority(detail(locations=[location])))
        assert caught.value.reason == "invalid_target"
    await estate.start(authority=authority(detail(locations=["https://TICKETS.example.org:443/a"])))


@pytest.mark.bears("BG10")
@pytest.mark.parametrize("limits", ['{"max_calls": 20}', '{"anything": null}'])
async def test_a_limit_that_nobody_meters_is_refused(estate: Estate, limits: str) -> None:
    with pytest.raises(PolicyDenied) as caught:
        await estate.start(limits=limits)
    assert caught.value.reason == "unmetered_limit"


async def test_a_metered_constraint_is_refused_too(estate: Estate) -> None:
    counted = detail(constraints={"max_calls": [{"call_class": "write", "count": 2}]})
    with pytest.raises(PolicyDenied) as caught:
        await estate.start(authority=authority(counted))
    assert caught.value.reason == "unmetered_limit"


@pytest.mark.parametrize(
    "fields",
    [
        {"user_token": ""},
        {"purpose": ""},
        {"purpose": "a\x00b"},
        {"purpose": "x" * 1025},
        {"ttl": -1},
        {"limits": "[]"},
        {"limits": "{"},
        {"idempotency_key": "a b"},
        {"idempotency_key": "k" * 256},
    ],
)
def test_a_malformed_start_is_no_request(fields: dict[str, Any]) -> None:
    with pytest.raises(Invalid):
        StartRequest(**{"user_token": "x", "purpose": "p", "authority": authority()} | fields)


def test_empty_limits_are_none() -> None:
    StartRequest("x", "p", authority(), limits="{}")


@pytest.mark.bears("TX24")
@pytest.mark.parametrize(
    "scope", [" ", "a  b", " a", "a ", 'a"b', "a\\b", "\u00e9", "a " * 10_000 + "a", "x" * 4097, "a\nb"]
)
def test_a_malformed_scope_is_no_request(scope: str) -> None:
    with pytest.raises(Invalid) as caught:
        IssueRequest(TICKETS, "tsk_1", scope)
    assert caught.value.reason == "invalid_scope"


# ---- how long


@pytest.mark.bears("TX21")
async def test_the_end_is_the_earliest_of_all_ends(estate: Estate) -> None:
    now = estate.clock.now()

    def left(moment: datetime) -> float:
        return (moment - now).total_seconds()

    assert 3599 <= left((await estate.start(user_token=estate.user_token(lifetime=9000))).expires_at) <= 3600
    assert 599 <= left((await estate.start()).expires_at) <= 600, "the user's token"
    short = await estate.start(ttl=60)
    assert 59 <= left(short.expires_at) <= 60
    claims = estate.verify(await estate.issue(short)).claims
    assert claims.exp <= short.expires_at.timestamp()
    await estate.put_entry(entry(revision=1, expires_at=now + timedelta(seconds=40)))
    bounded = await estate.start()
    assert left(bounded.expires_at) <= 40
    assert left((await estate.issue(bounded)).expires_at) <= 40


async def test_a_task_lives_no_longer_than_the_server_allows(estate: Estate) -> None:
    task = await estate.start(user_token=estate.user_token(lifetime=10_000_000), ttl=9_000_000)
    assert task.expires_at - task.created_at == timedelta(seconds=86_400)


@pytest.mark.bears("TX19")
async def test_the_clock_is_read_in_the_transaction(estate: Estate) -> None:
    token = estate.user_token(lifetime=20)
    estate.clock.advance(21)
    # Within the leeway the token still reads as valid; nothing is granted on it.
    with pytest.raises(InvalidToken) as caught:
        await estate.start(user_token=token)
    assert caught.value.reason == "subject_expired"


@pytest.mark.bears("V06")
async def test_a_task_past_its_deadline_gives_no_token(estate: Estate) -> None:
    task = await estate.start(ttl=60)
    issued = await estate.issue(task)
    estate.clock.advance(60)
    with pytest.raises(Refused) as caught:
        await estate.issue(task)
    assert caught.value.reason == "task_ended"
    assert await estate.tokens.introspect(issued.access_token, AGENT) is None


# ---- the user


async def test_the_users_token_of_a_running_task_must_be_of_its_user(estate: Estate) -> None:
    task = await estate.start()
    await estate.issue(task, user_token=estate.user_token())
    with pytest.raises(PolicyDenied) as caught:
        await estate.issue(task, user_token=estate.user_token("mallory"))
    assert caught.value.reason == "subject_mismatch"


# ---- refusals


async def test_refusals_are_recorded_at_a_bounded_rate(estate: Estate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estate.refusals._known, "_left", 3.0)
    for _ in range(10):
        with pytest.raises(NotFound):
            await estate.exchange.issue(estate.actor(), IssueRequest(TICKETS, "tsk_unknown"))
    assert len(await estate.records("token_refused")) == 3
    estate.clock.advance(1)
    with pytest.raises(NotFound):
        await estate.exchange.issue(estate.actor(), IssueRequest(TICKETS, "tsk_unknown"))
    last = (await estate.records("token_refused"))[-1]
    assert last.fields["reasons"] == ("left_out:7",)


async def test_what_looks_like_a_secret_is_not_recorded(estate: Estate) -> None:
    secret = "eyJhbGciOiJFUzI1NiJ9.eyJzdWIi.c2ln"
    with pytest.raises(PolicyDenied):
        await estate.exchange.start_and_issue(
            estate.actor(), estate.start_request(), IssueRequest(Resource(f"https://tickets.example.org/{secret}"))
        )
    (record,) = await estate.records("token_refused")
    assert secret not in record.body().decode()
    assert record.fields["reason"] == "invalid_target"


async def test_nothing_secret_is_shown(estate: Estate) -> None:
    request = estate.start_request()
    assert request.user_token not in repr(request)
    issued = await estate.issue(await estate.start())
    assert issued.access_token not in repr(issued)
    assert issued.access_token not in str(dataclasses.replace(issued, scope="x"))
    with pytest.raises(BrokerError) as caught:
        await estate.start(user_token=request.user_token + "x")
    assert request.user_token not in str(caught.value)
