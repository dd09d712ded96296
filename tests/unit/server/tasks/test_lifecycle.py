"""Ends: whatever the cause, one row, one record, one frame, in one commit; and nothing is issued after it."""

import asyncio
import contextlib
import dataclasses
import random
from datetime import timedelta
from pathlib import Path

import pytest

from broker.audit.records import Record
from broker.errors import BrokerError, Conflict, Invalid, NotFound, Refused, Unavailable
from broker.server import failpoints
from broker.server.store.ports import Reader, Writer
from broker.server.store.rows import FrameRow
from broker.server.store.tables import tree_ends
from broker.server.tasks import lifecycle
from broker.server.tasks.config import TaskDefaults
from broker.server.tasks.requests import Actor, IssueRequest
from broker.server.tasks.sessions import MAX_COUNT, MAX_REFUSED, RefusedCallers
from broker.spiffe import SpiffeId
from broker.tasks import Cause, State, Supervision, Task, start_child
from broker.tasks.causes import SessionEnd
from tests.fakes.oidc import OidcIssuer
from tests.unit.server.tasks.estate import (
    AGENT,
    NEIGHBOUR,
    NODE,
    OTHER_NODE,
    TICKETS,
    X5T_2,
    Estate,
    authority,
    running,
)


async def frames(estate: Estate) -> list[FrameRow]:
    now = estate.clock.now()
    return list(await estate.store.read(lambda reader: reader.live_frames(now)))


async def task_of(estate: Estate, task_id: str) -> Task:
    task = await estate.store.read(lambda reader: reader.task(task_id))
    assert task is not None
    return task


async def grow(estate: Estate, root: Task, *shape: int) -> list[Task]:
    """Add children below a task: ``shape`` is the number of children on each level. Each has an agent of its own."""

    def act(writer: Writer) -> list[Task]:
        made: list[Task] = []
        level = [root]
        for depth, width in enumerate(shape, start=1):
            below = []
            for parent in level:
                for number in range(width):
                    ancestors = tuple(reversed(writer.lineage(parent.id)[:-1]))
                    child = start_child(
                        parent,
                        ancestors,
                        id=f"{parent.id}-{number}",
                        agent=SpiffeId(f"spiffe://example.org/level/{depth}"),
                        session=None,
                        purpose="a part of it",
                        authority=authority(),
                        now=estate.clock.now(),
                        ttl=timedelta(minutes=5),
                    )
                    writer.add_task(child)
                    below.append(child)
            made += below
            level = below
        return made

    return await estate.store.write(act)


# ---- one end


async def test_completing_a_task_kills_its_tokens(estate: Estate) -> None:
    task = await estate.start()
    issued = await estate.issue(task)
    over = await estate.lifecycle.complete(estate.actor(), task.id, expected_version=task.version)
    assert (over.task.state, over.task.cause, over.task.version) == (State.COMPLETED, Cause.COMPLETED, 2)
    frame = (await frames(estate))[-1]
    assert (frame.kind, frame.root, frame.epoch, frame.state, frame.seq) == (
        "subtree", task.id, 1, "completed", over.frame_seq,
    )  # fmt: skip
    assert frame.epoch > estate.verify(issued).epoch
    assert frame.forget_at > issued.expires_at.timestamp() + 30
    (record,) = await estate.records("task_ended")
    assert (record.subject, record.fields["cause"], record.fields["frame_seq"]) == (
        task.id,
        "completed",
        over.frame_seq,
    )
    assert await estate.tokens.introspect(issued.access_token, AGENT) is None
    with pytest.raises(Refused):
        await estate.issue(task)


@pytest.mark.bears("V04")
async def test_ending_twice_is_one_end(estate: Estate) -> None:
    task = await estate.start()
    first = await estate.lifecycle.complete(estate.actor(), task.id, idempotency_key="c")
    again = await estate.lifecycle.complete(estate.actor(), task.id, idempotency_key="c")
    once_more = await estate.lifecycle.complete(estate.actor(), task.id)
    assert first.task == again.task == once_more.task
    assert (again.frame_seq, once_more.frame_seq) == (0, 0)
    assert len(await estate.records("task_ended")) == 1
    assert len(await frames(estate)) == 1


@pytest.mark.bears("RV12", "RV13")
async def test_an_end_is_final_and_a_stale_version_is_refused(estate: Estate) -> None:
    task = await estate.start()
    with pytest.raises(Conflict) as caught:
        await estate.lifecycle.revoke(task.id, by="operator:uid:0", expected_version=7)
    assert caught.value.reason == "stale_version"
    over = await estate.lifecycle.revoke(task.id, by="operator:uid:0", expected_version=1)
    assert (over.task.state, over.task.cause) == (State.REVOKED, Cause.OPERATOR)
    with pytest.raises(Conflict):
        await estate.lifecycle.complete(estate.actor(), task.id)
    assert (await estate.records("task_ended"))[0].actor == "operator:uid:0"


async def test_only_its_own_process_completes_a_task(estate: Estate) -> None:
    task = await estate.start()
    await estate.report("ws_2", X5T_2)
    await estate.report("ws_9", "C" * 42 + "w", node=OTHER_NODE, spiffe_id=NEIGHBOUR, entry_id="entry-2")
    with pytest.raises(Refused):
        await estate.lifecycle.complete(estate.actor(session="ws_2", x5t=X5T_2), task.id)
    stranger = estate.actor(spiffe_id=NEIGHBOUR, agent=OTHER_NODE, session="ws_9")
    with pytest.raises(NotFound):
        await estate.lifecycle.complete(stranger, task.id)
    with pytest.raises(Refused):
        await estate.lifecycle.complete(estate.actor(agent=OTHER_NODE), task.id)
    with pytest.raises(NotFound):
        await estate.lifecycle.complete(estate.actor(), "tsk_unknown")
    with pytest.raises(NotFound):
        await estate.lifecycle.revoke("tsk_unknown", by="operator:uid:0")
    assert (await task_of(estate, task.id)).state is State.ACTIVE


async def test_a_task_can_be_completed_after_its_entry_is_gone(estate: Estate) -> None:
    task = await estate.start()
    await estate.remove_entry("entry-1")
    assert (await estate.lifecycle.complete(estate.actor(), task.id)).task.state is State.COMPLETED


async def test_a_token_given_back_is_dead_and_the_task_lives(estate: Estate) -> None:
    task = await estate.start()
    issued, other = await estate.issue(task), await estate.issue(task)
    assert not await estate.lifecycle.revoke_token(issued.jti, owner=NEIGHBOUR)
    assert await estate.lifecycle.revoke_token(issued.jti, owner=AGENT)
    assert not await estate.lifecycle.revoke_token(issued.jti, owner=AGENT)
    (frame,) = await frames(estate)
    assert (frame.kind, frame.jti, frame.task) == ("token", issued.jti, task.id)
    assert await estate.tokens.introspect(issued.access_token, AGENT) is None
    assert await estate.tokens.introspect(other.access_token, AGENT) is not None
    assert len(await estate.records("token_revoked")) == 1


# ---- trees


@pytest.mark.bears("V04", "RV04", "RV10")
async def test_a_whole_tree_ends_with_one_frame(estate: Estate) -> None:
    root = await estate.start()
    below = await grow(estate, root, 3, 2)
    over = await estate.lifecycle.revoke(root.id, by="operator:uid:0")
    assert [frame.kind for frame in await frames(estate)] == ["subtree"]
    states = {(await task_of(estate, task.id)).state for task in below}
    assert states == {State.CASCADED}
    ends = await estate.records("task_ended")
    assert sorted(record.subject for record in ends) == sorted([root.id, *(task.id for task in below)])
    assert ends[0].fields["tasks_ended"] == 10
    assert over.task.id == root.id


async def test_a_branch_ends_alone_and_names_each_of_its_tasks(estate: Estate) -> None:
    root = await estate.start()
    below = await grow(estate, root, 2, 2)
    branch = below[0]
    gone = {branch.id, f"{branch.id}-0", f"{branch.id}-1"}
    over = await estate.lifecycle.revoke(branch.id, by="operator:uid:0")
    told = await frames(estate)
    assert {frame.task for frame in told} == gone
    assert {frame.kind for frame in told} == {"task"}
    assert over.frame_seq == told[-1].seq
    living = [task.id for task in [root, *below] if task.id not in gone]
    for task_id in living:
        assert (await task_of(estate, task_id)).state is State.ACTIVE
    assert await estate.store.read(lambda reader: reader.root_epoch(root.id)) == 0
    await estate.lifecycle.revoke(root.id, by="operator:uid:0")
    assert len(await estate.records("task_ended")) == 7, "each node once"


# ---- sessions


async def test_the_end_of_a_process_ends_its_tasks(estate: Estate) -> None:
    mine, mine_too = await estate.start(), await estate.start()
    other = await estate.start(estate.actor(session="ws_2", x5t=X5T_2))
    issued = await estate.issue(mine)
    await estate.sessions.report(OTHER_NODE, [], ["ws_1"])
    assert (await task_of(estate, mine.id)).state is State.ACTIVE, "another node cannot say so"
    await estate.sessions.report(NODE, [], ["ws_1", "ws_unknown"])
    for task in (mine, mine_too):
        ended = await task_of(estate, task.id)
        assert (ended.state, ended.cause) == (State.REVOKED, Cause.PROCESS_EXITED)
    assert (await task_of(estate, other.id)).state is State.ACTIVE
    assert [frame.kind for frame in await frames(estate)] == ["session", "subtree", "subtree"]
    (record,) = await estate.records("session_ended")
    assert record.fields["tasks_ended"] == 2
    assert await estate.tokens.introspect(issued.access_token, AGENT) is None
    await estate.sessions.report(NODE, [], ["ws_1"])
    assert len(await estate.records("session_ended")) == 1
    with pytest.raises(Refused) as caught:
        await estate.start()
    assert caught.value.reason == "session_ended"


@pytest.mark.bears("V07")
@pytest.mark.parametrize(
    ("cause", "of_tasks"),
    [
        (SessionEnd.PROCESS_EXITED, Cause.PROCESS_EXITED),
        (SessionEnd.PROCESS_CHANGED, Cause.SESSION_ENDED),
        (SessionEnd.SELECTORS_CHANGED, Cause.SESSION_ENDED),
        (SessionEnd.ATTESTATION_LAPSED, Cause.SESSION_ENDED),
        (SessionEnd.ENTRY_GONE, Cause.ENTRY_DELETED),
    ],
)
async def test_a_session_that_is_withdrawn_ends_its_tasks_as_an_exit_does(
    estate: Estate, cause: SessionEnd, of_tasks: Cause
) -> None:
    task = await estate.start()
    issued = await estate.issue(task)
    await estate.sessions.report(NODE, [], ["ws_1"], {"ws_1": cause})
    ended = await task_of(estate, task.id)
    assert (ended.state, ended.cause) == (State.REVOKED, of_tasks)
    assert next((frame.kind, frame.cause) for frame in await frames(estate)) == ("session", of_tasks)
    (record,) = await estate.records("session_ended")
    assert record.fields["cause"] == cause
    assert await estate.tokens.introspect(issued.access_token, AGENT) is None


async def test_an_unsupervised_task_outlives_its_process_and_its_tokens_do_not(
    tmp_path: Path, oidc: OidcIssuer
) -> None:
    async with running(tmp_path, oidc, defaults=TaskDefaults(allow_unsupervised=True)) as estate:
        task = await estate.start(supervision=Supervision.NONE)
        issued = await estate.issue(task)
        await estate.sessions.report(NODE, [], ["ws_1"])
        assert (await task_of(estate, task.id)).state is State.ACTIVE
        assert await estate.tokens.introspect(issued.access_token, AGENT) is None, "its process is gone"
        successor = estate.actor(session="ws_2", x5t=X5T_2)
        assert estate.verify(await estate.issue(task, successor)).claims.cnf.session == "ws_2"
        await estate.lifecycle.complete(successor, task.id)
        assert (await task_of(estate, task.id)).state is State.COMPLETED


async def test_a_session_that_has_ended_never_comes_back(estate: Estate) -> None:
    await estate.report("ws_1", X5T_2)
    await estate.sessions.report(NODE, [], ["ws_1"])
    left_out = await estate.report("ws_1", X5T_2)
    assert {name: error.reason for name, error in left_out.items()} == {"ws_1": "session_ended"}


async def test_an_agent_reports_its_own_entries_only(estate: Estate) -> None:
    left_out = await estate.report("ws_5", X5T_2, node=OTHER_NODE)
    assert left_out["ws_5"].reason == "agent_not_authorized"
    left_out = await estate.report("ws_5", X5T_2, spiffe_id=NEIGHBOUR)
    assert left_out["ws_5"].reason == "agent_not_authorized"
    assert await estate.store.read(lambda reader: reader.session("ws_5")) is None


# ---- time


@pytest.mark.bears("V06")
async def test_the_sweeper_writes_down_what_time_has_ended(estate: Estate) -> None:
    short = await estate.start(ttl=30)
    children = await grow(estate, short, 2)
    long = await estate.start(ttl=300)
    assert await estate.lifecycle.sweep() == 0
    estate.clock.advance(31)
    found = await estate.lifecycle.sweep()
    assert found >= 1
    assert await estate.lifecycle.sweep() == 0
    for task in [short, *children]:
        assert (await task_of(estate, task.id)).state in (State.EXPIRED, State.CASCADED)
    assert (await task_of(estate, short.id)).ended_at == short.expires_at
    assert (await task_of(estate, long.id)).state is State.ACTIVE
    ended = [record.subject for record in await estate.records("task_ended")]
    assert sorted(ended) == sorted({short.id, *(task.id for task in children)})


async def test_a_late_completion_is_an_expiry(estate: Estate) -> None:
    task = await estate.start(ttl=30)
    estate.clock.advance(31)
    over = await estate.lifecycle.complete(estate.actor(), task.id)
    assert (over.task.state, over.task.cause) == (State.EXPIRED, Cause.EXPIRED)


# ---- crashes and races


@pytest.mark.bears("V05", "RV09")
async def test_an_end_that_was_not_committed_did_not_happen(tmp_path: Path, oidc: OidcIssuer) -> None:
    async with running(tmp_path, oidc) as estate:
        task = await estate.start()
        failpoints.arm("lifecycle.before_commit=error", allowed=True)
        try:
            with pytest.raises(Unavailable):
                await estate.lifecycle.complete(estate.actor(), task.id)
        finally:
            failpoints.arm("", allowed=True)
        assert (await task_of(estate, task.id)).state is State.ACTIVE
        assert await frames(estate) == []
        issued = await estate.issue(task)
        over = await estate.lifecycle.complete(estate.actor(), task.id)
    async with running(tmp_path, oidc) as reopened:
        assert (await task_of(reopened, task.id)).state is State.COMPLETED
        assert reopened.feed.frame_of(task.id) == over.frame_seq
        assert await reopened.store.read(lambda reader: reader.root_epoch(task.root)) == 1
        assert await reopened.store.read(lambda reader: reader.token(issued.jti)) is not None


def trail(reader: Reader, after: int, task_id: str) -> list[str]:
    found = (Record.from_body(row.body) for row in reader.records(after, 1_000))
    return [record.event.value for record in found if record.subject == task_id]


@pytest.mark.bears("V02", "V03", "RV02", "RV03")
async def test_issue_against_complete_two_hundred_times(estate: Estate) -> None:
    """Whatever the order: no token is committed after the end, and one whose issue succeeded is dead after it."""
    luck = random.Random(4711)
    issued_count = 0
    for _ in range(200):
        task, actor = await estate.start(), estate.actor()
        head = await estate.store.read(lambda reader: reader.chain_head())

        async def issue(task: Task = task, actor: Actor = actor) -> str | None:
            for _ in range(luck.randrange(3)):
                await asyncio.sleep(0)
            with contextlib.suppress(Refused):
                return (await estate.exchange.issue(actor, IssueRequest(TICKETS, task.id))).access_token
            return None

        async def complete(task: Task = task, actor: Actor = actor) -> None:
            for _ in range(luck.randrange(3)):
                await asyncio.sleep(0)
            await estate.lifecycle.complete(actor, task.id)

        results = await asyncio.gather(issue(), complete(), issue(), return_exceptions=True)
        assert not [result for result in results if isinstance(result, BaseException)]
        tokens = [result for result in results if isinstance(result, str)]
        issued_count += len(tokens)
        for token in tokens:
            assert await estate.tokens.introspect(token, AGENT) is None
        events = await estate.store.read(lambda reader, after=head.seq, task_id=task.id: trail(reader, after, task_id))
        assert events.count("task_ended") == 1
        assert "token_issued" not in events[events.index("task_ended") :]
        assert events.count("token_issued") == len(tokens)
    assert 0 < issued_count < 400, "both orders were met"


async def test_ends_from_all_sides_at_once_are_one_end(estate: Estate) -> None:
    for _ in range(20):
        task = await estate.start(estate.actor(session="ws_7", x5t=X5T_2))
        actor = estate.actor(session="ws_7", x5t=X5T_2)

        async def quietly(*ends: object) -> None:
            for end in ends:
                with contextlib.suppress(BrokerError):
                    await end  # type: ignore[misc]

        await asyncio.gather(
            quietly(estate.lifecycle.complete(actor, task.id)),
            quietly(estate.lifecycle.revoke(task.id, by="operator:uid:0")),
            quietly(estate.lifecycle.complete(actor, task.id)),
            quietly(estate.lifecycle.sweep()),
        )
        ends = [record for record in await estate.records("task_ended") if record.subject == task.id]
        assert len(ends) == 1


async def test_a_large_tree_is_told_in_one_frame_and_counted(estate: Estate) -> None:
    root = await estate.start()
    await grow(estate, root, 20, 20)
    over = await estate.lifecycle.revoke(root.id, by="operator:uid:0")
    assert over.frame_seq == (await frames(estate))[-1].seq
    ends = await estate.records("task_ended")
    assert ends[0].fields["tasks_ended"] == 421
    assert len(ends) == 1, "it says how many; the rows say which"
    assert lifecycle.RECORDED_EACH < 420


@pytest.mark.bears("RV04", "V04")
async def test_the_rows_of_a_large_tree_are_written_by_the_sweep_and_others_come_in_between(
    estate: Estate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tree_ends, "WRITTEN_AT_ONCE", 10)
    monkeypatch.setattr(lifecycle, "ROWS_EACH", 2)
    root, beside = await estate.start(), await estate.start()
    below = await grow(estate, root, 4, 5)
    await estate.lifecycle.revoke(root.id, by="operator:uid:0")
    told = [await task_of(estate, task.id) for task in below]
    assert {(task.state, task.version) for task in told} == {(State.CASCADED, 2)}
    assert (await estate.records("task_ended"))[0].fields["tasks_ended"] == 25
    assert [frame.kind for frame in await frames(estate)] == ["subtree"]

    def unwritten(writer: Writer) -> int:
        (count,) = writer._sql.row("SELECT count(*) FROM tasks WHERE ended_at IS NULL AND depth > 0")
        return count

    sweep, left = asyncio.create_task(estate.lifecycle.sweep()), []
    while not sweep.done():
        left.append(await estate.store.write(unwritten))
    assert await sweep == 0, "no task was found whose time is over"
    assert {left[0], await estate.store.write(unwritten)} == {24, 0}
    assert len(set(left)) > 6, left
    assert [await task_of(estate, task.id) for task in below] == told
    assert (await task_of(estate, beside.id)).state is State.ACTIVE
    assert len(await estate.records("task_ended")) == 25, "each once"


async def test_overdue_children_are_recorded_once_as_what_they_are(estate: Estate) -> None:
    root = await estate.start()
    first, second = await grow(estate, root, 2)
    early = dataclasses.replace(first, expires_at=root.created_at + timedelta(seconds=10), version=2)
    await estate.store.write(lambda writer: writer.replace_task(early, expected_version=1))
    estate.clock.advance(11)
    await estate.lifecycle.revoke(root.id, by="operator:uid:0")
    states = {record.subject: record.fields["state"] for record in await estate.records("task_ended")}
    assert states == {root.id: "revoked", first.id: "expired", second.id: "cascaded"}
    assert len(await estate.records("task_ended")) == 3


@pytest.mark.bears("L03")
async def test_refusals_at_a_nodes_socket_are_on_record_in_sum(estate: Estate) -> None:
    told = [
        RefusedCallers("no_identity_issued", 4001, 300),
        RefusedCallers("An attestor's own", -5, 0),
        RefusedCallers("attestor_failed", 2**40, 2**60),
    ]
    await estate.start()
    await estate.sessions.report(NODE, [], ["ws_1"], {}, told)
    rows = await estate.records("workload_refused")
    assert [(one.actor, one.subject, one.fields["code"], one.fields["left_out"]) for one in rows] == [
        (str(NODE), "uid:4001", "no_identity_issued", 299),
        (str(NODE), "uid:unknown", "other", 0),
        (str(NODE), "uid:unknown", "attestor_failed", MAX_COUNT - 1),
    ]
    assert len(await estate.records("session_ended")) == 1, "what is odd holds nothing up"
    with pytest.raises(Invalid):
        await estate.sessions.report(NODE, [], [], {}, told * MAX_REFUSED)
