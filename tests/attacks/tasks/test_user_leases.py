"""A user's session of which nothing is heard: its tasks stand still, its tokens die, and only a newer word lets them go on."""

from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest

from broker._proto.broker.server.v1 import tasks_pb2
from broker.audit.events import Event
from broker.errors import BrokerError, Refused
from broker.sdk import Workload
from broker.server.api.grpc.tasks import Tasks
from broker.server.tasks.requests import Operation
from broker.server.tasks.user_leases import Looked
from broker.spiffe import SpiffeId
from broker.tasks import Cause, State
from tests.attacks.tasks.outward_rig import DETAILS, TRIAGE, rig
from tests.attacks.tasks.userends_rig import Scene, Work, playing
from tests.fakes.oidc import OidcIssuer
from tests.fakes.running_agent import until
from tests.unit.server.api.http.door import assert_error
from tests.unit.server.tasks.estate import AGENT, TICKETS, X5T
from tests.unit.server.tasks.life import change, child, neighbour
from tests.unit.server.tasks.test_grpc_tasks import agent, workload

LEASE = 200


@pytest.fixture
async def scene(tmp_path: Path, oidc: OidcIssuer) -> AsyncIterator[Scene]:
    async with playing(tmp_path, oidc, leases={oidc.issuer: timedelta(seconds=LEASE)}) as open_scene:
        yield open_scene


async def silence(scene: Scene, seconds: float = LEASE) -> Looked:
    """Let time pass in which nothing is heard, and have the server look."""
    scene.estate.clock.advance(seconds)
    return await scene.estate.ends.leases.look()


async def over_the_socket(scene: Scene, work: Work, user_token: str) -> str:
    """Ask for a token as a node agent passes it on; give ``done``, or the code of the refusal."""
    estate = scene.estate
    service = Tasks(
        store=estate.store, clock=estate.clock, exchange=estate.exchange, assertions=estate.assertions,
        lifecycle=estate.lifecycle, changes=estate.changes, feed=estate.feed, refusals=estate.refusals,
        supervisor=estate.supervisor,
    )  # fmt: skip
    wanted = tasks_pb2.IssueTokenRequest(
        workload=workload(estate), task_id=work.task.id, resource=TICKETS.text, user_token=user_token
    )
    try:
        issued = await service.IssueToken(wanted, None, agent())  # type: ignore[arg-type]
    except BrokerError as error:
        return error.reason
    work.token = replace(work.token, access_token=issued.access_token)
    return "done"


async def over_https(scene: Scene, work: Work, user_token: str) -> str:
    """Ask at ``/token``, as the process that holds the session's certificate."""
    svid = scene.door.come_as(AGENT)
    assert svid is not None
    await scene.estate.report("ws_1", svid.x5t)
    answer = await scene.door.token(
        subject_token=user_token, task=work.task.id, purpose=None, authorization_details=None
    )
    await scene.estate.report("ws_1", X5T)
    body = answer.json()
    if answer.status_code != 200:
        assert_error(answer, 400, "invalid_grant")
        return str(body["error_code"])
    work.token = replace(work.token, access_token=body["access_token"])
    return "done"


DOORS = {"socket": over_the_socket, "https": over_https}


@pytest.mark.bears("TX20", "RV11", "RV12")
@pytest.mark.parametrize("door", sorted(DOORS))
async def test_an_unconfirmed_session_suspends_and_a_newer_token_lets_go_on(scene: Scene, door: str) -> None:
    work, ask = await scene.work(lifetime=3600), DOORS[door]
    old = scene.user_token(lifetime=3600)
    spared = await scene.work("bob", sid="s-2", lifetime=3600)
    assert await silence(scene, LEASE - 1) == Looked(0, 0)
    confirmed = scene.user_token("bob", sid="s-2")
    await scene.estate.issue(spared.task, user_token=confirmed)
    work.token = await scene.estate.issue(work.task)
    assert (await work.introspected(), await work.verifier()) == (True, "alive")
    before = len(await scene.frames())

    assert await silence(scene, 1) == Looked(1, 0)
    found = await work.state()
    assert (found.state, found.cause) == (State.SUSPENDED, Cause.USER_UNCONFIRMED)
    assert (await work.introspected(), await work.verifier()) == (False, "task_suspended")
    (frame,) = (await scene.frames())[before:]
    assert (frame.kind, frame.root, frame.epoch, frame.cause) == (
        "subtree",
        found.root,
        found.epoch,
        "user_unconfirmed",
    )
    (record,) = await scene.records(Event.TASK_SUSPENDED)
    assert (record.actor, record.fields["cause"], record.fields["frame_seq"]) == (
        "server", "user_unconfirmed", frame.seq,
    )  # fmt: skip
    assert (await spared.renewal(), (await spared.state()).state) == ("done", State.ACTIVE)

    # The token of before says nothing of now, at either door, and its refusal is on record.
    assert await ask(scene, work, old) == "user_session_unconfirmed"
    refused = await scene.records(Event.TASK_REFUSED, Event.TOKEN_REFUSED)
    assert refused[-1].fields["reason"] == "user_session_unconfirmed"
    assert await ask(scene, work, scene.user_token(sid="s-other")) in {"task_suspended", "user_session_unconfirmed"}
    dead = work.token

    assert await ask(scene, work, scene.user_token()) == "done"
    found = await work.state()
    assert (found.state, found.cause) == (State.ACTIVE, None)
    assert (await work.introspected(), await work.verifier()) == (True, "alive")
    (resumed,) = await scene.records(Event.TASK_RESUMED)
    assert (resumed.actor, resumed.subject) == (scene.oidc.issuer, work.task.id)
    # What was issued before does not come back with the task.
    before_it = Work(scene, work.task, dead)
    assert (await before_it.introspected(), await before_it.verifier()) == (False, "task_suspended")


@pytest.mark.bears("TX20")
async def test_all_tasks_of_the_session_go_on_and_those_below_them(scene: Scene) -> None:
    first, second = await scene.work(lifetime=3600), await scene.work(lifetime=3600)
    low = await child(scene.estate, first.task, scene.estate.actor())
    deep = Work(scene, low, await scene.estate.issue(low, neighbour(scene.estate)))
    assert await silence(scene) == Looked(2, 0)
    assert (await deep.introspected(), await deep.verifier()) == (False, "task_suspended")
    assert (await deep.state()).state is State.ACTIVE
    # A new task on a newer word confirms the session: what stood still follows.
    assert await first.exchange() == "done"
    assert await scene.estate.ends.leases.look() == Looked(0, 2)
    assert [(await work.state()).state for work in (first, second)] == [State.ACTIVE] * 2
    assert await second.renewal() == "done"
    deep.token = await scene.estate.issue(low, neighbour(scene.estate))
    assert (await deep.introspected(), await deep.verifier()) == (True, "alive")
    # Silence again: it is suspended again.
    assert await silence(scene) == Looked(3, 0)


@pytest.mark.bears("RV12", "RV14")
async def test_nobody_lets_it_go_on_without_the_users_word(scene: Scene) -> None:
    work = await scene.work(lifetime=3600)
    await silence(scene)
    for who in (scene.estate.actor(), "operator:uid:0"):
        with pytest.raises(BrokerError) as caught:
            await change(scene.estate, who, work.task, Operation.RESUME)
        assert caught.value.reason == "user_session_unconfirmed"
    assert await scene.estate.ends.leases.look() == Looked(0, 0)
    assert (await work.state()).state is State.SUSPENDED


@pytest.mark.bears("RV14")
async def test_a_process_that_is_gone_is_not_brought_back_by_the_user(scene: Scene) -> None:
    work = await scene.work(lifetime=3600)
    await silence(scene)
    await scene.estate.sessions.report(scene.estate.actor().agent, [], ["ws_1"])  # type: ignore[arg-type]
    later = scene.estate.actor(session="ws_2", x5t="B" * 42 + "w")
    await scene.estate.report("ws_2", later.x5t)
    await scene.estate.start(later, user_token=scene.user_token())
    assert await scene.estate.ends.leases.look() == Looked(0, 0)
    assert (await work.state()).state is State.SUSPENDED
    # The agent's next process takes it up, as its own act.
    await change(scene.estate, later, work.task, Operation.RESUME)
    assert ((await work.state()).state, (await work.state()).session) == (State.ACTIVE, "ws_2")


@pytest.mark.bears("TX20")
async def test_other_sessions_and_standing_delegations_go_on(scene: Scene) -> None:
    silent = await scene.work(sid=None, lifetime=3600)
    made = (await scene.delegate()).json()
    standing = await scene.estate.start(
        user_token="", delegation_id=made["id"], authority=silent.task.authority.for_scope("ticket.read")
    )
    scene.estate.clock.advance(LEASE / 2)
    named = await scene.work(sid="s-2", lifetime=3600)
    assert await silence(scene, LEASE / 2) == Looked(1, 0)
    states = [(await Work(scene, task, silent.token).state()).state for task in (silent.task, named.task, standing)]
    assert states == [State.SUSPENDED, State.ACTIVE, State.ACTIVE]
    assert standing.agent == SpiffeId(str(AGENT))


@pytest.mark.bears("TX20", "RV11", "RV21")
async def test_a_workload_shows_a_newer_token_at_its_socket_and_is_kept_on() -> None:
    """Everything real, with a lease of three seconds: the SDK is refused, and lets its user's newer token speak."""
    async with rig(session_lease=timedelta(seconds=3)) as house:
        async with Workload.connect(f"unix:{house.agent.socket}", spiffe_id=TRIAGE) as me:
            block = me.task(
                user_token=house.user_token(sid="s-1"),
                purpose="triage",
                authorization_details=DETAILS,
                supervision="lease",
            )
            async with block as task:
                before = await task.token(TICKETS.text)
                await until(lambda: task.keeper.lost is not None)
                assert not await house.active(before)
                with pytest.raises(Refused) as caught:
                    await task.token(TICKETS.text)
                assert caught.value.reason == "task_suspended"
                assert "newer" in caught.value.hint or "lately" in caught.value.hint
                with pytest.raises(Refused) as another:
                    await task.token(TICKETS.text, user_token=house.user_token("bob", sid="s-1"))
                assert another.value.reason == "subject_mismatch"
                after = await task.token(TICKETS.text, user_token=house.user_token(sid="s-1"))
                assert (after != before, task.keeper.lost) == (True, None)
                assert not await house.active(before)
        records = house.records("task_suspended", "task_resumed", "task_ended")
        told = [(one.event, one.actor) for one in records]
        assert told[:2] == [("task_suspended", "server"), ("task_resumed", house.estate.oidc.issuer)]
        assert (records[0].fields["cause"], told[-1]) == ("user_unconfirmed", ("task_ended", str(TRIAGE)))
