import sys
from dataclasses import replace
from datetime import timedelta
from functools import partial

import pytest

from broker.server.identity import directory as directory_module
from broker.server.identity.changes import ENTRY_KIND, GONE, NODE_KIND, entry_text, node_text
from broker.server.identity.directory import Directory
from broker.server.store.rows import Change, Node
from broker.spiffe import Selector, SpiffeId
from tests.unit.server.identity.world import AGENT, OTHER, SERVER, draft


class Listening:
    def __init__(self):
        self.ids, self.upsets = [], 0

    def touched(self, entry_ids):
        self.ids.append(set(entry_ids))

    def upset(self):
        self.upsets += 1


def ids(here, agent=AGENT):
    return {entry.id for entry in here.directory.authorized(agent)}


async def test_whoever_was_answered_finds_it_here(here):
    await here.add_node()
    created = await here.add("/app")
    assert here.directory.entry("app") == created
    assert here.directory.authorized_entry(AGENT, "app") == created
    assert here.directory.authorized_entry(OTHER, "app") is None
    await here.entries.delete(["app"], "test")
    assert here.directory.entry("app") is None
    assert ids(here) == set()


async def test_a_load_sees_what_is_there_and_what_comes(here):
    await here.add_node()
    await here.add("/one")
    fresh = Directory(here.clock)
    await fresh.load(here.store)
    await here.add("/two")
    assert {entry.id for entry in fresh.authorized(AGENT)} == {"one", "two"}
    assert fresh.seq == here.directory.seq == here.store.head


async def test_an_agent_that_is_not_known_may_serve_nothing(here):
    await here.add("/app")
    assert ids(here) == set()


async def test_an_agent_hears_of_its_own_entries_only(here):
    await here.add_node()
    mine = Listening()
    stop = here.directory.follow(AGENT, mine)
    await here.add("/app")
    await here.add("/other", OTHER)
    await here.entries.delete(["app", "other"], "test")
    assert mine.ids == [{"app"}, {"app"}]
    stop()
    await here.add("/later")
    assert len(mine.ids) == 2


async def test_entries_below_entries_come_and_go_with_them(here):
    await here.add_node()
    mine = Listening()
    here.directory.follow(AGENT, mine)
    await here.add("/child", SpiffeId("spiffe://example.org/parent"))
    assert ids(here) == set()
    await here.add("/parent")
    assert ids(here) == {"parent", "child"}
    assert mine.ids[-1] == {"parent", "child"}
    await here.entries.delete(["parent"], "test")
    assert ids(here) == set()
    assert mine.ids[-1] == {"parent", "child"}
    # The old parent's name is worth nothing any more.
    await here.add("/late", SpiffeId("spiffe://example.org/parent"))
    assert ids(here) == set()


async def test_an_alias_names_nodes_by_their_selectors(here):
    await here.add_node(selectors=frozenset({Selector("k8s:cluster:a"), Selector("k8s:ns:b")}))
    await here.add_node(OTHER, selectors=frozenset({Selector("k8s:cluster:b")}))
    await here.add("/nodes/a", SERVER, selectors=frozenset({Selector("k8s:cluster:a")}))
    await here.add("/app", SpiffeId("spiffe://example.org/nodes/a"))
    assert ids(here) == {"app"}
    assert ids(here, OTHER) == set()


async def test_new_selectors_of_a_node_upset_its_agent(here):
    await here.add_node()
    mine = Listening()
    here.directory.follow(AGENT, mine)
    await here.add("/nodes/a", SERVER, selectors=frozenset({Selector("k8s:cluster:a")}))
    await here.add("/app", SpiffeId("spiffe://example.org/nodes/a"))
    await here.add_node(selectors=frozenset({Selector("k8s:cluster:a")}))
    assert mine.upsets == 1
    assert ids(here) == {"app"}


async def test_an_entry_ends_at_its_own_time(here):
    await here.add_node()
    await here.add("/app", expires_at=here.clock.now() + timedelta(minutes=1))
    mine = Listening()
    here.directory.follow(AGENT, mine)
    assert ids(here) == {"app"}
    here.clock.advance(timedelta(minutes=1))
    assert ids(here) == set()
    assert mine.ids == [{"app"}]
    assert await here.entries.prune() == 1
    assert here.directory.entry("app") is None
    assert await here.entries.prune() == 0


async def test_privileges_are_of_entries_that_live(here):
    await here.add("/boss", admin=True, expires_at=here.clock.now() + timedelta(minutes=1))
    await here.add("/below", downstream=True)
    await here.add("/app")
    boss, below, app = (SpiffeId(f"spiffe://example.org/{name}") for name in ("boss", "below", "app"))
    assert here.directory.privileges(boss) == (True, False)
    assert here.directory.privileges(below) == (False, True)
    assert here.directory.privileges(app) == (False, False)
    here.clock.advance(timedelta(minutes=1))
    assert here.directory.privileges(boss) == (False, False)
    await here.entries.delete(["below"], "test")
    assert here.directory.privileges(below) == (False, False)


async def test_the_past_is_told_while_it_is_remembered(here):
    await here.add_node()
    await here.add("/app")
    cursor = here.directory.seq
    await here.add("/two")
    await here.entries.delete(["app"], "test")
    assert [change.entry_id for change in here.directory.since(AGENT, cursor)] == ["app", "two"]
    assert here.directory.since(AGENT, here.directory.seq) == []
    assert here.directory.since(AGENT, here.directory.seq + 1) is None


async def test_a_past_that_cannot_be_told_asks_for_a_snapshot(here, monkeypatch):
    await here.add_node()
    cursor = here.directory.seq
    await here.add("/nodes/a", SERVER)
    assert here.directory.since(AGENT, cursor) is None
    cursor = here.directory.seq
    await here.add_node(selectors=frozenset({Selector("a:b")}))
    assert here.directory.since(AGENT, cursor) is None
    assert here.directory.since(OTHER, cursor) == []
    monkeypatch.setattr(directory_module, "MEMORY", 2)
    short = Directory(here.clock)
    await short.load(here.store)
    start = here.store.head
    short_cursor = start
    for number in range(4):
        await here.add(f"/n/{number}")
    assert short.since(AGENT, short_cursor) is None
    assert short.since(AGENT, here.store.head - 1) is not None


@pytest.mark.parametrize("count", [300])
async def test_one_change_does_not_cost_all_entries(here, count):
    await here.add_node()
    for number in range(count):
        await here.add(f"/n/{number}")
    mine = Listening()
    here.directory.follow(AGENT, mine)
    await here.add("/one-more")
    assert mine.ids == [{"one-more"}]
    assert len(ids(here)) == count + 1


def calls_of(work):
    """How many functions run, Python's and C's: work that is counted, whatever machine it runs on."""
    count = 0

    def profile(frame, event, argument):
        nonlocal count
        count += event in {"call", "c_call"}

    sys.setprofile(profile)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


async def cost_of_changes(here, others):
    """Calls for an entry that comes, changes and goes below one of two agents that are followed."""
    directory = Directory(here.clock)
    leaves = [draft(f"/n{number}", AGENT, here.clock, id=f"n{number}") for number in range(others)]
    directory.apply(
        [
            *(Change(1, NODE_KIND, str(one), node_text(Node(one, "x", "1", "", here.clock.now(), frozenset()))) for one in (AGENT, OTHER)),
            *(Change(2 + number, ENTRY_KIND, leaf.id, entry_text(leaf)) for number, leaf in enumerate(leaves)),
        ]
    )  # fmt: skip
    for agent in (AGENT, OTHER):
        directory.follow(agent, Listening())
    assert len(directory.scope(AGENT)) == others
    new = draft("/new", AGENT, here.clock)
    bodies = (entry_text(new), entry_text(replace(new, hint="h", revision=1)), GONE)
    seq = directory.seq
    return [
        calls_of(partial(directory.apply, [Change(seq + number, ENTRY_KIND, new.id, body)]))
        for number, body in enumerate(bodies, 1)
    ]


async def test_one_change_costs_the_same_among_ten_entries_and_among_ten_thousand(here):
    few, many = await cost_of_changes(here, 10), await cost_of_changes(here, 10_000)
    assert few == many
    assert max(many) < 500
