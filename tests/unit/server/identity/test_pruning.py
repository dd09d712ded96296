from dataclasses import replace
from datetime import timedelta

import pytest

from broker.errors import NotFound
from broker.server.identity import entries as entries_module
from broker.server.identity.filters import EntryFilter
from broker.server.identity.pruning import NodePruning, PruningRules
from broker.spiffe import Selector, SpiffeId
from tests.unit.server.identity.test_directory import Listening
from tests.unit.server.identity.world import AGENT, OTHER

HOUR = timedelta(hours=1)


async def bodies(here):
    return [record.body for record in await here.store.read(lambda reader: reader.records(0, 1000))]


async def test_entries_go_when_their_time_is_over_and_it_is_recorded(here):
    await here.add_node()
    await here.add("/stays")
    await here.add("/goes", expires_at=here.clock.now() + HOUR)
    mine = Listening()
    here.directory.follow(AGENT, mine)
    assert await here.entries.prune() == 0
    here.clock.advance(HOUR)
    before = here.store.head
    assert await here.entries.prune() == 1
    assert here.store.head == before + 1
    assert here.directory.entry("goes") is None
    assert {"goes"} in mine.ids
    assert sum(b'"entry_deleted"' in body and b'"server"' in body for body in await bodies(here)) == 1
    assert await here.entries.prune() == 0


async def test_an_entry_that_was_given_more_time_stays(here):
    await here.add("/app", expires_at=here.clock.now() + HOUR)
    here.clock.advance(HOUR)
    # Looked at before the change, deleted after it: the transaction judges again.
    over = here.directory.expired(10)
    assert over == ["app"]
    await here.entries.update([("app", lambda entry: replace(entry, expires_at=None))], "test")
    here.directory.expired = lambda limit: over
    assert await here.entries.prune() == 0
    assert here.directory.entry("app") is not None


async def test_an_end_that_moves_counts_where_it_is_now(here):
    start = here.clock.now()
    await here.add("/app", expires_at=start + HOUR)
    for end in (start + 3 * HOUR, start + 2 * HOUR, start + HOUR, None, start + 2 * HOUR):
        await here.entries.update([("app", lambda entry, end=end: replace(entry, expires_at=end))], "test")
    here.clock.advance(HOUR)
    assert here.directory.expired(10) == []
    here.clock.advance(HOUR)
    assert here.directory.expired(10) == ["app"]
    # Asked again before it is gone, it is there again; and never twice.
    assert here.directory.expired(10) == ["app"]


async def test_a_prune_is_bounded_and_goes_on(here, monkeypatch):
    monkeypatch.setattr(entries_module, "MAX_BATCH", 2)
    for number in range(5):
        await here.add(f"/n{number}", expires_at=here.clock.now() + HOUR)
    here.clock.advance(HOUR)
    assert [await here.entries.prune() for _ in range(4)] == [2, 2, 1, 0]
    assert here.entries.count(EntryFilter()) == 0


def pruning(here, expired_for=HOUR, batch=1000, *, include=False):
    return NodePruning(here.nodes, here.clock, PruningRules(expired_for, batch, include))


async def test_nodes_that_expired_long_ago_go_but_for_the_banned_and_those_that_cannot_come_back(here):
    banned, once = SpiffeId(f"{OTHER}-banned"), SpiffeId(f"{OTHER}-once")
    await here.add_node(AGENT, reattestable=True)
    await here.add_node(banned, reattestable=True, banned=True)
    await here.add_node(once)
    # Their SVIDs end in an hour; the setting counts from there.
    here.clock.advance(2 * HOUR)
    assert await pruning(here).prune() == 0
    here.clock.advance(timedelta(seconds=1))
    assert await pruning(here, None).prune() == 0
    assert await pruning(here).prune() == 1
    assert {node.id for node in here.directory.nodes()} == {banned, once}
    assert await pruning(here, include=True).prune() == 1
    assert {node.id for node in here.directory.nodes()} == {banned}
    assert sum(b'"agent_purged"' in body for body in await bodies(here)) == 2


async def test_nodes_go_a_batch_at_a_time(here):
    for number in range(5):
        await here.add_node(SpiffeId(f"{AGENT}-{number}"), reattestable=True)
    here.clock.advance(3 * HOUR)
    assert [await pruning(here, batch=2).prune() for _ in range(4)] == [2, 2, 1, 0]


async def test_a_node_that_came_back_stays(here):
    await here.add_node(AGENT, reattestable=True)
    here.clock.advance(3 * HOUR)
    stale = here.directory.node(AGENT)
    await here.add_node(AGENT, reattestable=True)
    here.directory.nodes = lambda: [stale]
    assert await pruning(here).prune() == 0
    assert here.directory.node(AGENT) is not None


@pytest.mark.parametrize("goes", ["evict", "prune"])
async def test_the_alias_of_a_join_token_goes_with_its_node_and_nothing_else(here, goes):
    await here.add_node(AGENT, attestation_type="join_token", reattestable=False)
    own = frozenset({Selector(f"spiffe_id:{AGENT}")})
    await here.add("/alias", selectors=own)
    await here.add("/app")
    await here.add("/both", selectors=own | {Selector("unix:uid:1")})
    if goes == "evict":
        await here.nodes.delete(AGENT, "test")
    else:
        here.clock.advance(3 * HOUR)
        assert await pruning(here, include=True).prune() == 1
    assert {entry.id for entry in here.directory.entries()} == {"app", "both"}
    with pytest.raises(NotFound):
        here.nodes.get(AGENT)


async def test_entries_of_another_attestor_s_node_stay(here):
    await here.add_node(AGENT)
    await here.add("/alias", selectors=frozenset({Selector(f"spiffe_id:{AGENT}")}))
    await here.nodes.delete(AGENT, "test")
    assert here.directory.entry("alias") is not None
