"""A policy that changed reaches what runs: tasks end, tokens are revoked, each with its record and its frame."""

import asyncio

import pytest

from broker.errors import BrokerError
from broker.server.store.rows import TaskFilter
from broker.server.tasks.policy import rejudge as module
from broker.tasks import State
from tests.unit.server.tasks.estate import INSPECTOR, NEIGHBOUR, OTHER_NODE, TICKETS, WIKI, X5T_2, authority, detail
from tests.unit.server.tasks.policy.conftest import Governed

OPEN = '@id("all") permit(principal, action, resource);'
NOT_ALICE = (
    OPEN
    + '@id("not-alice") forbid(principal, action in Action::"begin", resource) when { context.user == User::"alice" };'
)
NO_WIKI_TOKENS = (
    OPEN + f'@id("no-wiki") forbid(principal, action in Action::"issue", resource == Audience::"{WIKI.text}");'
)
BOTH = authority(detail(), {"type": "api", "locations": [WIKI.text], "actions": ["wiki.read"]})


@pytest.mark.bears("X05")
async def test_tasks_that_may_not_begin_any_more_end(governed: Governed) -> None:
    estate = governed.estate
    alices = await estate.start()
    token = await estate.issue(alices)
    bobs = await estate.start(user_token=estate.user_token("bob"))
    assert await estate.tokens.introspect(token.access_token, INSPECTOR)
    assert await governed.push(NOT_ALICE) == (1, 0)
    task = await estate.store.read(lambda reader: reader.task(alices.id))
    assert (task.state, task.cause.value) == (State.REVOKED, "policy_denied")
    assert (await estate.store.read(lambda reader: reader.task(bobs.id))).state is State.ACTIVE
    assert governed.ends == ["policy_denied"]
    (over,) = await estate.records("task_ended")
    assert (over.actor, over.subject, over.fields["reasons"]) == ("server", alices.id, ("policy:not-alice",))
    assert estate.feed.frame_of(alices.id) == over.fields["frame_seq"] > 0
    # Exchange, re-exchange and introspection: the same answer.
    for again in (estate.start(), estate.issue(alices)):
        with pytest.raises(BrokerError):
            await again
    assert await estate.tokens.introspect(token.access_token, INSPECTOR) is None


@pytest.mark.bears("X05")
async def test_nothing_waits_for_the_look(governed: Governed) -> None:
    """Between the push and the end of the task, every exchange and introspection says no already."""
    estate = governed.estate
    task = await estate.start()
    token = await estate.issue(task)
    await governed.bundles.push(NOT_ALICE, by="operator:uid:0")
    with pytest.raises(BrokerError) as caught:
        await estate.issue(task)
    assert caught.value.reason == "policy_denied"
    assert await estate.tokens.introspect(token.access_token, INSPECTOR) is None
    assert (await estate.store.read(lambda reader: reader.task(task.id))).state is State.ACTIVE


async def test_tokens_that_would_not_be_issued_are_revoked_and_the_task_goes_on(governed: Governed) -> None:
    estate = governed.estate
    task = await estate.start(authority=BOTH)
    tickets, wiki = await estate.issue(task), await estate.issue(task, resource=WIKI)
    assert await governed.push(NO_WIKI_TOKENS) == (0, 1)
    (revoked,) = await estate.records("token_revoked")
    assert (revoked.subject, revoked.fields["reasons"]) == (task.id, ("policy:no-wiki",))
    rows = await estate.store.read(lambda reader: [reader.token(one.jti).revoked_at for one in (tickets, wiki)])
    assert rows[0] is None
    assert rows[1] is not None
    assert await estate.tokens.introspect(tickets.access_token, INSPECTOR)
    assert await governed.rejudge.look() == (0, 0)


async def test_many_are_judged_in_batches(governed: Governed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BATCH", 3)
    monkeypatch.setattr(module, "TOKENS_EACH", 2)
    estate = governed.estate
    alices = [await estate.start() for _ in range(7)]
    bobs = await estate.start(user_token=estate.user_token("bob"), authority=BOTH)
    for _ in range(5):
        await estate.issue(bobs, resource=WIKI)
    text = NO_WIKI_TOKENS + NOT_ALICE.removeprefix(OPEN)
    assert await governed.push(text) == (7, 5)
    assert len(await estate.records("task_ended")) == len(alices)


async def test_the_loop_looks_at_the_start_and_after_each_change(governed: Governed) -> None:
    estate = governed.estate
    running = asyncio.create_task(governed.rejudge.run())
    try:
        task = await estate.start()
        neighbour = estate.actor(spiffe_id=NEIGHBOUR, x5t=X5T_2, session="ws_2", entry_id="entry-2", agent=OTHER_NODE)
        other = await estate.start(neighbour, user_token=estate.user_token("bob"))
        await governed.bundles.push(NOT_ALICE, by="operator:uid:0")
        async with asyncio.timeout(30):
            while not estate.feed.frame_of(task.id):
                await asyncio.sleep(0.005)
        assert (await estate.store.read(lambda reader: reader.task(other.id))).state is State.ACTIVE
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)


@pytest.mark.bears("RV04")
async def test_no_token_follows_the_end(governed: Governed) -> None:
    """Starts and issues beside a push: whatever was decided by the old policy is found by the look that follows."""
    estate = governed.estate
    issued: list[str] = []
    refused: set[str] = set()
    await estate.start()  # the issuer's keys are fetched once

    async def work() -> None:
        while not refused:
            try:
                task = await estate.start(idempotency_key="")
                issued.append((await estate.issue(task, resource=TICKETS)).access_token)
            except BrokerError as error:
                refused.add(error.reason)

    workers = [asyncio.create_task(work()) for _ in range(8)]
    while len(issued) < 5:
        await asyncio.sleep(0)
    await governed.push(NOT_ALICE)
    await asyncio.gather(*workers)
    assert refused <= {"policy_denied", "task_ended"}
    assert refused
    living = await estate.store.read(lambda reader: reader.list_tasks(TaskFilter(live=True)).tasks)
    assert living == ()
    assert [token for token in issued if await estate.tokens.introspect(token, INSPECTOR)] == []
