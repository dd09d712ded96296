"""Leases of tasks and of node agents: who is silent is stopped, by steady time alone, and nothing starts it again by itself."""

from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from broker.errors import NotFound, Refused
from broker.server.store.ports import Reader, Writer
from broker.server.tasks.config import TaskDefaults
from broker.server.tasks.lifecycle import TASK_CHANGE
from broker.server.tasks.sessions import AgentRun, Detached
from broker.server.tasks.supervisor import BEAT_CHANGE, SupervisionRules
from broker.tasks import Cause, State, Supervision, Task, activate
from tests.fakes.oidc import OidcIssuer
from tests.unit.server.tasks.estate import AGENT, NODE, OTHER_NODE, X5T, X5T_2, Estate, running
from tests.unit.server.tasks.watching import frames, pass_time, refusal, task_of

LEASE = 30.0
RUN = AgentRun("run_1")


async def leased(estate: Estate, **fields: Any) -> Task:
    return await estate.start(supervision=Supervision.LEASE, **fields)


async def resume(estate: Estate, task_id: str) -> None:
    """Let a task go on, as a door for it does."""

    def act(writer: Writer) -> None:
        task = writer.task(task_id)
        assert task is not None
        going = activate(task, None, estate.clock.now())
        writer.replace_task(going, task.version)
        writer.change(TASK_CHANGE, going.id, going.state.value)

    await estate.store.write(act)


# ---- leased tasks


@pytest.mark.bears("RV21")
async def test_a_missed_lease_suspends_the_task_and_kills_its_tokens(estate: Estate) -> None:
    task = await leased(estate)
    token = await estate.issue(task)
    verified = estate.verify(token)
    await pass_time(estate, LEASE)
    assert (await task_of(estate, task.id)).state is State.ACTIVE
    await pass_time(estate, 1)
    stopped = await task_of(estate, task.id)
    assert (stopped.state, stopped.cause, stopped.version) == (State.SUSPENDED, Cause.LEASE_LAPSED, 2)
    assert await refusal(estate, verified) == "task_suspended"
    with pytest.raises(Refused) as refused:
        await estate.issue(task)
    assert refused.value.reason == "task_suspended"
    (record,) = await estate.records("task_suspended")
    assert (record.actor, record.subject) == ("server", task.id)
    assert (record.fields["cause"], record.fields["supervision"]) == ("lease_lapsed", "lease")
    (frame,) = await frames(estate)
    assert (frame.kind, frame.state, frame.cause, frame.epoch) == ("subtree", "suspended", "lease_lapsed", 1)
    assert record.fields["frame_seq"] == frame.seq


async def test_a_heartbeat_keeps_the_task(estate: Estate) -> None:
    task = await leased(estate)
    for _ in range(4):
        await pass_time(estate, LEASE - 1)
        lease = await estate.supervisor.renew(estate.actor(), task.id)
        assert (lease.ttl, lease.left) == (LEASE, LEASE)
    assert (await task_of(estate, task.id)).state is State.ACTIVE
    await pass_time(estate, 10)
    shown = estate.supervisor.lease_of(await task_of(estate, task.id))
    assert shown is not None
    assert (shown.ttl, shown.left) == (LEASE, LEASE - 10)


@pytest.mark.bears("RV21")
@pytest.mark.parametrize("hours", [1, -1])
async def test_a_jump_of_the_wall_clock_neither_ends_nor_keeps_a_task(estate: Estate, hours: int) -> None:
    task = await leased(estate, ttl=80_000, user_token=estate.user_token(lifetime=86_400))
    estate.clock._now += timedelta(hours=hours)
    await pass_time(estate, LEASE - 1)
    assert (await task_of(estate, task.id)).state is State.ACTIVE
    await pass_time(estate, 2)
    assert (await task_of(estate, task.id)).state is State.SUSPENDED


async def test_a_server_that_stood_still_takes_nobody_for_silent(estate: Estate) -> None:
    task = await leased(estate)
    estate.clock.advance(600)
    await estate.supervisor.check()
    assert (await task_of(estate, task.id)).state is State.ACTIVE


async def test_after_a_restart_every_lease_begins_anew(tmp_path: Path, oidc: OidcIssuer) -> None:
    async with running(tmp_path, oidc) as before:
        task = await leased(before)
        await pass_time(before, LEASE - 1)
    async with running(tmp_path, oidc) as after:
        await pass_time(after, LEASE - 1)
        assert (await task_of(after, task.id)).state is State.ACTIVE
        await pass_time(after, 2)
        assert (await task_of(after, task.id)).state is State.SUSPENDED


async def test_a_lapsed_task_ends_when_nobody_lets_it_go_on(tmp_path: Path, oidc: OidcIssuer) -> None:
    rules = SupervisionRules(lapsed=timedelta(seconds=60))
    async with running(tmp_path, oidc, supervision=rules) as before:
        task = await leased(before)
        await pass_time(before, LEASE + 1)
        await pass_time(before, 50)
        assert (await task_of(before, task.id)).state is State.SUSPENDED
    async with running(tmp_path, oidc, supervision=rules) as estate:
        await pass_time(estate, 59)
        assert (await task_of(estate, task.id)).state is State.SUSPENDED
        await pass_time(estate, 2)
        over = await task_of(estate, task.id)
        assert (over.state, over.cause) == (State.REVOKED, Cause.LEASE_LAPSED)
        (record,) = await estate.records("task_ended")
        assert (record.actor, record.fields["cause"]) == ("server", "lease_lapsed")


async def test_a_late_heartbeat_resumes_nothing(estate: Estate) -> None:
    task = await leased(estate)
    await pass_time(estate, LEASE + 1)
    with pytest.raises(Refused) as refused:
        await estate.supervisor.renew(estate.actor(), task.id)
    assert refused.value.reason == "task_suspended"
    assert (await task_of(estate, task.id)).state is State.SUSPENDED


async def test_a_resumed_task_is_waited_for_again_and_its_old_tokens_stay_dead(estate: Estate) -> None:
    task = await leased(estate)
    old = estate.verify(await estate.issue(task))
    await pass_time(estate, LEASE + 1)
    await resume(estate, task.id)
    new = estate.verify(await estate.issue(task))
    assert await refusal(estate, old) == "task_suspended"
    assert await refusal(estate, new) == ""
    await pass_time(estate, LEASE - 1)
    assert (await task_of(estate, task.id)).state is State.ACTIVE
    await pass_time(estate, 2)
    assert (await task_of(estate, task.id)).state is State.SUSPENDED
    assert await refusal(estate, new) == "task_suspended"


async def test_a_completed_task_is_not_waited_for(estate: Estate) -> None:
    task = await leased(estate)
    await estate.lifecycle.complete(estate.actor(), task.id)
    await pass_time(estate, LEASE + 5)
    assert (await task_of(estate, task.id)).state is State.COMPLETED
    assert await estate.records("task_suspended") == []


async def test_only_its_own_process_sends_the_heartbeat(estate: Estate) -> None:
    task = await leased(estate)
    await estate.report("ws_2", X5T_2)
    with pytest.raises(Refused) as other:
        await estate.supervisor.renew(estate.actor(session="ws_2", x5t=X5T_2), task.id)
    assert other.value.reason == "session_mismatch"
    with pytest.raises(NotFound):
        await estate.supervisor.renew(estate.actor(), "tsk_of_nobody")


async def test_another_supervision_has_no_heartbeat(estate: Estate) -> None:
    attached = await estate.start()
    with pytest.raises(Refused) as refused:
        await estate.supervisor.renew(estate.actor(), attached.id)
    assert refused.value.reason == "supervision_mismatch"
    task = await leased(estate)
    with pytest.raises(Refused):
        await estate.supervisor.attach(estate.actor(), task.id)
    assert (await estate.supervisor.attach(estate.actor(), attached.id)).ttl == LEASE


async def test_a_leased_task_ends_with_its_process_where_one_is_known(estate: Estate) -> None:
    task = await leased(estate)
    assert task.session == "ws_1"
    await estate.sessions.report(NODE, [], ["ws_1"])
    over = await task_of(estate, task.id)
    assert (over.state, over.cause) == (State.REVOKED, Cause.PROCESS_EXITED)


async def test_where_no_node_agent_tells_of_a_process_its_heartbeat_does(estate: Estate) -> None:
    caller = estate.caller(x5t=X5T_2, not_after=estate.clock.now() + timedelta(seconds=60))
    task = await estate.start(caller, supervision=Supervision.LEASE, ttl=600)
    assert (task.session, task.supervision) == (None, Supervision.LEASE)
    # Its certificate may end: the heartbeat comes with the next one.
    assert task.expires_at > caller.not_after
    renewed = estate.caller(x5t=X5T, not_after=estate.clock.now() + timedelta(hours=1))
    await estate.supervisor.renew(renewed, task.id)


async def test_lease_may_be_the_default(tmp_path: Path, oidc: OidcIssuer) -> None:
    defaults = TaskDefaults(supervision=Supervision.LEASE)
    async with running(tmp_path, oidc, defaults=defaults) as estate:
        assert (await estate.start()).supervision is Supervision.LEASE
        assert (await estate.start(estate.caller(x5t=X5T_2))).supervision is Supervision.LEASE


# ---- node agents


async def told(estate: Estate, run: str = "run_1") -> Task:
    """A task of a process that a node agent of this run has told of."""
    await estate.report("ws_1", X5T, run=run)
    await estate.sessions.report(NODE, [], [], run=AgentRun(run))
    return await estate.start(estate.actor(run=run))


@pytest.mark.bears("V07")
async def test_a_silent_node_agent_stops_the_attached_tasks_of_its_workloads(estate: Estate) -> None:
    task = await told(estate)
    verified = estate.verify(await estate.issue(task))
    await pass_time(estate, LEASE + 1)
    stopped = await task_of(estate, task.id)
    assert (stopped.state, stopped.cause) == (State.SUSPENDED, Cause.LEASE_LAPSED)
    assert await refusal(estate, verified) == "task_suspended"
    # Its return with the process alive brings nothing back.
    await estate.sessions.report(NODE, [], [], run=RUN)
    await pass_time(estate, 5)
    assert (await task_of(estate, task.id)).state is State.SUSPENDED
    assert (await estate.start(estate.actor(run="run_1"))).state is State.ACTIVE


async def test_a_node_agent_that_reports_is_not_missed(estate: Estate) -> None:
    task = await told(estate)
    for _ in range(5):
        await pass_time(estate, 20)
        await estate.sessions.report(NODE, [], [], run=RUN)
    assert (await task_of(estate, task.id)).state is State.ACTIVE
    assert await estate.records("task_suspended") == []


async def test_a_silent_node_agent_stops_none_of_anothers_and_no_leased_one(estate: Estate) -> None:
    await told(estate)
    await estate.report("ws_9", X5T_2, node=OTHER_NODE, spiffe_id=AGENT, entry_id="entry-1")
    mine = await estate.start(estate.actor(run="run_1"), supervision=Supervision.LEASE)
    for _ in range(4):
        await pass_time(estate, 10)
        await estate.supervisor.renew(estate.actor(), mine.id)
    assert (await task_of(estate, mine.id)).state is State.ACTIVE


async def test_a_silent_node_agent_may_end_them_and_their_sessions(tmp_path: Path, oidc: OidcIssuer) -> None:
    rules = SupervisionRules(ends_with_agent=True)
    async with running(tmp_path, oidc, supervision=rules) as estate:
        task = await told(estate)
        verified = estate.verify(await estate.issue(task))
        await pass_time(estate, LEASE + 1)
        over = await task_of(estate, task.id)
        assert (over.state, over.cause) == (State.REVOKED, Cause.LEASE_LAPSED)
        assert await refusal(estate, verified) != ""
        (record,) = await estate.records("session_ended")
        assert (record.actor, record.fields["cause"]) == ("server", "agent_lost")
        left_out = await estate.report("ws_1", X5T, run="run_1")
        assert left_out["ws_1"].reason == "session_ended"


async def test_after_a_restart_of_the_server_a_node_agent_has_its_lease(tmp_path: Path, oidc: OidcIssuer) -> None:
    async with running(tmp_path, oidc) as before:
        task = await told(before)
        await pass_time(before, LEASE - 1)
    async with running(tmp_path, oidc) as after:
        await pass_time(after, LEASE - 1)
        assert (await task_of(after, task.id)).state is State.ACTIVE
        await pass_time(after, 2)
        assert (await task_of(after, task.id)).state is State.SUSPENDED


@pytest.mark.bears("V07")
async def test_a_new_run_of_the_node_agent_ends_what_the_old_one_attested(estate: Estate) -> None:
    task = await told(estate)
    verified = estate.verify(await estate.issue(task))
    new = AgentRun("run_2", is_new=True)
    await estate.report("ws_2", X5T_2, run="run_2")
    for _ in range(2):  # it is told again when the answer was lost
        await estate.sessions.report(NODE, [], [], run=new)
    over = await task_of(estate, task.id)
    assert (over.state, over.cause) == (State.REVOKED, Cause.SESSION_ENDED)
    assert await refusal(estate, verified) != ""
    (record,) = await estate.records("session_ended")
    assert (record.subject, record.fields["cause"]) == ("ws_1", "agent_stopped")
    assert (await estate.start(estate.actor(session="ws_2", x5t=X5T_2, run="run_2"))).state is State.ACTIVE


async def test_a_new_run_of_one_node_agent_ends_nothing_of_anothers(estate: Estate) -> None:
    task = await told(estate)
    await estate.sessions.report(OTHER_NODE, [], [], run=AgentRun("run_2", is_new=True))
    assert (await task_of(estate, task.id)).state is State.ACTIVE


# ---- streams of attached tasks


@pytest.mark.bears("RV21")
async def test_a_task_that_its_process_let_go_of_is_suspended(estate: Estate) -> None:
    task = await told(estate)
    verified = estate.verify(await estate.issue(task))
    for _ in range(2):
        await estate.sessions.report(NODE, [], [], run=RUN, detached=[Detached(task.id, "ws_1")])
    stopped = await task_of(estate, task.id)
    assert (stopped.state, stopped.cause, stopped.version) == (State.SUSPENDED, Cause.LEASE_LAPSED, 2)
    assert await refusal(estate, verified) == "task_suspended"
    (record,) = await estate.records("task_suspended")
    assert record.actor == str(NODE)


async def test_a_node_agent_lets_go_of_its_own_workloads_tasks_only(estate: Estate) -> None:
    task = await told(estate)
    lease = await leased(estate)
    for node, one, session in (
        (OTHER_NODE, task.id, "ws_1"),
        (NODE, task.id, "ws_2"),
        (NODE, "tsk_none", "ws_1"),
        (NODE, lease.id, "ws_1"),
    ):
        await estate.sessions.report(node, [], [], run=RUN, detached=[Detached(one, session)])
    assert (await task_of(estate, task.id)).state is State.ACTIVE
    assert (await task_of(estate, lease.id)).state is State.ACTIVE


# ---- several servers


async def test_what_another_server_heard_counts(estate: Estate) -> None:
    task = await leased(estate)
    for _ in range(3):
        await pass_time(estate, LEASE - 1)
        body = f'{{"by":"another","tasks":["{task.id}"],"agents":["{NODE}"]}}'
        await estate.store.write(lambda writer, body=body: writer.change(BEAT_CHANGE, "", body))
    assert (await task_of(estate, task.id)).state is State.ACTIVE


async def test_a_heartbeat_costs_no_write_where_there_is_one_server(estate: Estate) -> None:
    def head(reader: Reader) -> int:
        return reader.change_head()

    task = await leased(estate)
    before = await estate.store.read(head), estate.store.written
    await estate.supervisor.renew(estate.actor(), task.id)
    await estate.sessions.report(NODE, [], [], run=RUN)
    await pass_time(estate, 10)
    assert (await estate.store.read(head), estate.store.written) == before
