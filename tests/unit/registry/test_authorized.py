from collections.abc import Iterable
from datetime import datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker.registry import AgentScope, Effect, Entry, EntryTree, authorized_ids
from broker.spiffe import Selector, SpiffeId
from tests.unit.registry.estate import AGENT, NOW, SERVER, entry, selectors

AT = "spiffe://example.org"
NODE = selectors("x509pop:cluster:blue", "x509pop:cn:one")


def naive(agent: SpiffeId, held: frozenset[Selector], entries: Iterable[Entry], now: datetime) -> set[str]:
    live = [each for each in entries if each.expires_at is None or now < each.expires_at]
    parents = {agent} | {each.spiffe_id for each in live if str(each.parent_id) == SERVER and each.selectors <= held}
    while True:
        found = {each.id for each in live if each.parent_id in parents and str(each.parent_id) != SERVER}
        grown = parents | {each.spiffe_id for each in live if each.id in found}
        if grown == parents:
            return found
        parents = grown


@pytest.mark.bears("I04", "S11")
def test_an_agent_serves_what_hangs_below_it_and_its_aliases() -> None:
    entries = [
        entry("mine", spiffe_id="/mine"),
        entry("below", parent=AT + "/mine", spiffe_id="/below"),
        entry("alias", "x509pop:cluster:blue", parent=SERVER, spiffe_id="/blue"),
        entry("by-alias", parent=AT + "/blue", spiffe_id="/a"),
        entry("other-alias", "x509pop:cluster:red", parent=SERVER, spiffe_id="/red"),
        entry("by-other", parent=AT + "/red", spiffe_id="/b"),
        entry("neighbour", parent=AT + "/spire/agent/join_token/two", spiffe_id="/c"),
        entry("longer", parent=str(AGENT) + "x", spiffe_id="/d"),
    ]
    assert authorized_ids(AGENT, NODE, entries, NOW) == {"mine", "below", "by-alias"}
    assert authorized_ids(AGENT, frozenset(), entries, NOW) == {"mine", "below"}


def test_parents_that_name_each_other_end_the_walk() -> None:
    entries = [
        entry("a", parent=AT + "/b", spiffe_id="/a"),
        entry("b", parent=AT + "/a", spiffe_id="/b"),
        entry("self", parent=AT + "/self", spiffe_id="/self"),
    ]
    assert authorized_ids(AGENT, NODE, entries, NOW) == set()
    assert authorized_ids(AGENT, NODE, [*entries, entry("in", spiffe_id="/a")], NOW) == {"a", "b", "in"}


def test_what_hangs_below_an_expired_entry_expires_with_it() -> None:
    soon = NOW + timedelta(seconds=5)
    tree = EntryTree([entry("top", spiffe_id="/top", expires_at=soon), entry("low", parent=AT + "/top")])
    scope = AgentScope(AGENT, NODE, tree, NOW)
    assert (scope.ids, scope.next_change_at) == ({"top", "low"}, soon)
    scope.recompute(tree, soon)
    assert (scope.ids, scope.next_change_at) == (frozenset(), None)


def test_leaves_come_and_go_without_a_walk() -> None:
    tree = EntryTree([entry("one", spiffe_id="/one")])
    scope = AgentScope(AGENT, NODE, tree, NOW)
    leaf = entry("leaf", spiffe_id="/leaf")
    tree.add(leaf)
    assert scope.apply(None, leaf, tree, NOW) is Effect.ADDED
    renamed = entry("leaf", spiffe_id="/leaf", hint="x")
    assert scope.apply(tree.add(renamed), renamed, tree, NOW) is Effect.CHANGED
    assert scope.apply(tree.remove("leaf"), None, tree, NOW) is Effect.REMOVED
    foreign = entry("far", parent=AT + "/spire/agent/join_token/two")
    assert scope.apply(tree.add(foreign), foreign, tree, NOW) is Effect.NONE
    assert list(scope) == ["one"]
    assert len(scope) == 1
    assert "far" not in scope


def test_a_leaf_that_is_gone_leaves_no_parent_behind() -> None:
    tree = EntryTree()
    scope = AgentScope(AGENT, NODE, tree, NOW)
    leaf = entry("leaf", spiffe_id="/leaf")
    scope.apply(tree.add(leaf), leaf, tree, NOW)
    scope.apply(tree.remove("leaf"), None, tree, NOW)
    orphan = entry("orphan", parent=AT + "/leaf", spiffe_id="/orphan")
    assert scope.apply(tree.add(orphan), orphan, tree, NOW) is Effect.NONE
    assert scope.ids == frozenset()


def test_a_leaf_that_comes_with_an_end_is_looked_at_then() -> None:
    soon = NOW + timedelta(seconds=5)
    tree = EntryTree()
    scope = AgentScope(AGENT, NODE, tree, NOW)
    leaf = entry("leaf", expires_at=soon)
    tree.add(leaf)
    assert scope.apply(None, leaf, tree, NOW) is Effect.ADDED
    assert scope.next_change_at == soon


def test_an_entry_that_others_hang_below_already_asks_for_a_walk_when_it_comes() -> None:
    low, top = entry("low", parent=AT + "/top"), entry("top", spiffe_id="/top")
    tree = EntryTree([low])
    scope = AgentScope(AGENT, NODE, tree, NOW)
    assert not scope.ids
    tree.add(top)
    assert scope.apply(None, top, tree, NOW) is Effect.RECOMPUTE


def test_parents_and_aliases_ask_for_a_walk() -> None:
    alias = entry("alias", "x509pop:cluster:blue", parent=SERVER, spiffe_id="/blue")
    tree = EntryTree([entry("top", spiffe_id="/top"), entry("low", parent=AT + "/top", spiffe_id="/low")])
    scope = AgentScope(AGENT, NODE, tree, NOW)
    assert scope.apply(tree.add(alias), alias, tree, NOW) is Effect.RECOMPUTE
    foreign = entry("red", "x509pop:cluster:red", parent=SERVER, spiffe_id="/red")
    assert scope.apply(tree.add(foreign), foreign, tree, NOW) is Effect.NONE
    scope.recompute(tree, NOW)
    moved = entry("alias", "x509pop:cluster:red", parent=SERVER, spiffe_id="/blue")
    assert scope.apply(tree.add(moved), moved, tree, NOW) is Effect.RECOMPUTE
    assert scope.apply(tree.remove("top"), None, tree, NOW) is Effect.RECOMPUTE
    scope.recompute(tree, NOW)
    assert scope.ids == frozenset()


def test_a_parent_that_expired_asks_for_a_walk_at_its_next_change() -> None:
    soon = NOW + timedelta(seconds=5)
    tree = EntryTree([entry("top", spiffe_id="/top", expires_at=soon), entry("low", parent=AT + "/top")])
    scope = AgentScope(AGENT, NODE, tree, NOW)
    changed = entry("top", spiffe_id="/top", expires_at=soon, hint="x")
    assert scope.apply(tree.add(changed), changed, tree, NOW) is Effect.CHANGED
    again = entry("top", spiffe_id="/top", expires_at=soon, hint="y")
    assert scope.apply(tree.add(again), again, tree, soon) is Effect.RECOMPUTE


def test_nobody_serves_what_hangs_below_the_server() -> None:
    tree = EntryTree([entry("alias", "x509pop:cluster:red", parent=SERVER, spiffe_id="/red")])
    scope = AgentScope(SpiffeId(SERVER), NODE, tree, NOW)
    assert scope.ids == frozenset()
    another = entry("another", "x509pop:cluster:red", parent=SERVER, spiffe_id="/red2")
    assert scope.apply(tree.add(another), another, tree, NOW) is Effect.NONE
    assert scope.ids == frozenset()


PATHS = ["/a", "/b", "/c", "/d"]
PARENTS = [str(AGENT), SERVER, *(AT + path for path in PATHS)]
CHANGES = st.lists(
    st.tuples(
        st.integers(0, 9),
        st.one_of(
            st.none(),
            st.tuples(
                st.sampled_from(PARENTS),
                st.sampled_from(PATHS),
                st.sampled_from(["x509pop:cluster:blue", "x509pop:cluster:red"]),
                st.sampled_from([None, NOW, NOW + timedelta(seconds=9)]),
            ),
        ),
    ),
    max_size=40,
)


@settings(max_examples=300)
@given(CHANGES)
def test_step_by_step_gives_what_one_walk_gives(
    changes: list[tuple[int, tuple[str, str, str, datetime | None] | None]],
) -> None:
    tree = EntryTree()
    scope = AgentScope(AGENT, NODE, tree, NOW)
    for number, made in changes:
        before = scope.ids
        new = None
        if made is None:
            old = tree.remove(f"e{number}")
        else:
            parent, path, need, expires = made
            new = entry(f"e{number}", need, parent=parent, spiffe_id=path, expires_at=expires)
            old = tree.add(new)
        effect = scope.apply(old, new, tree, NOW)
        if effect is Effect.RECOMPUTE:
            assert scope.ids == before
            scope.recompute(tree, NOW)
        else:
            added, removed = scope.ids - before, before - scope.ids
            expected = {Effect.ADDED: (1, 0), Effect.REMOVED: (0, 1)}.get(effect, (0, 0))
            assert (len(added), len(removed)) == expected
        assert scope.ids == naive(AGENT, NODE, tree, NOW)
        assert scope.ids == authorized_ids(AGENT, NODE, tree, NOW)
    for entry_id in [each.id for each in tree]:
        tree.remove(entry_id)
    assert (len(tree), tree._children, len(tree._aliases)) == (0, {}, 0)
