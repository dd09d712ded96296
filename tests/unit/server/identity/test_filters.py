from datetime import timedelta

import pytest

from broker.errors import Invalid
from broker.server.identity.filters import (
    EntryFilter,
    NodeFilter,
    SetFilter,
    SetMatch,
    entry_order,
    page,
)
from broker.server.store.rows import Node
from broker.spiffe import Selector, SpiffeId
from tests.unit.server.authority.world import StandingClock
from tests.unit.server.identity.world import AGENT, OTHER, draft

A, B, C = (Selector(f"t:{name}") for name in "abc")
CLOCK = StandingClock()


@pytest.mark.parametrize(
    ("how", "asked", "holds"),
    [
        (SetMatch.EXACT, {A, B}, True),
        (SetMatch.EXACT, {A}, False),
        (SetMatch.SUBSET, {A, B, C}, True),
        (SetMatch.SUBSET, {A, C}, False),
        (SetMatch.SUPERSET, {A}, True),
        (SetMatch.SUPERSET, {A, C}, False),
        (SetMatch.ANY, {B, C}, True),
        (SetMatch.ANY, {C}, False),
    ],
)
def test_sets_are_compared_as_in_spire(how, asked, holds):
    assert SetFilter(frozenset(asked), how).holds(frozenset({A, B})) is holds


def test_what_has_nothing_is_no_subset_as_in_spire():
    assert not SetFilter(frozenset({A}), SetMatch.SUBSET).holds(frozenset())


def test_an_empty_filter_is_not_true_of_everything():
    with pytest.raises(Invalid):
        SetFilter(frozenset(), SetMatch.ANY)


def test_entries_are_narrowed_by_each_field():
    one = draft("/one", AGENT, CLOCK, hint="h", downstream=True)
    assert EntryFilter().holds(one)
    assert EntryFilter(spiffe_id=one.spiffe_id, parent_id=AGENT, hint="h", downstream=True).holds(one)
    for narrow in (
        EntryFilter(spiffe_id=SpiffeId("spiffe://example.org/two")),
        EntryFilter(parent_id=OTHER),
        EntryFilter(hint=""),
        EntryFilter(downstream=False),
    ):
        assert not narrow.holds(one)


def test_nodes_are_narrowed_by_each_field():
    node = Node(AGENT, "join_token", "1", "", CLOCK.now(), frozenset({A}))
    assert NodeFilter(attestation_type="join_token", banned=False, reattestable=False).holds(node)
    assert NodeFilter(expires_before=CLOCK.now() + timedelta(seconds=1)).holds(node)
    for narrow in (
        NodeFilter(attestation_type="x509pop"),
        NodeFilter(banned=True),
        NodeFilter(reattestable=True),
        NodeFilter(expires_before=CLOCK.now()),
        NodeFilter(selectors=SetFilter(frozenset({B}), SetMatch.ANY)),
    ):
        assert not narrow.holds(node)


def test_pages_are_whole_and_in_order():
    entries = [draft(f"/n{number}", AGENT, CLOCK) for number in (3, 1, 2, 5, 4)]
    seen, token = [], ""
    while True:
        one = page(entries, entry_order, 2, token)
        seen += [entry.id for entry in one.items]
        token = one.next
        if not token:
            break
    assert seen == ["n1", "n2", "n3", "n4", "n5"]
    assert [entry.id for entry in page(entries, entry_order, 0, "").items] == seen
    assert page(entries, entry_order, 5, "").next == ""
    with pytest.raises(Invalid):
        page(entries, entry_order, -1, "")
