"""A suspension is a row, a record and a frame in one commit; its tokens are dead for good, its relatives live on."""

from datetime import timedelta

import pytest

from broker.errors import Conflict, Refused
from broker.server.store.ports import Writer
from broker.server.tasks.lifecycle import end
from broker.server.tasks.suspension import Suspension, suspend
from broker.spiffe import SpiffeId
from broker.tasks import Cause, Confirmation, State, Task, TaskClaims, activate, issue_claims, start_child
from tests.unit.server.tasks.estate import ISSUER, TICKETS, X5T, Estate, authority
from tests.unit.server.tasks.watching import frames, task_of


async def child(estate: Estate, parent: Task, name: str) -> Task:
    def act(writer: Writer) -> Task:
        lineage = writer.lineage(parent.id)
        made = start_child(
            lineage[-1],
            tuple(reversed(lineage[:-1])),
            id=f"{parent.id}-{name}",
            agent=SpiffeId(f"spiffe://example.org/{name}"),
            session=None,
            purpose="a part of it",
            authority=authority(),
            now=estate.clock.now(),
            ttl=timedelta(minutes=5),
        )
        writer.add_task(made)
        return made

    return await estate.store.write(act)


async def claims(estate: Estate, task: Task) -> TaskClaims:
    """What a token of the task would say now."""
    lineage = await estate.store.read(lambda reader: reader.lineage(task.id))
    return issue_claims(
        lineage[-1],
        issuer=ISSUER,
        resource=TICKETS,
        authority=lineage[-1].authority,
        cnf=Confirmation(X5T, None),
        jti="jti_1",
        txn="txn_1",
        now=estate.clock.now(),
        ttl=timedelta(minutes=1),
        ancestors=tuple(reversed(lineage[:-1])),
    )


async def is_dead(estate: Estate, token: TaskClaims) -> bool:
    """Whether a verifier that has applied every frame refuses it."""
    own, tree = 0.0, 0
    for frame in await frames(estate):
        if frame.kind == "task" and frame.task == token.task.id:
            own = max(own, frame.epoch if frame.state == "suspended" else float("inf"))
        if frame.kind == "subtree" and frame.root == token.task.root:
            tree = max(tree, frame.epoch)
    return token.task.epoch < own or token.task.epoch < tree


async def stop(estate: Estate, task: Task) -> Suspension:
    def act(writer: Writer) -> Suspension:
        now = writer.task(task.id)
        assert now is not None
        return suspend(writer, now, Cause.OPERATOR, by="operator:uid:0", now=estate.clock.now(), reason="a look")

    return await estate.store.write(act)


async def go_on(estate: Estate, task: Task) -> None:
    def act(writer: Writer) -> None:
        now = writer.task(task.id)
        assert now is not None
        writer.replace_task(activate(now, None, estate.clock.now()), now.version)

    await estate.store.write(act)


async def test_a_suspended_tree_is_one_frame_and_none_of_its_tokens_comes_back(estate: Estate) -> None:
    root = await estate.start()
    below = await child(estate, root, "one")
    before = [await claims(estate, root), await claims(estate, below)]
    stopped = await stop(estate, root)
    (frame,) = await frames(estate)
    assert (frame.kind, frame.task, frame.state, frame.seq) == ("subtree", root.id, "suspended", stopped.frame_seq)
    assert [await is_dead(estate, token) for token in before] == [True, True]
    assert (await task_of(estate, below.id)).state is State.ACTIVE
    with pytest.raises(Refused):
        await claims(estate, below)
    (record,) = await estate.records("task_suspended")
    assert record.fields["reasons"] == ("a look",)
    await go_on(estate, root)
    assert [await is_dead(estate, token) for token in before] == [True, True]
    for task in (root, below, await child(estate, root, "two")):
        assert not await is_dead(estate, await claims(estate, task))


async def test_a_suspended_branch_stops_itself_and_what_is_below_and_nothing_else(estate: Estate) -> None:
    root = await estate.start()
    branch, sibling = await child(estate, root, "one"), await child(estate, root, "two")
    leaf = await child(estate, branch, "three")
    tokens = {task.id: await claims(estate, task) for task in (root, branch, sibling, leaf)}
    await stop(estate, branch)
    assert {(frame.kind, frame.task) for frame in await frames(estate)} == {("task", branch.id), ("task", leaf.id)}
    dead = {task_id for task_id, token in tokens.items() if await is_dead(estate, token)}
    assert dead == {branch.id, leaf.id}
    await go_on(estate, branch)
    for task in (root, branch, sibling, leaf):
        assert not await is_dead(estate, await claims(estate, task))
    # And the whole tree after its branch: what the branch has now dies with the rest.
    tokens = {task.id: await claims(estate, task) for task in (root, branch, sibling, leaf)}
    await stop(estate, root)
    assert [await is_dead(estate, token) for token in tokens.values()] == [True] * 4


async def test_suspending_twice_is_one_suspension_and_an_end_after_it_is_an_end(estate: Estate) -> None:
    task = await estate.start()
    first = await stop(estate, task)
    again = await stop(estate, task)
    assert (again.frame_seq, again.task) == (0, first.task)
    assert len(await estate.records("task_suspended")) == 1

    def act(writer: Writer) -> None:
        now = writer.task(task.id)
        assert now is not None
        end(writer, now, State.REVOKED, Cause.OPERATOR, by="operator:uid:0", now=estate.clock.now())

    await estate.store.write(act)
    with pytest.raises(Conflict):
        await stop(estate, task)
    assert [frame.epoch for frame in await frames(estate)] == [1, 2]


async def test_a_token_from_before_a_suspension_is_not_active_after_it(estate: Estate) -> None:
    task = await estate.start()
    old = await estate.issue(task)
    assert await estate.tokens.introspect(old.access_token, task.agent) is not None
    await stop(estate, task)
    assert await estate.tokens.introspect(old.access_token, task.agent) is None
    await go_on(estate, task)
    assert await estate.tokens.introspect(old.access_token, task.agent) is None
    new = await estate.issue(task)
    assert await estate.tokens.introspect(new.access_token, task.agent) is not None


async def test_a_branch_that_was_suspended_leaves_its_relatives_tokens_active(estate: Estate) -> None:
    root = await estate.start()
    branch = await child(estate, root, "one")
    token = await estate.issue(root)
    await stop(estate, branch)
    assert await estate.tokens.introspect(token.access_token, root.agent) is not None
