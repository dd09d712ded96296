"""What workloads and operators do with running tasks: suspend, resume, hand off, and start others below them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from broker.errors import BrokerError, Conflict, Invalid, NotFound, PolicyDenied, Refused
from broker.server.tasks.config import TaskDefaults
from broker.server.tasks.detail_types import DetailType, DetailTypes
from broker.server.tasks.requests import ChangeRequest, Operation
from broker.spiffe import Selector, SpiffeId
from broker.tasks import Cause, State, Supervision
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
    detail,
    entry,
    running,
)
from tests.unit.server.tasks.life import (
    OPERATOR,
    chain,
    change,
    child,
    hop,
    is_alive,
    neighbour,
    register,
)
from tests.unit.server.tasks.watching import refusal, task_of


async def refused(estate: Estate, *arguments: Any, **fields: Any) -> BrokerError:
    with pytest.raises(BrokerError) as caught:
        await change(estate, *arguments, **fields)
    return caught.value


# ---- suspend and resume


async def test_suspending_kills_every_token_and_resuming_revives_none(estate: Estate) -> None:
    task = await estate.start()
    before = await estate.issue(task, idempotency_key="k")
    held = await change(estate, estate.actor(), task, Operation.SUSPEND, expected_version=1)
    assert (held.task.state, held.task.cause, held.task.version) == (State.SUSPENDED, Cause.PAUSED, 2)
    assert held.frame_seq > 0
    assert await refusal(estate, before) == "task_suspended"
    assert await is_alive(estate, [before]) == [False]
    with pytest.raises(Refused) as caught:
        await estate.issue(task)
    assert caught.value.reason == "task_suspended"
    resumed = (await change(estate, estate.actor(), task, Operation.RESUME, expected_version=2)).task
    assert (resumed.state, resumed.cause, resumed.version, resumed.session) == (State.ACTIVE, None, 3, "ws_1")
    # What was issued before stays dead, also by its old key; what is issued now lives.
    assert await refusal(estate, before) == "task_suspended"
    with pytest.raises(Conflict) as spent:
        await estate.issue(task, idempotency_key="k")
    assert spent.value.reason == "idempotency_spent"
    after = await estate.issue(task)
    assert await refusal(estate, after) == ""
    assert await is_alive(estate, [before, after]) == [False, True]
    (suspended,) = await estate.records("task_suspended")
    assert (suspended.actor, suspended.fields["frame_seq"]) == (str(AGENT), held.frame_seq)
    (again,) = await estate.records("task_resumed")
    assert (again.fields["resumed_from"], again.fields["version"]) == ("ws_1", 3)


async def test_a_suspended_branch_stops_what_is_below_and_nothing_beside(estate: Estate) -> None:
    line = await chain(estate, 3)
    await register(estate, 7)
    beside = await child(estate, line[0][1], line[0][0], hop(estate, 7).spiffe_id)
    tokens = [await estate.issue(task, actor) for actor, task in line]
    other = await estate.issue(beside, hop(estate, 7))
    held = await change(estate, OPERATOR, line[1][1], Operation.SUSPEND, reason="looks odd")
    assert [await refusal(estate, each) for each in (*tokens, other)] == [
        "", "task_suspended", "task_suspended", "",
    ]  # fmt: skip
    assert [await is_alive(estate, [each], actor.spiffe_id) for each, (actor, _) in zip(tokens, line, strict=True)] == [
        [True], [False], [False],
    ]  # fmt: skip
    assert await is_alive(estate, [other], hop(estate, 7).spiffe_id) == [True]
    assert held.task.cause is Cause.OPERATOR
    with pytest.raises(Refused):
        await estate.issue(line[2][1], line[2][0])
    # Its own agent does not undo what an operator did, nor does the one above.
    assert (await refused(estate, line[1][0], line[1][1], Operation.RESUME)).reason == "resume_not_allowed"
    assert (await refused(estate, line[0][0], line[1][1], Operation.RESUME)).reason == "resume_not_allowed"
    await change(estate, OPERATOR, line[1][1], Operation.RESUME)
    fresh = [await estate.issue(task, actor) for actor, task in line]
    assert [await refusal(estate, each) for each in (*fresh, *tokens)] == [
        "", "", "", "", "task_suspended", "task_suspended",
    ]  # fmt: skip
    # Suspended again above: one frame for the tree; the newest tokens die as well.
    await change(estate, OPERATOR, line[0][1], Operation.SUSPEND)
    assert {await refusal(estate, each) for each in (*fresh, other)} == {"task_suspended"}
    await change(estate, OPERATOR, line[0][1], Operation.REVOKE)
    assert {await refusal(estate, each) for each in (*fresh, other)} == {"task_ended"}


@pytest.mark.bears("RV12", "RV13")
async def test_repetitions_conflicts_and_stale_versions(estate: Estate) -> None:
    task = await estate.start()
    actor = estate.actor()
    first = await change(estate, actor, task, Operation.SUSPEND, idempotency_key="s")
    resumed = await change(estate, actor, task, Operation.RESUME, idempotency_key="r")
    again = await change(estate, actor, task, Operation.SUSPEND, idempotency_key="s")
    assert again == first, "a delayed repetition is told what the first one was told"
    assert (await task_of(estate, task.id)).state is State.ACTIVE, "and changes nothing"
    assert (await refused(estate, actor, task, Operation.RESUME, idempotency_key="s")).reason == "idempotency_mismatch"
    assert (await refused(estate, actor, task, Operation.RESUME)).reason == "conflict"
    assert (await refused(estate, actor, task, Operation.SUSPEND, expected_version=1)).reason == "stale_version"
    await change(estate, OPERATOR, task, Operation.REVOKE, expected_version=3)
    assert await change(estate, actor, task, Operation.RESUME, idempotency_key="r") == resumed
    for operation in (Operation.SUSPEND, Operation.RESUME, Operation.COMPLETE):
        assert isinstance(await refused(estate, actor, task, operation), Conflict)
    assert (await task_of(estate, task.id)).state is State.REVOKED, "nothing comes back"
    assert len(await estate.records("task_refused")) == 6
    assert len(await estate.records("task_suspended")) == len(await estate.records("task_resumed")) == 1


async def test_suspending_twice_is_one_suspension(estate: Estate) -> None:
    task = await estate.start()
    first = await change(estate, estate.actor(), task, Operation.SUSPEND)
    again = await change(estate, estate.actor(), task, Operation.SUSPEND)
    assert (again.task, again.frame_seq) == (first.task, 0)
    assert len(await estate.records("task_suspended")) == 1


async def test_a_suspended_task_expires_and_ends(estate: Estate) -> None:
    task = await estate.start(ttl=60)
    await change(estate, estate.actor(), task, Operation.SUSPEND)
    estate.clock.advance(61)
    assert (await refused(estate, estate.actor(), task, Operation.RESUME)).reason == "conflict"
    await estate.lifecycle.sweep()
    assert (await task_of(estate, task.id)).state is State.EXPIRED


async def test_who_may_not_change_a_task(estate: Estate) -> None:
    task = await estate.start()
    await estate.report("ws_2", X5T_2)
    await estate.report("ws_9", neighbour(estate).x5t, node=OTHER_NODE, spiffe_id=NEIGHBOUR, entry_id="entry-2")
    for operation in (Operation.SUSPEND, Operation.REVOKE, Operation.COMPLETE, Operation.RESUME, Operation.ATTACH):
        stranger = await refused(estate, neighbour(estate), task, operation)
        assert (type(stranger), stranger.reason) == (NotFound, "task_unknown")
        other = await refused(estate, estate.actor(session="ws_2", x5t=X5T_2), task, operation)
        assert (type(other), other.reason) == (Refused, "session_mismatch")
    assert (await refused(estate, neighbour(estate), task, Operation.HAND_OFF, to=NEIGHBOUR)).reason == "task_unknown"
    assert (await refused(estate, OPERATOR, task, Operation.COMPLETE)).reason == "invalid_operation"
    assert (await refused(estate, OPERATOR, "tsk_unknown", Operation.SUSPEND)).reason == "task_unknown"
    assert len(await estate.records("task_refused")) == 13
    with pytest.raises(Invalid):
        ChangeRequest(task.id, Operation.SUSPEND, to=AGENT)
    with pytest.raises(Invalid):
        ChangeRequest(task.id, Operation.HAND_OFF)
    for key in ("x" * 256, "a b"):
        with pytest.raises(Invalid):
            ChangeRequest(task.id, Operation.SUSPEND, idempotency_key=key)


# ---- after a restart


@pytest.mark.bears("RV14")
async def test_another_process_takes_a_suspended_task_up_and_no_token_along(estate: Estate) -> None:
    task = await estate.start()
    saved = await estate.issue(task)
    await change(estate, estate.actor(), task, Operation.SUSPEND)
    second = estate.actor(session="ws_2", x5t=X5T_2)
    # The first process lives: the task is its own.
    assert (await refused(estate, second, task, Operation.RESUME)).reason == "session_mismatch"
    await estate.sessions.report(NODE, [], ["ws_1"])
    assert (await task_of(estate, task.id)).state is State.SUSPENDED, "what is suspended outlives its process"
    resumed = (await change(estate, second, task, Operation.RESUME, expected_version=2)).task
    assert (resumed.session, resumed.version, resumed.id) == ("ws_2", 3, task.id)
    (record,) = await estate.records("task_resumed")
    assert (record.fields["resumed_from"], record.fields["session"]) == ("ws_1", "ws_2")
    assert await refusal(estate, saved) != ""
    assert await is_alive(estate, [saved]) == [False]
    fresh = await estate.issue(task, second)
    assert estate.verify(fresh).claims.cnf.session == "ws_2"
    with pytest.raises(Refused) as old:
        await estate.issue(task)
    assert old.value.reason == "session_ended"


async def test_one_above_lets_go_on_what_has_lost_its_process_for_the_next_one(estate: Estate) -> None:
    (top, _), (_, task) = await chain(estate, 2)
    await change(estate, top, task, Operation.SUSPEND)
    await estate.sessions.report(NODE, [], ["ws_hop_1"])
    resumed = (await change(estate, top, task, Operation.RESUME)).task
    assert (resumed.state, resumed.session) == (State.ACTIVE, None), "not that of a process that is gone"
    following = hop(estate, 1, session="ws_next", x5t=f"{8:0>42}w")
    fresh = await estate.issue(task, following)
    assert estate.verify(fresh).claims.cnf.session == "ws_next"
    assert (await task_of(estate, task.id)).session == "ws_next"


async def test_an_active_task_ends_with_its_process(estate: Estate) -> None:
    task = await estate.start()
    await estate.sessions.report(NODE, [], ["ws_1"])
    second = estate.actor(session="ws_2", x5t=X5T_2)
    assert (await refused(estate, second, task, Operation.RESUME)).reason == "session_mismatch"
    assert (await task_of(estate, task.id)).state is State.REVOKED


async def test_a_process_of_another_entry_takes_nothing_up(estate: Estate) -> None:
    task = await estate.start()
    await change(estate, estate.actor(), task, Operation.SUSPEND)
    await estate.sessions.report(NODE, [], ["ws_1"])
    await estate.put_entry(entry("entry-8", AGENT, selectors=frozenset({Selector("unix:uid:1001")})))
    await estate.directory.load(estate.store)
    other = estate.actor(session="ws_2", x5t=X5T_2, entry_id="entry-8")
    assert (await refused(estate, other, task, Operation.RESUME)).reason == "entry_changed"


async def test_a_crash_loop_stops_until_an_operator_looks(tmp_path: Path, oidc: OidcIssuer) -> None:
    defaults = TaskDefaults(max_resumes=5, max_resumes_per_minute=2)
    async with running(tmp_path, oidc, defaults=defaults) as estate:
        task = await estate.start(ttl=3000)
        actor = estate.actor()
        for _ in range(2):
            await change(estate, actor, task, Operation.SUSPEND)
            await change(estate, actor, task, Operation.RESUME)
        await change(estate, actor, task, Operation.SUSPEND)
        error = await refused(estate, actor, task, Operation.RESUME)
        assert (type(error), error.reason) == (Refused, "resume_limit")
        stopped = await task_of(estate, task.id)
        assert (stopped.state, stopped.cause) == (State.SUSPENDED, Cause.RESUME_LIMIT)
        estate.clock.advance(61)
        actor = estate.actor()
        assert (await refused(estate, actor, task, Operation.RESUME)).reason == "resume_not_allowed"
        await change(estate, OPERATOR, task, Operation.RESUME, reason="looked at it")
        # An operator's counts too, and within another minute the workload may again, up to the whole number.
        estate.clock.advance(61)
        actor = estate.actor()
        for _ in range(2):
            await change(estate, actor, task, Operation.SUSPEND)
            await change(estate, actor, task, Operation.RESUME)
        estate.clock.advance(61)
        actor = estate.actor()
        await change(estate, actor, task, Operation.SUSPEND)
        assert (await refused(estate, actor, task, Operation.RESUME)).reason == "resume_limit"
        assert await estate.store.read(lambda reader: reader.resumes_of(task.id)) == 5


async def test_an_operator_leaves_a_task_to_the_next_process(estate: Estate) -> None:
    task = await estate.start()
    await change(estate, OPERATOR, task, Operation.SUSPEND)
    await estate.sessions.report(NODE, [], ["ws_1"])
    resumed = (await change(estate, OPERATOR, task, Operation.RESUME)).task
    assert (resumed.state, resumed.session) == (State.ACTIVE, None)
    second = estate.actor(session="ws_2", x5t=X5T_2)
    token = await estate.issue(task, second)
    assert await is_alive(estate, [token]) == [True]
    assert (await task_of(estate, task.id)).session == "ws_2"


# ---- children


async def test_a_child_is_its_own_agents_and_fetches_its_own_token(estate: Estate) -> None:
    parent = await estate.start()
    narrow = authority(detail(actions=["ticket.read"]))
    below = await child(estate, parent, estate.actor(), authority=narrow, ttl=60)
    assert (below.parent, below.root, below.depth, below.session) == (parent.id, parent.id, 1, None)
    assert (below.user, below.agent, below.supervision) == (parent.user, NEIGHBOUR, Supervision.ATTACHED)
    with pytest.raises(NotFound):
        await estate.issue(below), "the parent has no token of it"
    token = await estate.issue(below, neighbour(estate))
    claims = estate.verify(token).claims
    assert (claims.sub, [str(each) for each in claims.act]) == ("alice", [str(NEIGHBOUR), str(AGENT)])
    assert (claims.task.hop, claims.scope, claims.client_id) == (2, "ticket.read", NEIGHBOUR)
    assert claims.cnf.session == "ws_9"
    assert (await task_of(estate, below.id)).session == "ws_9", "the first process has it"
    with pytest.raises(Refused) as second:
        await estate.issue(below, neighbour(estate, session="ws_10", x5t=X5T_2))
    assert second.value.reason == "session_mismatch"
    (attached,) = await estate.records("task_attached")
    assert (attached.subject, attached.fields["session"]) == (below.id, "ws_9")
    started = (await estate.records("task_started"))[1]
    assert (started.actor, started.fields["agent"], started.fields["parent"]) == (str(AGENT), str(NEIGHBOUR), parent.id)


@pytest.mark.bears("AC02", "AC03", "AC05", "AC06")
async def test_five_hops_show_five_actors_and_the_root_ends_the_leaf(estate: Estate) -> None:
    line = await chain(estate, 5)
    expected = [str(hop(estate, number).spiffe_id) for number in (4, 3, 2, 1, 0)]
    leaf = await estate.issue(line[4][1], line[4][0])
    claims = estate.verify(leaf).claims
    assert [str(each) for each in claims.act] == expected
    live = await estate.tokens.introspect(leaf.access_token, line[4][0].spiffe_id)
    assert live is not None
    assert live.claims.to_payload()["act"] == claims.to_payload()["act"]
    assert await refusal(estate, leaf) == ""
    await register(estate, 5)
    with pytest.raises(PolicyDenied) as deep:
        await child(estate, line[4][1], line[4][0], hop(estate, 5).spiffe_id)
    assert deep.value.reason == "act_chain_depth"
    with pytest.raises(PolicyDenied) as cycle:
        await child(estate, line[3][1], line[3][0], line[1][0].spiffe_id)
    assert cycle.value.reason == "act_chain_cycle"
    await estate.lifecycle.complete(line[0][0], line[0][1].id)
    assert await refusal(estate, leaf) == "task_ended"
    assert (await task_of(estate, line[4][1].id)).state is State.CASCADED
    with pytest.raises(Refused):
        await child(estate, line[3][1], line[3][0], hop(estate, 5).spiffe_id)


@pytest.mark.bears("BG06", "BG12", "RV03")
async def test_a_child_is_never_more_than_its_parent(estate: Estate) -> None:
    parent = await estate.start(authority=authority(detail(locations=[TICKETS.text + "/a"])), ttl=100)
    for details in (
        detail(locations=[TICKETS.text + "/ab"]),
        detail(locations=[TICKETS.text]),
        detail(locations=[TICKETS.text + "/a"], actions=["ticket.delete"]),
        detail(locations=[TICKETS.text + "/a"], privileges=["admin"]),
    ):
        with pytest.raises(PolicyDenied):
            await child(estate, parent, estate.actor(), authority=authority(details))
    below = await child(
        estate, parent, estate.actor(), authority=authority(detail(locations=[TICKETS.text + "/a/b"])), ttl=10_000
    )
    assert below.expires_at == parent.expires_at
    with pytest.raises(PolicyDenied) as unsupervised:
        await child(estate, parent, estate.actor(), supervision=Supervision.NONE, authority=parent.authority)
    assert unsupervised.value.reason == "unsupervised_not_allowed"
    with pytest.raises(PolicyDenied) as unknown:
        await child(estate, parent, estate.actor(), SpiffeId("spiffe://example.org/nobody"), authority=parent.authority)
    assert unknown.value.reason == "agent_unknown"
    assert len(await estate.records("task_refused")) == 6
    assert await estate.store.read(lambda reader: reader.children_of(parent.id)) == 1


async def test_a_child_has_details_of_the_registered_types_alone(estate: Estate) -> None:
    parent = await estate.start()
    reading = DetailTypes.of([DetailType("api", actions=("ticket.read",))])
    # As after a restart with another configuration: what runs has more than may be asked for now.
    estate.changes._policy = replace(estate.changes._policy, detail_types=reading)
    with pytest.raises(Invalid) as caught:
        await child(estate, parent, estate.actor())
    assert caught.value.reason == "invalid_authorization_details"
    assert await child(estate, parent, estate.actor(), authority=authority(detail(actions=["ticket.read"])))


async def test_children_are_counted_over_the_life_of_a_task(tmp_path: Path, oidc: OidcIssuer) -> None:
    async with running(tmp_path, oidc, defaults=TaskDefaults(max_children=2)) as estate:
        parent = await estate.start()
        first = await child(estate, parent, estate.actor(), idempotency_key="one")
        assert await child(estate, parent, estate.actor(), idempotency_key="one") == first
        with pytest.raises(Conflict) as mismatch:
            await child(estate, parent, estate.actor(), idempotency_key="one", purpose="another")
        assert mismatch.value.reason == "idempotency_mismatch"
        await change(estate, estate.actor(), first, Operation.REVOKE)
        await child(estate, parent, estate.actor())
        with pytest.raises(PolicyDenied) as many:
            await child(estate, parent, estate.actor())
        assert many.value.reason == "too_many_children"


async def test_the_one_above_may_stop_a_child_and_not_work_in_its_name(estate: Estate) -> None:
    line = await chain(estate, 3)
    (top, _), (_, middle), (leaf_actor, leaf) = line
    for operation in (Operation.COMPLETE, Operation.ATTACH):
        assert (await refused(estate, top, leaf, operation)).reason == "not_its_agent"
    assert (await refused(estate, top, leaf, Operation.HAND_OFF, to=NEIGHBOUR)).reason == "not_its_agent"
    assert (await refused(estate, leaf_actor, middle, Operation.SUSPEND)).reason == "task_unknown"
    await change(estate, top, leaf, Operation.SUSPEND)
    await change(estate, leaf_actor, leaf, Operation.RESUME)
    over = await change(estate, top, middle, Operation.REVOKE)
    assert (over.task.state, over.task.cause) == (State.REVOKED, Cause.CANCELLED)
    assert (await task_of(estate, leaf.id)).state is State.CASCADED


# ---- hand-off


async def test_a_hand_off_is_a_successor_beside_and_keeps_who_was_there(estate: Estate) -> None:
    line = await chain(estate, 3)
    (top, root), (middle_actor, middle), (leaf_actor, leaf) = line
    tokens = [await estate.issue(task, actor) for actor, task in line]
    given = await change(estate, middle_actor, middle, Operation.HAND_OFF, to=NEIGHBOUR, idempotency_key="h")
    assert (given.task.state, given.task.cause) == (State.SUPERSEDED, Cause.HANDED_OFF)
    heir = given.successor
    assert (heir.parent, heir.root, heir.depth, heir.supersedes) == (root.id, root.id, 1, middle.id)
    assert (heir.agent, heir.session, heir.authority) == (NEIGHBOUR, None, middle.authority)
    assert (await task_of(estate, leaf.id)).state is State.CASCADED, "what hung below it does not move along"
    assert [await refusal(estate, each) for each in tokens] == ["", "task_ended", "task_ended"]
    assert await change(estate, middle_actor, middle, Operation.HAND_OFF, to=NEIGHBOUR, idempotency_key="h") == given
    claims = estate.verify(await estate.issue(heir, neighbour(estate))).claims
    assert [str(each) for each in claims.act] == [str(NEIGHBOUR), str(middle_actor.spiffe_id), str(top.spiffe_id)]
    # Back to one who had it, or is above: no.
    back = await refused(estate, neighbour(estate), heir, Operation.HAND_OFF, to=middle_actor.spiffe_id)
    assert back.reason == "act_chain_cycle"
    assert isinstance(await refused(estate, middle_actor, middle, Operation.HAND_OFF, to=NEIGHBOUR), Refused)
    assert leaf_actor.spiffe_id not in claims.act


async def test_a_root_is_handed_off_and_its_token_verifies(estate: Estate) -> None:
    root = await estate.start()
    token = await estate.issue(root)
    given = await change(estate, estate.actor(), root, Operation.HAND_OFF, to=NEIGHBOUR)
    heir = given.successor
    assert (heir.parent, heir.root, heir.depth, heir.history) == (None, heir.id, 0, (AGENT,))
    assert heir.expires_at == root.expires_at
    assert await refusal(estate, token) == "task_ended"
    claims = estate.verify(await estate.issue(heir, neighbour(estate))).claims
    assert [str(each) for each in claims.act] == [str(NEIGHBOUR), str(AGENT)]
    assert claims.task.parent is None


async def test_a_task_that_stands_still_is_not_handed_off(estate: Estate) -> None:
    task = await estate.start()
    await change(estate, estate.actor(), task, Operation.SUSPEND)
    assert (await refused(estate, OPERATOR, task, Operation.HAND_OFF, to=NEIGHBOUR)).reason == "task_suspended"
    assert (await task_of(estate, task.id)).state is State.SUSPENDED


async def test_hand_offs_lengthen_the_chain_no_further_than_the_server_permits(
    tmp_path: Path, oidc: OidcIssuer
) -> None:
    async with running(tmp_path, oidc, defaults=TaskDefaults(max_depth=2)) as estate:
        task = await estate.start()
        heir = (await change(estate, estate.actor(), task, Operation.HAND_OFF, to=NEIGHBOUR)).successor
        await register(estate, 1)
        third = hop(estate, 1).spiffe_id
        long = await refused(estate, neighbour(estate), heir, Operation.HAND_OFF, to=third)
        assert (type(long), long.reason) == (PolicyDenied, "act_chain_depth")
