"""What authority stands on is asked at every door, at that moment: also where what hangs on it has not been ended yet."""

from collections.abc import Awaitable, Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from broker.errors import BrokerError, Conflict, PolicyDenied
from broker.server.store.revocation_rows import RevokedSvid
from broker.server.tasks.config import TaskDefaults
from broker.server.tasks.requests import Actor, IssueRequest, Operation
from broker.spiffe import SpiffeId
from broker.tasks import Cause, State, Supervision
from broker.tasks.causes import SessionEnd
from broker.tasks.standing import StandingDelegation, read_agents
from broker.tasks.stop import OPERATOR, Stop, StopKind, session_name
from tests.fakes.oidc import OidcIssuer
from tests.unit.server.tasks.estate import (
    AGENT,
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
    running,
)
from tests.unit.server.tasks.life import change, child, neighbour
from tests.unit.server.tasks.watching import task_of

KEY = "the-same-key"


async def code(attempt: Awaitable[Any]) -> str:
    try:
        await attempt
    except BrokerError as error:
        return error.reason
    return "done"


async def stop(estate: Estate, kind: StopKind, name: str, *, tokens: bool = True) -> None:
    """Set a stop and nothing else: of one of many tasks this is all that is there for a moment."""
    now = estate.clock.now()
    wanted = Stop(
        kind=kind,
        name=name,
        source=OPERATOR,
        not_before=now + timedelta(seconds=31),
        cause=Cause.OPERATOR,
        changed_at=now,
        tokens_from=int(now.timestamp()) + 1 if tokens else 0,
        unfinished=True,
    )
    await estate.store.write(lambda writer: writer.put_stop(wanted))


def both(estate: Estate, **fields: Any) -> Awaitable[Any]:
    return estate.exchange.start_and_issue(estate.actor(), estate.start_request(**fields), IssueRequest(TICKETS))


@pytest.mark.bears("RV10")
@pytest.mark.parametrize(
    ("kind", "name"), [(StopKind.USER, "alice"), (StopKind.AGENT, str(AGENT)), (StopKind.AUDIENCE, TICKETS.text)]
)
async def test_a_stop_that_has_ended_nothing_yet_stops_every_token(estate: Estate, kind: StopKind, name: str) -> None:
    task = await estate.start()
    issued = await estate.issue(task)
    request = estate.start_request(idempotency_key=KEY)
    first = estate.exchange.start_and_issue(estate.actor(), request, IssueRequest(TICKETS))
    assert await code(first) == "done"
    assert await estate.tokens.introspect(issued.access_token, AGENT) is not None
    await stop(estate, kind, name)
    known = {"user_ended", "stopped_just_now"}
    assert await code(estate.issue(task)) in known
    assert await code(both(estate)) in known
    # A key that was used before opens nothing.
    again = estate.exchange.start_and_issue(estate.actor(), request, IssueRequest(TICKETS))
    assert await code(again) in known
    assert await estate.tokens.introspect(issued.access_token, AGENT) is None
    estate.clock.advance(1)
    # Of an agent or an audience later tokens count again, and none from before.
    after = await code(estate.issue(task))
    assert after == ("user_ended" if kind is StopKind.USER else "done")
    assert await estate.tokens.introspect(issued.access_token, AGENT) is None


@pytest.mark.bears("RV10")
@pytest.mark.parametrize("kind", [StopKind.SESSION, StopKind.SESSIONS])
async def test_a_session_that_ended_has_no_living_token_before_its_tasks_end(estate: Estate, kind: StopKind) -> None:
    task = await estate.start(user_token=estate.user_token(sid="s-1"))
    issued = await estate.issue(task)
    assert await estate.tokens.introspect(issued.access_token, AGENT) is not None
    name = session_name(task.delegation.issuer, "s-1") if kind is StopKind.SESSION else "alice"
    await stop(estate, kind, name, tokens=False)
    assert await estate.tokens.introspect(issued.access_token, AGENT) is None
    assert await code(estate.issue(task)) == "user_session_ended"


async def standing(estate: Estate, delegation_id: str, *agents: str) -> None:
    now = estate.clock.now()
    made = StandingDelegation(
        id=delegation_id,
        issuer="https://idp.example.org",
        user="alice",
        client="console",
        token_hash="sha-256:" + "A" * 43,
        auth_time=now,
        authority=authority(),
        agents=read_agents(list(agents)),
        purpose="while she is away",
        max_task_ttl=600,
        max_hops=1,
        created_at=now,
        expires_at=now + timedelta(hours=1),
    )
    await estate.store.write(lambda writer: writer.add_delegation(made))


async def test_a_standing_word_is_for_the_agents_that_it_names_and_while_nothing_stops_it(estate: Estate) -> None:
    def start(delegation_id: str, **fields: Any) -> Awaitable[Any]:
        return estate.start(**{"user_token": "", "delegation_id": delegation_id} | fields)

    await standing(estate, "dlg_1", str(AGENT), "spiffe://example.org/others/*")
    await standing(estate, "dlg_2", str(NEIGHBOUR))
    assert await code(start("dlg_1")) == "done"
    # One that names others is told apart from one that is not there by nobody.
    assert await code(start("dlg_2")) == await code(start("dlg_3")) == "delegation_agent"
    wider = authority(detail(actions=["ticket.delete"]))
    assert await code(start("dlg_1", authority=wider)) == "invalid_authorization_details"
    assert (await start("dlg_1", ttl=3000)).expires_at <= estate.clock.now() + timedelta(seconds=600)
    await stop(estate, StopKind.DELEGATION, "dlg_1", tokens=False)
    assert await code(start("dlg_1")) == "delegation_withdrawn"


@pytest.mark.parametrize("who", ["its user", "the other agent"])
async def test_a_stop_that_has_ended_nothing_yet_lets_nothing_begin_below_or_after(estate: Estate, who: str) -> None:
    task, held = await estate.start(), await estate.start()
    await change(estate, estate.actor(), held, Operation.SUSPEND)
    if who == "its user":
        await stop(estate, StopKind.USER, "alice")
        assert await code(change(estate, estate.actor(), held, Operation.RESUME)) == "user_ended"
        assert await code(change(estate, OPERATOR, held, Operation.RESUME)) == "user_ended"
    else:
        await stop(estate, StopKind.AGENT, str(NEIGHBOUR))
    known = {"user_ended", "stopped_just_now"}
    assert await code(child(estate, task, estate.actor())) in known
    assert await code(change(estate, estate.actor(), task, Operation.HAND_OFF, to=NEIGHBOUR)) in known
    assert (await task_of(estate, task.id)).state is State.ACTIVE, "what was refused has ended nothing"


async def test_a_revoked_svid_asks_for_nothing_at_either_door(estate: Estate) -> None:
    task = await estate.start()
    now = estate.clock.now()
    row = RevokedSvid("authority", "ab12", str(AGENT), "entry-1", now + timedelta(hours=1), now, 0)
    await estate.store.write(lambda writer: writer.add_revoked(row))
    for actor in (estate.actor(serial="ab12"), estate.caller(serial="ab12")):
        assert await code(estate.start(actor)) == "svid_revoked"
        assert await code(estate.issue(task, actor)) == "svid_revoked"
    assert await code(estate.start(estate.actor(serial="ab1"))) == "done"


async def test_the_entry_that_a_process_was_registered_by_counts_and_no_other_of_its_id(estate: Estate) -> None:
    await estate.report("ws_1", X5T)
    assert await code(estate.start(estate.caller())) == "done"
    await estate.put_entry(entry(revision=1, may_start_tasks=False))
    await estate.put_entry(entry("entry-4", parent_id=OTHER_NODE))
    assert await code(estate.start(estate.caller())) == "tasks_not_allowed"
    # Of a process that no node agent has told of nobody can say by which it was.
    assert await code(estate.start(estate.caller(x5t=X5T_2))) == "done"


async def test_a_certificate_that_a_node_agent_told_of_under_another_id_is_nobodys(estate: Estate) -> None:
    await estate.report("ws_9", X5T_2, node=OTHER_NODE, spiffe_id=NEIGHBOUR, entry_id="entry-2")
    assert await code(estate.start(estate.caller(x5t=X5T_2))) == "session_ended"


@pytest.mark.parametrize("ends", ["entry", "certificate"])
async def test_nothing_outlives_what_it_was_asked_with(estate: Estate, ends: str) -> None:
    minute = estate.clock.now().replace(microsecond=0) + timedelta(seconds=60)
    task = await estate.start()
    if ends == "entry":
        await estate.put_entry(entry(revision=1, expires_at=minute))
        assert (await estate.start()).expires_at == minute
        assert (await estate.issue(task)).expires_at == minute
        return
    # Where no node agent tells of the end of the process, its certificate stands in for it.
    caller = estate.caller(x5t=X5T_2, not_after=minute)
    alone = await estate.start(caller)
    assert alone.expires_at == minute
    assert (await estate.issue(alone, caller, resource=TICKETS)).expires_at <= minute


async def test_a_child_may_have_no_limit_that_nobody_counts(estate: Estate) -> None:
    task = await estate.start()
    counted = authority(detail(constraints={"max_calls": [{"call_class": "read", "count": 1}]}))
    assert await code(child(estate, task, estate.actor(), authority=counted)) == "unmetered_limit"


async def test_who_starts_below_a_task_has_it(estate: Estate) -> None:
    task = await estate.start()
    assert await code(child(estate, task, neighbour(estate), AGENT)) == "task_unknown"
    assert await code(child(estate, task, estate.actor(session="ws_2", x5t=X5T_2))) == "session_mismatch"
    assert await code(child(estate, task, estate.actor())) == "done"


@pytest.mark.parametrize("entrys", ["word", "time"])
async def test_work_is_given_on_by_who_may_still_have_tasks(estate: Estate, entrys: str) -> None:
    task = await estate.start()
    over = {"may_start_tasks": False} if entrys == "word" else {"expires_at": estate.clock.now()}
    await estate.put_entry(entry(revision=1, **over))
    handing = change(estate, estate.actor(), task, Operation.HAND_OFF, to=NEIGHBOUR)
    assert await code(handing) in {"tasks_not_allowed", "agent_not_authorized"}
    assert await code(child(estate, task, estate.actor())) in {"tasks_not_allowed", "agent_not_authorized"}
    assert await code(child(estate, task, estate.caller())) == "tasks_not_allowed"
    assert await code(change(estate, estate.actor(), task, Operation.COMPLETE)) == "done"


async def test_a_task_is_taken_up_at_the_version_that_was_read(estate: Estate) -> None:
    below = await child(estate, await estate.start(), estate.actor())
    mine = neighbour(estate)
    wrong = change(estate, mine, below, Operation.ATTACH, expected_version=below.version + 1)
    assert await code(wrong) == "stale_version"
    assert await code(change(estate, mine, below, Operation.ATTACH, expected_version=below.version)) == "done"


async def test_a_process_that_nobody_watches_takes_up_no_work_of_one_that_is_gone(estate: Estate) -> None:
    task = await estate.start()
    await change(estate, estate.actor(), task, Operation.SUSPEND)
    await estate.sessions.report(NODE, [], ["ws_1"])
    stranger = estate.caller(x5t=X5T_2)
    assert await code(change(estate, stranger, task, Operation.RESUME)) == "session_unknown"
    assert await code(change(estate, estate.actor(session="ws_2", x5t=X5T_2), task, Operation.RESUME)) == "done"


async def test_a_suspended_task_outlives_the_exit_of_its_process_and_no_other_end_of_it(estate: Estate) -> None:
    task = await estate.start()
    await change(estate, estate.actor(), task, Operation.SUSPEND)
    await estate.sessions.report(NODE, [], ["ws_1"], {"ws_1": SessionEnd.SELECTORS_CHANGED})
    assert (await task_of(estate, task.id)).state is State.REVOKED


async def test_another_node_agent_ends_no_task_of_a_process_that_is_not_its_own(estate: Estate) -> None:
    task = await estate.start()
    other: Callable[..., Actor] = estate.actor
    assert await code(estate.lifecycle.complete(other(agent=OTHER_NODE), task.id)) == "session_unknown"
    assert await code(estate.lifecycle.complete(other(spiffe_id=NEIGHBOUR), task.id)) == "session_unknown"
    assert (await task_of(estate, task.id)).state is State.ACTIVE


async def test_a_standing_word_of_another_task_is_not_this_ones(estate: Estate) -> None:
    task = await estate.start()
    assert await code(estate.issue(task, delegation_id="dlg_other")) == "subject_mismatch"


@pytest.mark.bears("TX27")
async def test_a_key_is_for_the_request_in_all_its_parts(estate: Estate) -> None:
    task = await estate.start()
    wide, small = await estate.issue(task), await estate.issue(task, scope="ticket.read")
    assert (await estate.issue(task, user_token=wide.access_token, idempotency_key=KEY)).scope == wide.scope
    for other in (
        estate.issue(task, user_token=small.access_token, idempotency_key=KEY),
        estate.issue(task, idempotency_key=KEY),
        estate.issue(task, user_token=wide.access_token, jkt="A" * 43, idempotency_key=KEY),
    ):
        with pytest.raises(Conflict) as refused:
            await other
        assert refused.value.reason == "idempotency_mismatch"
    started = estate.start_request(idempotency_key="another")
    await estate.exchange.start(estate.actor(), started)
    for name, value in (("purpose", "x"), ("ttl", 60), ("supervision", "lease"), ("authority", authority())):
        differs = {"purpose": "x"} if name == "purpose" else {name: value}
        same = {"user_token": started.user_token, "idempotency_key": "another"}
        attempt = estate.exchange.start(estate.actor(), estate.start_request(**same | differs))
        assert await code(attempt) == ("done" if name == "authority" else "idempotency_mismatch")


@pytest.mark.bears("TX09", "TX21")
async def test_a_token_that_is_shown_gives_no_more_and_no_longer(estate: Estate) -> None:
    task = await estate.start()
    small = await estate.issue(task, scope="ticket.read")
    estate.clock.advance(100)
    again = await estate.issue(task, user_token=small.access_token)
    assert (again.scope, again.expires_at) == ("ticket.read", small.expires_at)
    wider = authority(detail(actions=["ticket.write"]))
    with pytest.raises(PolicyDenied):
        await estate.issue(task, user_token=small.access_token, authority=wider)
    with pytest.raises(PolicyDenied):
        await estate.issue(task, user_token=small.access_token, scope="ticket.write")
    with pytest.raises(PolicyDenied):
        await estate.issue(task, user_token=small.access_token, resource=WIKI)


async def test_of_several_tasks_that_wait_for_it_a_workload_names_one(estate: Estate) -> None:
    task = await estate.start()
    shown = (await estate.issue(task)).access_token
    mine = neighbour(estate)
    first = await child(estate, task, estate.actor())
    request = IssueRequest(TICKETS, user_token=shown)
    assert (await estate.exchange.issue(mine, request)).task_id == first.id
    second = await child(estate, task, estate.actor())
    assert await code(estate.exchange.issue(mine, request)) == "subject_ambiguous"
    named = IssueRequest(TICKETS, second.id, user_token=shown)
    assert (await estate.exchange.issue(mine, named)).task_id == second.id
    elsewhere = await child(estate, await estate.start(), estate.actor())
    other = IssueRequest(TICKETS, elsewhere.id, user_token=shown)
    assert await code(estate.exchange.issue(mine, other)) == "subject_not_delegated"
    stranger = estate.actor(spiffe_id=SpiffeId("spiffe://example.org/third"), entry_id="entry-5", session="ws_5")
    await estate.put_entry(entry("entry-5", stranger.spiffe_id))
    await estate.directory.load(estate.store)
    assert await code(estate.exchange.issue(stranger, request)) == "subject_not_delegated"


async def test_the_tokens_of_a_process_end_with_it_also_where_its_task_goes_on(
    tmp_path: Path, oidc: OidcIssuer
) -> None:
    async with running(tmp_path, oidc, defaults=TaskDefaults(allow_unsupervised=True)) as estate:
        task = await estate.start(supervision=Supervision.NONE)
        issued = await estate.issue(task)
        assert await estate.tokens.introspect(issued.access_token, AGENT) is not None
        await estate.sessions.report(NODE, [], ["ws_1"])
        assert (await task_of(estate, task.id)).state is State.ACTIVE
        assert await estate.tokens.introspect(issued.access_token, AGENT) is None
        # Whoever shows it has nothing of it either.
        assert await code(
            estate.issue(task, estate.actor(session="ws_2", x5t=X5T_2), user_token=issued.access_token)
        ) == ("subject_ended")
